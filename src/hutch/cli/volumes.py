"""`volume …`."""

from __future__ import annotations

from hutch.cli.command import FILTER, FORMAT, QUIET, Command
from hutch.cli.keys import KEY_VALUE, key_source
from hutch.cli.networks import pairs
from hutch.cli.options import UsageError
from hutch.cli.output import print_json, show_result, show_rows, stamp
from hutch.cli.prompt import confirm
from hutch.cli.session import Invocation, Told
from hutch.errors import NotFound
from hutch.units import format_bytes

__all__ = ["COMMANDS", "VOLUME_KEY", "volume_key"]

VOLUME_KEY = (
    *("key", "", "text", KEY_VALUE),
    "Where the key of an encrypted volume is: FILE, fd:N, env:NAME or prompt",
)
"""How the key of an encrypted volume is told."""
_SNAPSHOT_COLUMNS = (("NAME", "Name"), ("CREATED", "CreatedAt"))
_COLUMNS = (("DRIVER", "Driver"), ("VOLUME NAME", "Name"))


def _create(invocation: Invocation) -> int:
    values = invocation.options
    name = invocation.arguments[0] if invocation.arguments else values.get("name")
    options = pairs(values.get("opt", []), "opt")
    wanted = "encrypted" in options and "key-file" not in options
    if wanted and not values.get("key"):
        raise UsageError("an encrypted volume needs --key: FILE, fd:N, env:NAME or prompt")
    volume = invocation.engine.volumes.create(
        name,
        driver=values.get("driver", "local"),
        options=options,
        labels=pairs(values.get("label", []), "label"),
        pool=values.get("pool", ""),
        key=volume_key(invocation, new=True),
    )
    return show_result(invocation, volume.name, Name=volume.name)


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


def volume_key(invocation: Invocation, *, new: bool = False) -> str | bytes | None:
    """Return the key that `--key` tells the place of, None without one."""
    text = invocation.options.get("key")
    return key_source(text, option="--key", new=new) if text else None


def _open(invocation: Invocation) -> int:
    key = volume_key(invocation)
    volumes = invocation.engine.volumes

    def unlock(name: str) -> Told:
        path = volumes.open(name, key=key).path
        return path, {"Mountpoint": path}

    return invocation.each(invocation.arguments, unlock)


def _close(invocation: Invocation) -> int:
    def close(name: str) -> None:
        invocation.engine.volumes.get(name)
        invocation.engine.volumes.close(name)

    return invocation.each(invocation.arguments, close)


def _clone(invocation: Invocation) -> int:
    source, name = invocation.arguments
    values = invocation.options
    volume = invocation.engine.volumes.clone(
        source,
        name,
        snapshot=values.get("snapshot", ""),
        labels=pairs(values["label"], "label") if "label" in values else None,
    )
    return show_result(invocation, volume.name, Name=volume.name)


def _snapshot(invocation: Invocation) -> int:
    name, snapshot = invocation.arguments
    made = invocation.engine.volumes.snapshot(name, snapshot)
    return show_result(invocation, made.name, Name=made.name, Volume=made.volume)


def _snapshots(invocation: Invocation) -> int:
    rows = [
        {
            "Name": found.name,
            "Volume": found.volume,
            "CreatedAt": stamp(int(found.created_at * 1e9)),
        }
        for found in invocation.engine.volumes.snapshots(invocation.arguments[0])
    ]
    return show_rows(invocation, rows, _SNAPSHOT_COLUMNS, identifier="Name")


def _remove_snapshots(invocation: Invocation) -> int:
    volume, *names = invocation.arguments
    volumes = invocation.engine.volumes
    return invocation.each(names, lambda name: volumes.remove_snapshot(volume, name))


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
    return show_result(invocation, name, Name=name)


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
            (
                *("opt", "o", "list", "KEY=VALUE"),
                "size=…, pool=…, encrypted, key-file=…, type=disk; or type=…, device=…, o=…",
            ),
            ("pool", "", "text", "POOL", "The storage pool to keep it in"),
            VOLUME_KEY,
        ),
        epilog="A key is not given itself but where it is; of that only a file is remembered, "
        "and read at each start. Otherwise `hutch volume open` is needed before.",
        examples=(
            "hutch volume create data",
            "hutch volume create --pool fast -o size=10G data",
            "hutch volume create -o encrypted -o size=10G --key prompt secret",
            "hutch volume create -o type=tmpfs -o device=tmpfs -o o=size=64m scratch",
            "hutch volume create -o type=disk -o size=20G db",
        ),
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
    "volume open": Command(
        handler=_open,
        summary="Mount volumes on the host; print their directories.",
        arguments="VOLUME [VOLUME...]",
        low=1,
        high=-1,
        options=(VOLUME_KEY,),
        epilog="Disk images, encrypted or not, stay open until `volume close`, or until the last "
        "instance that uses them ends. Others are mounted when they are first used.",
        examples=("hutch volume open --key prompt secret",),
    ),
    "volume close": Command(
        handler=_close,
        summary="Close volumes that were opened; instances that use them keep them open.",
        arguments="VOLUME [VOLUME...]",
        low=1,
        high=-1,
        examples=("hutch volume close secret",),
    ),
    "volume resize": Command(
        handler=_resize,
        summary="Let a volume of a size grow.",
        arguments="VOLUME SIZE",
        low=2,
        high=2,
        epilog="A machine's disk (type=disk) grows while the machine runs, and a volume with a "
        "quota (in pools of ext4, xfs and btrfs) while it is used; others when no instance that "
        "uses them runs.",
        examples=("hutch volume resize data 20G",),
    ),
    "volume clone": Command(
        handler=_clone,
        summary="Create a volume that begins as another one is, or was.",
        arguments="VOLUME NEW",
        low=2,
        high=2,
        options=(
            ("label", "", "list", "KEY=VALUE", "Set a label"),
            ("snapshot", "", "text", "NAME", "As it was in this snapshot"),
        ),
        examples=("hutch volume clone data try", "hutch volume clone --snapshot monday data try"),
    ),
    "volume snapshot create": Command(
        handler=_snapshot,
        summary="Keep a volume as it is now; its writers wait meanwhile.",
        arguments="VOLUME NAME",
        low=2,
        high=2,
        examples=("hutch volume snapshot create data monday",),
    ),
    "volume snapshot ls": Command(
        handler=_snapshots,
        summary="List the snapshots of a volume.",
        arguments="VOLUME",
        low=1,
        high=1,
        options=(FORMAT, QUIET),
        examples=("hutch volume snapshot ls data",),
    ),
    "volume snapshot rm": Command(
        handler=_remove_snapshots,
        summary="Remove snapshots of a volume.",
        arguments="VOLUME NAME [NAME...]",
        low=2,
        high=-1,
        examples=("hutch volume snapshot rm data monday",),
    ),
}
