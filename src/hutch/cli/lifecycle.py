"""Commands on existing instances: start, stop, restart, kill, pause, rm, wait, update …"""

from __future__ import annotations

from typing import Any

from hutch.cli.command import Command
from hutch.cli.keys import KEY_VALUE, key_source
from hutch.cli.options import Option, UsageError
from hutch.cli.output import print_json, show_result
from hutch.cli.run_options import RESOURCES
from hutch.cli.session import Invocation

__all__ = ["COMMANDS"]

_TIMEOUT: Option = ("timeout", "t", "text", "SECONDS", "Time until it is killed; -1 for none")
_TIME: Option = ("time", "", "text", "SECONDS", "The same as --timeout")
_SIGNAL: Option = ("signal", "s", "text", "SIGNAL", "Signal to send")


def _start(invocation: Invocation) -> int:
    if invocation.flag("attach") or invocation.flag("interactive"):
        return _start_attached(invocation)
    from hutch.cli.progress import pull_progress

    discard = invocation.flag("discard")

    key = _key(invocation)

    def start(name: str) -> None:
        instance = invocation.engine.get(name)
        instance.unlock(key)
        with pull_progress(quiet=False) as progress:
            instance.start(discard=discard, progress=progress)

    return invocation.each(invocation.arguments, start)


def _start_attached(invocation: Invocation) -> int:
    from hutch.cli.progress import pull_progress
    from hutch.cli.terminal import Streams, detach_keys, relay, terminal_size

    if len(invocation.arguments) > 1:
        raise UsageError("only one instance can be attached to", exit_code=1)
    instance = invocation.engine.get(invocation.arguments[0])
    instance.unlock(_key(invocation))
    process = instance.info().spec.process
    stdin = invocation.flag("interactive") and process.stdin
    keys = detach_keys(invocation.options.get("detach_keys"))
    rows, columns = terminal_size() if process.tty else (0, 0)
    with pull_progress(quiet=False) as progress:
        session = instance.start_attached(rows=rows, columns=columns, progress=progress)
    return relay(
        session,
        tty=process.tty,
        streams=Streams(stdin=stdin, ends=process.stdin_once),
        keys=keys,
        proxy_signals=invocation.options.get("sig_proxy", True),
    )


def _key(invocation: Invocation) -> str | bytes | None:
    given = invocation.options.get("disk_key")
    return None if given is None else key_source(given, option="--disk-key")


def _timeout(invocation: Invocation) -> float | None:
    from hutch.units import parse_duration

    text = invocation.options.get("timeout", invocation.options.get("time"))
    if text is None:
        return None
    return 315_360_000.0 if text == "-1" else parse_duration(text, field="timeout")


def _stop(invocation: Invocation) -> int:
    timeout = _timeout(invocation)

    def stop(name: str) -> None:
        invocation.engine.get(name).stop(timeout=timeout, signal=invocation.options.get("signal"))

    return invocation.each(invocation.arguments, stop)


def _restart(invocation: Invocation) -> int:
    timeout = _timeout(invocation)

    key = _key(invocation)

    def restart(name: str) -> None:
        instance = invocation.engine.get(name)
        instance.unlock(key)
        instance.restart(timeout=timeout, signal=invocation.options.get("signal"))

    return invocation.each(invocation.arguments, restart)


def _kill(invocation: Invocation) -> int:
    def kill(name: str) -> None:
        invocation.engine.get(name).kill(invocation.options.get("signal", "SIGKILL"))

    return invocation.each(invocation.arguments, kill)


def _pause(invocation: Invocation) -> int:
    return invocation.each(invocation.arguments, lambda n: invocation.engine.get(n).pause())


def _unpause(invocation: Invocation) -> int:
    return invocation.each(invocation.arguments, lambda n: invocation.engine.get(n).unpause())


def _rm(invocation: Invocation) -> int:
    from hutch.errors import NotFound

    force = invocation.flag("force")

    def remove(name: str) -> str | None:
        try:
            instance = invocation.engine.get(name)
            instance.remove(force=force, volumes=invocation.flag("volumes"))
        except NotFound:
            if force:
                return ""
            raise
        return None

    return invocation.each(invocation.arguments, remove)


def _wait(invocation: Invocation) -> int:
    instances = [invocation.engine.get(name) for name in invocation.arguments]
    done: list[dict[str, object]] = []
    for name, instance in zip(invocation.arguments, instances, strict=True):
        code = instance.wait()
        done.append({"Name": name, "ExitCode": code})
        if not invocation.json:
            print(code, flush=True)
    if invocation.json:
        print_json(done)
    return 0


def _rename(invocation: Invocation) -> int:
    old, new = invocation.arguments
    instance = invocation.engine.get(old)
    instance.rename(new)
    return show_result(invocation, "", Id=instance.id, Name=new)


