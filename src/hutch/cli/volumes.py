"""`volume …`."""

from __future__ import annotations

from hutch.cli.command import FILTER, FORMAT, QUIET, Command
from hutch.cli.networks import pairs
from hutch.cli.output import print_json, show_rows
from hutch.cli.prompt import confirm
from hutch.cli.session import Invocation
from hutch.errors import NotFound
from hutch.units import format_bytes

__all__ = ["COMMANDS"]

_COLUMNS = (("DRIVER", "Driver"), ("VOLUME NAME", "Name"))


def _create(invocation: Invocation) -> int:
    values = invocation.options
    name = invocation.arguments[0] if invocation.arguments else values.get("name")
    volume = invocation.engine.volumes.create(
        name,
        driver=values.get("driver", "local"),
        options=pairs(values.get("opt", []), "opt"),
        labels=pairs(values.get("label", []), "label"),
    )
    print(volume.name)
    return 0


def _ls(invocation: Invocation) -> int:
    rows = [
        {
            "Driver": volume.driver,
            "Name": volume.name,
            "Labels": ",".join(f"{k}={v}" for k, v in sorted(volume.labels.items())),
            "Mountpoint": volume.path,
            "Scope": "local",
        }
        for volume in invocation.engine.volumes.list(invocation.filters() or None)
    ]
    return show_rows(invocation, rows, _COLUMNS, identifier="Name")


def _rm(invocation: Invocation) -> int:
    force = invocation.flag("force")

    def remove(name: str) -> str | None:
        try:
            invocation.engine.volumes.remove(name)
        except NotFound:
            if not force:
                raise
            return ""
        return None

    return invocation.each(invocation.arguments, remove)


def _prune(invocation: Invocation) -> int:
    every = invocation.flag("all")
    what = "all volumes" if every else "all anonymous volumes"
    if not confirm(invocation, f"This removes {what} that no instance uses, with their content."):
        return 1
    removed, freed = invocation.engine.volumes.prune(
        all_volumes=every, filters=invocation.filters() or None
    )
    if invocation.json:
        print_json({"VolumesDeleted": removed, "SpaceReclaimed": freed})
        return 0
    for name in removed:
        print(name)
    print(f"Total reclaimed space: {format_bytes(freed)}")
    return 0


def _resize(invocation: Invocation) -> int:
    name, size = invocation.arguments
    invocation.engine.volumes.resize(name, size)
    print(name)
    return 0


def _clone(invocation: Invocation) -> int:
    name, new = invocation.arguments
    print(invocation.engine.volumes.clone(name, new).name)
    return 0


COMMANDS = {
    "volume create": Command(
        handler=_create,
        summary="Create a volume; print its name.",
        arguments="[NAME]",
        high=1,
        options=(
            ("driver", "d", "text", "NAME", "local"),
            ("label", "", "list", "KEY=VALUE", "Set a label"),
            ("name", "", "text", "NAME", "The same as the argument"),
            ("opt", "o", "list", "KEY=VALUE", "type=…, device=…, o=…, size=…"),
        ),
        examples=(
            "hutch volume create data",
            "hutch volume create -o type=tmpfs -o device=tmpfs -o o=size=64m scratch",
            "hutch volume create -o type=disk -o size=20G db",
        ),
    ),
    "volume clone": Command(
        handler=_clone,
        summary="Make a volume with what one that is a disk has now; its machine runs on.",
        arguments="VOLUME NEW",
        low=2,
        high=2,
        examples=("hutch volume clone db db-before-upgrade",),
    ),
    "volume resize": Command(
        handler=_resize,
        summary="Let a volume that is a disk grow, with its file system; its machine runs on.",
        arguments="VOLUME SIZE",
        low=2,
        high=2,
        examples=("hutch volume resize db 40G",),
    ),
    "volume ls": Command(
        handler=_ls,
        summary="List volumes.",
        options=(FILTER, FORMAT, QUIET),
        examples=("hutch volume ls", "hutch volume ls -q --filter dangling=true"),
    ),
    "volume rm": Command(
        handler=_rm,
        summary="Remove volumes with their content.",
        arguments="VOLUME [VOLUME...]",
        low=1,
        high=-1,
        options=(("force", "f", "flag", "", "Do not fail if it does not exist"),),
        examples=("hutch volume rm data",),
    ),
    "volume prune": Command(
        handler=_prune,
        summary="Remove anonymous volumes that no instance uses.",
        options=(
            ("all", "a", "flag", "", "Named volumes as well"),
            ("filter", "", "list", "KEY=VALUE", "Remove what matches only"),
            ("force", "f", "flag", "", "Do not ask"),
        ),
        examples=("hutch volume prune -f",),
    ),
}
