"""`migrate`: move an instance to another hutch; `_migrate_target`: be that other one."""

from __future__ import annotations

from hutch.cli.command import QUIET, Command
from hutch.cli.options import UsageError
from hutch.cli.output import print_json
from hutch.cli.progress import pull_progress
from hutch.cli.session import Invocation, warn

__all__ = ["COMMANDS"]


def _migrate(invocation: Invocation) -> int:
    name, *destination = invocation.arguments
    if invocation.flag("claim"):
        if destination:
            raise UsageError("migrate --claim: expected an instance alone", exit_code=1)
        claimed = invocation.engine.claim_migration(name)
        if invocation.json:
            print_json({"Id": claimed.id, "Name": claimed.name})
        else:
            print(claimed.name)
        return 0
    if not destination:
        raise UsageError(
            "migrate: expected an instance and a destination",
            hint="hutch migrate web ssh://root@other.example",
            exit_code=1,
        )
    with pull_progress(quiet=invocation.flag("quiet") or invocation.json) as progress:
        done = invocation.engine.migrate(
            name,
            destination[0],
            with_volumes=invocation.flag("with_volumes"),
            bandwidth=invocation.options.get("bandwidth") or 0,
            downtime_s=_number(invocation, "downtime", 300) / 1000,
            timeout_s=_number(invocation, "timeout", 0) or None,
            post_copy=invocation.flag("post_copy"),
            parallel=invocation.options.get("parallel") or 0,
            compress=invocation.flag("compress"),
            progress=progress,
        )
    if done.problem:
        warn(f"{done.name} is at the target, but does not run there: {done.problem}")
    if invocation.json:
        print_json(
            {
                "Id": done.id,
                "Name": done.name,
                "Destination": done.destination,
                "Way": done.way,
                "Sent": done.sent,
                "Passes": done.passes,
                "Downtime": round(done.downtime_s, 3),
                "Offline": round(done.offline_s, 3),
                "Total": round(done.total_s, 3),
                "Problem": done.problem,
            }
        )
    else:
        print(done.id if invocation.flag("quiet") else done.name)
    return 0


def _number(invocation: Invocation, name: str, default: float) -> float:
    text = invocation.options.get(name)
    if text is None:
        return default
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--{name}: expected a number, got {text!r}", exit_code=1) from None


def _target(invocation: Invocation) -> int:
    import signal

    from hutch.errors import HutchError

    # The end of the link ends it, after it has put away what it was at: Ctrl-C at the source
    # and the end of the command that carries the link come here as signals too.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        invocation.engine.serve_migration(0, 1)
    except HutchError:
        return 1  # the source has been told, and says it
    return 0


def _serve(invocation: Invocation) -> int:
    import sys

    def tell(text: str) -> None:
        print(f"hutch: {text}", file=sys.stderr, flush=True)

    invocation.engine.serve_migrations(
        invocation.options.get("listen") or ":7443",
        certificates=invocation.options.get("certificates") or "",
        tell=tell,
    )
    return 0


COMMANDS = {
    "migrate": Command(
        handler=_migrate,
        summary="Move an instance to another hutch.",
        arguments="INSTANCE DESTINATION",
        low=1,
        high=2,
        options=(
            ("bandwidth", "", "text", "BYTES", "Send at most so much a second (10M)"),
            ("compress", "", "flag", "", "Compress the memory of a machine that runs"),
            ("downtime", "", "text", "MS", "How long a machine may stand still (300)"),
            ("parallel", "", "int", "N", "Send the memory of a machine that runs by N streams"),
            ("post-copy", "", "flag", "", "Let it run there before all of its memory is there"),
            ("timeout", "", "text", "SECONDS", "Leave a machine here that is not copied by then"),
            ("claim", "", "flag", "", "Keep what a migration left here; the other side is lost"),
            QUIET,
            ("with-volumes", "", "flag", "", "Send the named volumes too"),
        ),
        examples=(
            "hutch migrate web ssh://root@other.example",
            "hutch migrate --with-volumes db ssh://other.example/srv/hutch",
            "hutch migrate web 'exec:podman exec -i other hutch _migrate_target'",
        ),
        epilog="A virtual machine that runs goes on while it is copied (with QEMU 9 or KVM).",
    ),
    "serve migrations": Command(
        handler=_serve,
        summary="Take migrations in by TLS.",
        options=(
            ("listen", "", "text", "HOST:PORT", "Where to listen (:7443, every address)"),
            ("certificates", "", "text", "DIR", "ca.pem, cert.pem, key.pem (ROOT/tls)"),
        ),
        examples=(
            "hutch serve migrations --listen 10.0.0.2:7443",
            "hutch serve migrations --certificates /etc/hutch/tls",
        ),
        epilog="Whoever has a certificate that ca.pem signed can do what this root's "
        "administrator can.",
    ),
    "_migrate_target": Command(handler=_target, summary="Take migrated instances in."),
}