def _update(invocation: Invocation) -> int:
    options: dict[str, Any] = dict(invocation.options)
    if not options:
        raise UsageError("update: nothing to change", hint="give a limit or --restart", exit_code=1)

    def update(name: str) -> None:
        invocation.engine.get(name).update(**options)

    return invocation.each(invocation.arguments, update)


def _prune(invocation: Invocation) -> int:
    from hutch.cli.prompt import confirm
    from hutch.errors import HutchError

    if not confirm(invocation, "This removes all stopped instances."):
        return 1
    filters = invocation.filters()
    before = _until(filters.pop("until", []))
    removed = []
    for info in invocation.engine.list(all=True, filters=filters):
        if str(info.state) not in ("created", "exited", "dead") or info.created_ns > before:
            continue
        try:
            invocation.engine.get(info.id).remove(volumes=True)
        except HutchError:
            continue  # started or removed by somebody else meanwhile
        removed.append(info.id)
    if invocation.json:
        print_json({"ContainersDeleted": removed})
        return 0
    for identifier in removed:
        print(identifier)
    if not removed:
        print("nothing to remove")
    return 0


def _until(values: list[str]) -> float:
    """Return the time in nanoseconds before which an instance must have been created."""
    from hutch.units import parse_time_ns

    return min(
        (float(parse_time_ns(value, "filter until")) for value in values), default=float("inf")
    )


def _simple(handler: Any, summary: str, example: str, options: tuple[Option, ...] = ()) -> Command:
    return Command(
        handler=handler,
        summary=summary,
        arguments="INSTANCE [INSTANCE...]",
        low=1,
        high=-1,
        options=options,
        examples=(example,),
    )


_DISK_KEY = (
    *("disk-key", "", "text", KEY_VALUE),
    "Key of an encrypted disk: FILE, fd:N, env:NAME or prompt",
)

COMMANDS = {
    "start": _simple(
        _start,
        "Start instances that are not running.",
        "hutch start -ai shell",
        (
            ("attach", "a", "flag", "", "Show the output and wait for the end"),
            ("detach-keys", "", "text", "KEYS", "Keys that leave it running (ctrl-p,ctrl-q)"),
            _DISK_KEY,
            ("discard", "", "flag", "", "Forget the memory of a suspended one: begin anew"),
            ("interactive", "i", "flag", "", "Send stdin as well"),
            ("sig-proxy", "", "flag", "", "Hand signals on to the program (true)"),
        ),
    ),
    "stop": _simple(
        _stop,
        "Ask instances to stop, and kill those that do not in time. A virtual machine still "
        "writes out what its programs wrote.",
        "hutch stop -t 2 web db",
        (_SIGNAL, _TIME, _TIMEOUT),
    ),
    "restart": _simple(
        _restart,
        "Stop and start instances.",
        "hutch restart web",
        (_DISK_KEY, _SIGNAL, _TIME, _TIMEOUT),
    ),
    "kill": _simple(
        _kill, "Send a signal (KILL) to instances.", "hutch kill -s HUP web", (_SIGNAL,)
    ),
    "pause": _simple(_pause, "Freeze all processes of instances.", "hutch pause web"),
    "unpause": _simple(_unpause, "Let frozen instances go on.", "hutch unpause web"),
    "rm": _simple(
        _rm,
        "Remove instances.",
        "hutch rm -f web",
        (
            ("force", "f", "flag", "", "Kill those that run"),
            ("link", "l", "flag", "", "Accepted, without effect"),
            ("volumes", "v", "flag", "", "Remove their anonymous volumes as well"),
        ),
    ),
    "wait": _simple(
        _wait, "Wait until instances have exited; print their exit codes.", "hutch wait job"
    ),
    "rename": Command(
        handler=_rename,
        summary="Give an instance another name.",
        arguments="INSTANCE NAME",
        low=2,
        high=2,
        examples=("hutch rename old new",),
    ),
    "update": _simple(
        _update,
        "Change the limits or the restart policy of instances; running ones obey at once.",
        "hutch update --memory 1g --cpus 2 web",
        (
            *RESOURCES,
            ("disk", "", "text", "SIZE", "Larger writable disk of a virtual machine"),
            ("network", "", "list", "SPEC", "Rates: name=NETWORK,rx-rate=RATE,tx-rate=RATE"),
        ),
    ),
    "prune": Command(
        handler=_prune,
        summary="Remove all stopped instances.",
        options=(
            ("filter", "", "list", "KEY=VALUE", "until=… or label=…"),
            ("force", "f", "flag", "", "Do not ask"),
        ),
        examples=("hutch prune -f",),
    ),
}
