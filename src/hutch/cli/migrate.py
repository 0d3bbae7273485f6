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
                "Sent": done.sent,
                "Downtime": round(done.downtime_s, 3),
                "Problem": done.problem,
            }
        )
    else:
        print(done.id if invocation.flag("quiet") else done.name)
    return 0


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


COMMANDS = {
    "migrate": Command(
        handler=_migrate,
        summary="Move an instance to another hutch.",
        arguments="INSTANCE DESTINATION",
        low=1,
        high=2,
        options=(
            ("bandwidth", "", "text", "BYTES", "Send at most so much a second (10M)"),
            ("claim", "", "flag", "", "Keep what a migration left here; the other side is lost"),
            QUIET,
            ("with-volumes", "", "flag", "", "Send the named volumes too"),
        ),
        examples=(
            "hutch migrate web ssh://root@other.example",
            "hutch migrate --with-volumes db ssh://other.example/srv/hutch",
            "hutch migrate web 'exec:podman exec -i other hutch _migrate_target'",
        ),
        epilog="A virtual machine that runs is suspended, moved, and goes on there.",
    ),
    "_migrate_target": Command(handler=_target, summary="Take migrated instances in."),
}
