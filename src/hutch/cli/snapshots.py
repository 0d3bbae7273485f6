"""`fork`, `suspend` and `snapshot …`: machines that go on from a saved state."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING, Any

from hutch.cli.command import FORMAT, NO_TRUNC, QUIET, Command
from hutch.cli.options import UsageError
from hutch.cli.output import ago, print_json, show_result, show_rows, stamp
from hutch.cli.session import Invocation
from hutch.errors import NotFound
from hutch.units import format_bytes

if TYPE_CHECKING:
    from hutch.engine.records import SnapshotRecord

__all__ = ["COMMANDS"]

_PIECE = 1 << 20
_COLUMNS = (
    ("SNAPSHOT", "Name"),
    ("IMAGE", "Image"),
    ("CREATED", "CreatedSince"),
    ("MEMORY", "Memory"),
    ("SIZE", "Size"),
)


def _fork(invocation: Invocation) -> int:
    source, *names = invocation.arguments
    count = _count(invocation.options.get("count", "1"))
    made = invocation.engine.get(source).fork(
        count, name=names[0] if names else None, publish=not invocation.flag("no_publish")
    )
    twins = made if isinstance(made, list) else [made]
    if invocation.json:
        print_json([{"Id": twin.id, "Name": twin.name} for twin in twins])
        return 0
    for twin in twins:
        print(twin.id if invocation.flag("quiet") else twin.name)
    return 0


def _count(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"count: expected a number, got {text!r}", exit_code=1) from None


def _suspend(invocation: Invocation) -> int:
    return invocation.each(invocation.arguments, lambda n: invocation.engine.get(n).suspend())


def _create(invocation: Invocation) -> int:
    instance, *tags = invocation.arguments
    made = invocation.engine.snapshots.create(
        instance, tags[0] if tags else None, disk_only=invocation.flag("disk_only")
    )
    if invocation.json:
        print_json(_row(made, full=True))
    else:
        print(_name(made))
    return 0


def _name(record: SnapshotRecord) -> str:
    return f"{record.source_name}/{record.tag}"


def _row(record: SnapshotRecord, *, full: bool) -> dict[str, Any]:
    return {
        "Name": _name(record),
        "ID": record.id if full else record.id[:12],
        "Instance": record.source_name,
        "InstanceID": record.source,
        "Tag": record.tag,
        "Image": record.image_name,
        "CreatedAt": stamp(record.created_ns),
        "CreatedSince": ago(record.created_ns),
        "Memory": "yes" if record.memory else "no",
        "Size": format_bytes(record.size),
    }


def _ls(invocation: Invocation) -> int:
    wanted = invocation.arguments[0] if invocation.arguments else None
    full = invocation.json or invocation.flag("no_trunc")
    rows = [_row(record, full=full) for record in invocation.engine.snapshots.list(wanted)]
    return show_rows(invocation, rows, _COLUMNS, identifier="Name")


def _rm(invocation: Invocation) -> int:
    return invocation.each(invocation.arguments, invocation.engine.snapshots.remove)


def _restore(invocation: Invocation) -> int:
    instance = invocation.engine.snapshots.restore(
        invocation.arguments[0], name=invocation.options.get("name")
    )
    if invocation.json:
        print_json({"Id": instance.id, "Name": instance.name})
    else:
        print(instance.name)
    return 0


def _export(invocation: Invocation) -> int:
    stream = invocation.engine.snapshots.export(invocation.arguments[0])
    target = invocation.options.get("file")
    if target is None:
        if sys.stdout.isatty():
            raise UsageError("export: a tar archive is not for a terminal", hint="use --file FILE")
        for piece in stream:
            sys.stdout.buffer.write(piece)
        return 0
    partial = f"{target}.tmp"
    try:
        with open(partial, "xb") as file:
            for piece in stream:
                file.write(piece)
        os.replace(partial, target)
    except BaseException:
        if os.path.exists(partial):
            os.unlink(partial)
        raise
    return show_result(invocation, "", Name=invocation.arguments[0], File=target)


def _opened(path: str) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as exc:
        raise NotFound(f"{path}: {(exc.strerror or '').lower()}") from exc


def _import(invocation: Invocation) -> int:
    path, *names = invocation.arguments
    with ExitStack() as held:
        file = sys.stdin.buffer if path == "-" else held.enter_context(_opened(path))
        pieces = iter(lambda: file.read(_PIECE), b"")
        made = invocation.engine.snapshots.import_(pieces, names[0] if names else None)
    if invocation.json:
        print_json(_row(made, full=True))
    else:
        print(_name(made))
    return 0


COMMANDS = {
    "fork": Command(
        handler=_fork,
        summary="Make running twins of a running instance; print their names.",
        arguments="INSTANCE [NAME]",
        low=1,
        high=2,
        options=(
            ("count", "n", "text", "NUMBER", "How many (1); they are called NAME-1, NAME-2 …"),
            ("no-publish", "", "flag", "", "Leave the published ports to the source"),
            ("quiet", "q", "flag", "", "Print identifiers"),
        ),
        epilog="A twin has the memory, the files and the programs of the machine as they are now, "
        "and its own name, addresses, random numbers and log. The machine goes on.",
        examples=("hutch fork web canary", "hutch fork -n 3 warm worker"),
    ),
    "suspend": Command(
        handler=_suspend,
        summary="Write the memory of instances to disk and end them.",
        arguments="INSTANCE [INSTANCE...]",
        low=1,
        high=-1,
        epilog="`hutch start` lets them go on where they were, after a reboot of the host too; "
        "with --discard they begin anew.",
        examples=("hutch suspend web", "hutch start web"),
    ),
    "snapshot create": Command(
        handler=_create,
        summary="Keep an instance as it is now, with its memory if it runs.",
        arguments="INSTANCE [TAG]",
        low=1,
        high=2,
        options=(("disk-only", "", "flag", "", "Its disk alone, also while it runs"),),
        epilog="Prints INSTANCE/TAG; without a tag it is snap0, snap1 and so on.",
        examples=(
            "hutch snapshot create web before-upgrade",
            "hutch snapshot create --disk-only db nightly",
        ),
    ),
    "snapshot ls": Command(
        handler=_ls,
        summary="List snapshots, oldest first.",
        arguments="[INSTANCE]",
        high=1,
        options=(FORMAT, NO_TRUNC, QUIET),
        examples=("hutch snapshot ls", "hutch snapshot ls web -o json"),
    ),
    "snapshot rm": Command(
        handler=_rm,
        summary="Remove snapshots.",
        arguments="INSTANCE/TAG [INSTANCE/TAG...]",
        low=1,
        high=-1,
        examples=("hutch snapshot rm web/before-upgrade",),
    ),
    "snapshot restore": Command(
        handler=_restore,
        summary="Go back to a snapshot, or start another instance from it.",
        arguments="INSTANCE/TAG",
        low=1,
        high=1,
        options=(("name", "", "text", "NAME", "Make a new instance of that name"),),
        epilog="Without --name the instance itself goes back; it must not run. One that ran when "
        "the snapshot was taken runs again.",
        examples=(
            "hutch snapshot restore web/before-upgrade",
            "hutch snapshot restore web/before-upgrade --name web2",
        ),
    ),
    "snapshot export": Command(
        handler=_export,
        summary="Write a snapshot as a tar archive.",
        arguments="INSTANCE/TAG",
        low=1,
        high=1,
        options=(("file", "f", "text", "FILE", "Write there and not to stdout"),),
        epilog="It holds snapshot.json, the disk (disk.raw and, where it was shared, the "
        "overlays on it, with their holes) and, of a running machine, "
        "its memory as QEMU's migration stream.",
        examples=("hutch snapshot export web/one --file web-one.tar",),
    ),
    "snapshot import": Command(
        handler=_import,
        summary="Store a snapshot that `hutch snapshot export` wrote.",
        arguments="FILE|- [INSTANCE/TAG]",
        low=1,
        high=2,
        options=(),
        epilog="Its image and its guest kernel must be here. It keeps its name unless another is "
        "given, and is restored as another instance (--name).",
        examples=(
            "hutch snapshot import web-one.tar",
            "ssh host hutch snapshot export web/one | hutch snapshot import - web/far",
        ),
    ),
}
