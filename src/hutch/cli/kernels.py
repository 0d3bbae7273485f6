"""`vm kernel …`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hutch.cli.command import FORMAT, NO_TRUNC, QUIET, Command
from hutch.cli.output import ago, print_json, show_rows, stamp
from hutch.cli.progress import pull_progress
from hutch.cli.session import Invocation
from hutch.units import format_bytes

if TYPE_CHECKING:
    from hutch.drivers.vm.kernels import KernelRecord

__all__ = ["COMMANDS"]

_COLUMNS = (
    ("KERNEL ID", "ID"),
    ("RELEASE", "Release"),
    ("SOURCE", "Source"),
    ("ADDED", "AddedSince"),
    ("SIZE", "Size"),
    ("USED BY", "UsedBy"),
)


def _add(invocation: Invocation) -> int:
    values = invocation.options
    with pull_progress(quiet=invocation.flag("quiet")) as progress:
        record = invocation.engine.kernels.add(
            invocation.arguments[0] if invocation.arguments else None,
            file=values.get("file"),
            modules=values.get("modules"),
            progress=progress,
        )
    if invocation.json:
        print_json(record)
    else:
        print(record.release)
    return 0


def _ls(invocation: Invocation) -> int:
    kernels = invocation.engine.kernels
    rows = [_row(invocation, record, len(kernels.users(record.id))) for record in kernels.list()]
    return show_rows(invocation, rows, _COLUMNS, identifier="ID")


def _row(invocation: Invocation, record: KernelRecord, users: int) -> dict[str, Any]:
    added_ns = int(record.added_at * 1e9)
    return {
        "ID": record.id if invocation.json or invocation.flag("no_trunc") else record.id[:12],
        "Release": record.release,
        "Source": record.source,
        "AddedAt": stamp(added_ns),
        "AddedSince": ago(added_ns),
        "Size": format_bytes(record.size),
        "Modules": [*record.boot, *record.late],
        "UsedBy": users,
    }


def _rm(invocation: Invocation) -> int:
    return invocation.each(
        invocation.arguments, lambda name: invocation.engine.kernels.remove(name).release
    )


COMMANDS = {
    "vm kernel add": Command(
        handler=_add,
        summary="Add a guest kernel; print its release. Virtual machines then start with it.",
        arguments="[PACKAGE]",
        high=1,
        options=(
            ("file", "", "text", "VMLINUZ", "A kernel of your own in place of a package"),
            ("modules", "", "text", "DIRECTORY", "Its modules: /lib/modules/VERSION"),
            ("quiet", "q", "flag", "", "Show no progress"),
        ),
        epilog="Without an argument the kernel that Debian's linux-image-cloud-amd64 depends on "
        "is fetched by the host's apt. Nothing is installed on the host.",
        examples=(
            "hutch vm kernel add",
            "hutch vm kernel add linux-image-6.12-cloud-amd64",
            "hutch vm kernel add --file vmlinuz --modules /lib/modules/6.12.9",
        ),
    ),
    "vm kernel ls": Command(
        handler=_ls,
        summary="List the guest kernels; the first is what virtual machines start with.",
        options=(FORMAT, NO_TRUNC, QUIET),
        examples=("hutch vm kernel ls", "hutch vm kernel ls -o json"),
    ),
    "vm kernel rm": Command(
        handler=_rm,
        summary="Remove guest kernels.",
        arguments="KERNEL [KERNEL...]",
        low=1,
        high=-1,
        epilog="A kernel is named by its release, its package or the beginning of its id.",
        examples=("hutch vm kernel rm 6.1.0-40-cloud-amd64",),
    ),
}
