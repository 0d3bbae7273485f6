"""`run` and `create`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from hutch.cli.command import Command
from hutch.cli.options import Option, UsageError
from hutch.cli.output import show_result
from hutch.cli.run_options import CREATE_OPTIONS, engine_options
from hutch.cli.session import Invocation, warn

if TYPE_CHECKING:
    from hutch.engine.instance import Instance

__all__ = ["COMMANDS", "run_attached", "run_detached"]

_STREAMS = ("stdin", "stdout", "stderr")


def _run(invocation: Invocation) -> int:
    values = invocation.options
    _check(values)
    detached = bool(values.get("detach"))
    options = _options(values, attached=not detached)
    if values.get("dry_run"):
        return _dry_run(invocation, options)
    instance = _create(invocation, options)
    if detached:
        return run_detached(invocation, instance)
    return run_attached(instance, values)


def _create_only(invocation: Invocation) -> int:
    values = invocation.options
    options = _options(values, attached=_attaches_stdin(values))
    if values.get("dry_run"):
        return _dry_run(invocation, options)
    instance = _create(invocation, options)
    return show_result(invocation, instance.id, Id=instance.id, Name=instance.name)


def _check(values: dict[str, Any]) -> None:
    if values.get("detach") and values.get("attach"):
        raise UsageError("--detach and --attach cannot be combined")
    for stream in values.get("attach", ()):
        if stream.lower() not in _STREAMS:
            raise UsageError(f"--attach: expected stdin, stdout or stderr, got {stream!r}")
    if values.get("detach_keys"):
        from hutch.cli.terminal import detach_keys

        detach_keys(values["detach_keys"])  # before anything is made


def _attaches_stdin(values: dict[str, Any]) -> bool:
    streams = values.get("attach")
    return bool(values.get("interactive")) and (not streams or "stdin" in streams)


def _options(values: dict[str, Any], *, attached: bool) -> dict[str, Any]:
    options = engine_options(values)
    if options.get("network") == ["host"] and (values.get("publish") or values.get("publish_all")):
        warn("published ports have no effect with --network host")
    if attached and values.get("interactive") and not values.get("tty"):
        options["stdin_once"] = True  # a terminal, though, may be detached from and come back
    return options


def _dry_run(invocation: Invocation, options: dict[str, Any]) -> int:
    """Print the plan of a start; the instance made for that is removed again."""
    from hutch.cli.output import print_json
    from hutch.errors import Exhausted

    try:
        instance = _create(invocation, options)
    except Exhausted as exc:
        decision = getattr(exc, "decision", None)
        if decision is None or not invocation.json:
            raise
        print_json({"Admission": decision})
        return 125
    try:
        plan = invocation.engine.plan(instance.id)
        qemu = invocation.engine.machine_arguments(instance.id)
        print_json({"Guest": plan, "Qemu": qemu} if qemu else plan)
    finally:
        instance.remove(force=True, volumes=True)
    return 0


def _create(invocation: Invocation, options: dict[str, Any]) -> Instance:
    """Create the instance, showing the progress of a pull if one is needed."""
    from hutch.cli.progress import pull_progress

    image, *command = invocation.arguments
    cidfile = invocation.options.get("cidfile")
    if cidfile and os.path.exists(cidfile):
        raise UsageError(
            f"--cidfile: {cidfile} exists already", hint="remove it, or name another file"
        )
    with pull_progress(quiet=invocation.flag("quiet")) as progress:
        instance = invocation.engine.create(image, command or None, progress=progress, **options)
    if options.get("isolation") == "auto":
        info = instance.info()
        if info.spec.isolation == "vm":
            warn(f"running as a virtual machine: {info.isolation_reason}")
    if cidfile:
        try:
            with open(cidfile, "x") as file:
                file.write(instance.id)
        except OSError as exc:
            instance.remove(force=True, volumes=True)
            raise UsageError(f"--cidfile: {cidfile}: {exc.strerror}") from exc
    return instance


def run_detached(invocation: Invocation, instance: Instance) -> int:
    """Start an instance and print its identifier."""
    from hutch.cli.progress import pull_progress

    try:
        with pull_progress(quiet=invocation.flag("quiet")) as progress:
            instance.start(progress=progress)
    except BaseException:
        _remove_failed(instance, invocation.options)
        raise
    return show_result(invocation, instance.id, Id=instance.id, Name=instance.name)


def run_attached(instance: Instance, values: dict[str, Any]) -> int:
    """Start an instance with our streams as its own; return its exit code."""
    from hutch.cli.progress import pull_progress
    from hutch.cli.terminal import Streams, detach_keys, relay, terminal_size

    tty = bool(values.get("tty"))
    stdin = _attaches_stdin(values)
    if tty and stdin and not os.isatty(0):
        _remove_failed(instance, {"rm": True})
        raise UsageError(
            "the input device is not a terminal",
            hint="leave out -t, or run from a terminal",
            exit_code=1,
        )
    streams = values.get("attach")
    chosen = Streams(
        stdin=stdin,
        stdout=not streams or "stdout" in streams,
        stderr=not streams or "stderr" in streams,
        ends=not tty,
    )
    keys = detach_keys(values.get("detach_keys"))
    rows, columns = terminal_size() if tty else (0, 0)
    try:
        with pull_progress(quiet=bool(values.get("quiet"))) as progress:
            session = instance.start_attached(rows=rows, columns=columns, progress=progress)
    except BaseException:
        _remove_failed(instance, values)
        raise
    try:
        return relay(
            session, tty=tty, streams=chosen, keys=keys, proxy_signals=values.get("sig_proxy", True)
        )
    except BrokenPipeError:
        # As in `run --rm IMAGE yes | head -1`: nobody would ever stop the program.
        _remove_failed(instance, values)
        raise


def _remove_failed(instance: Instance, values: dict[str, Any]) -> None:
    """Remove an instance that was to be removed at its end, now that all has failed."""
    from hutch.errors import HutchError, NotFound

    if not values.get("rm"):
        return
    try:
        instance.remove(force=True, volumes=True)
    except NotFound:
        return
    except HutchError as exc:
        warn(f"could not be removed: {exc}")


_RUN_ONLY: tuple[Option, ...] = (
    ("detach", "d", "flag", "", "Leave it running in the background; print its identifier"),
    ("detach-keys", "", "text", "KEYS", "Keys that leave it running (ctrl-p,ctrl-q)"),
    ("sig-proxy", "", "flag", "", "Hand signals on to the program (true)"),
)

COMMANDS = {
    "run": Command(
        handler=_run,
        summary="Create an instance of an image, start it, and wait for it.",
        arguments="IMAGE [COMMAND] [ARG...]",
        low=1,
        high=-1,
        options=CREATE_OPTIONS + _RUN_ONLY,
        interspersed=False,
        epilog="Options end at IMAGE; what follows belongs to the program. The exit code is "
        "the program's, 125 if hutch failed, 126 if the program cannot be run, 127 if it was "
        "not found, 128+n if signal n ended it.",
        examples=(
            "hutch run --rm debian:bookworm uname -a",
            "hutch run --rm -it busybox sh",
            "hutch run -d --name web -p 8080:80 -v ./site:/srv:ro nginx",
            "hutch run --rm --network none --memory 256m --cpus 1 busybox sh -c 'echo hi'",
            "hutch run --dry-run busybox true",
        ),
    ),
    "create": Command(
        handler=_create_only,
        summary="Create an instance of an image without starting it; print its identifier.",
        arguments="IMAGE [COMMAND] [ARG...]",
        low=1,
        high=-1,
        options=CREATE_OPTIONS,
        interspersed=False,
        examples=(
            "hutch create --name job debian:bookworm sleep 60",
            "hutch create -it --name shell busybox",
        ),
    ),
}
