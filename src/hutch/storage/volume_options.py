"""The driver options of volumes, as `docker volume create -o` has them and hutch adds to them:
checked, put in order, and turned into where a volume lies."""

from __future__ import annotations

import os
from collections.abc import Mapping

from hutch.errors import InvalidArgument, Unsupported
from hutch.storage.disks import DEFAULT_SIZE, check_size
from hutch.storage.homes import Form, Home
from hutch.storage.volume_records import PoolRecord, VolumeRecord, check_name
from hutch.units import parse_bytes

__all__ = ["checked_options", "home_of", "is_bind", "is_disk", "is_foreign", "size_of"]

_FOREIGN = frozenset(("type", "device", "o"))
_OWN = frozenset(("size", "pool", "encrypted", "key-file"))
_YES, _NO = frozenset(("", "1", "true", "yes")), frozenset(("0", "false", "no"))


def checked_options(options: Mapping[str, str]) -> dict[str, str]:
    """Return options in their usual form; raise `InvalidArgument` naming the one that is not."""
    found = dict(options)
    for key in found:
        if key not in _FOREIGN | _OWN:
            raise InvalidArgument(
                f"unknown option of the local driver: {key!r}",
                field="options",
                hint="it knows type, device, o, size, pool, encrypted and key-file",
            )
    if is_disk(found):
        _check_disk(found)
    elif foreign := found.keys() & _FOREIGN:
        if own := sorted(found.keys() & _OWN):
            raise InvalidArgument(
                f"{own[0]} does not go with {min(foreign)}: that is a volume of its own",
                field="options",
            )
        _check_foreign(found)
        return found
    _check_own(found)
    return found


def _check_own(found: dict[str, str]) -> None:
    if "encrypted" in found:
        answer = found["encrypted"].lower()
        if answer not in _YES | _NO:
            raise InvalidArgument(
                f"expected true or false, got {answer[:40]!r}", field="options.encrypted"
            )
        found["encrypted"] = "true"
        if answer in _NO:
            del found["encrypted"]
    if "key-file" in found:
        if "encrypted" not in found:
            raise InvalidArgument("is for encrypted volumes", field="options.key-file")
        if not os.path.isabs(found["key-file"]):
            raise InvalidArgument(
                f"must be an absolute path, got {found['key-file']!r}", field="options.key-file"
            )
    if "pool" in found:
        check_name(found["pool"], field="options.pool")
    if "size" in found:
        check_size(parse_bytes(found["size"], field="options.size"), field="options.size")


def _check_disk(found: Mapping[str, str]) -> None:
    if "size" not in found:
        raise InvalidArgument("a disk needs one", field="options.size", hint="add size=10G")
    if others := sorted(found.keys() - {"type", "size", "pool"}):
        raise InvalidArgument(
            f"does not go with type=disk, which has size and pool: {others[0]}", field="options"
        )


def _check_foreign(options: Mapping[str, str]) -> None:
    kind = options.get("type", "")
    if kind == "tmpfs":
        return
    if not options.get("device"):
        raise InvalidArgument("device is missing", field="options")
    if kind in ("nfs", "nfs4", "cifs"):
        raise Unsupported(
            f"volume type {kind!r}: network file systems are not mounted by this version",
            hint="mount it on the host and use type=none, o=bind, device=PATH",
        )
    if is_bind(options) and not os.path.isabs(options["device"]):
        raise InvalidArgument(
            f"device must be an absolute path, got {options['device']!r}", field="options"
        )


def is_foreign(options: Mapping[str, str]) -> bool:
    """Tell whether a volume is something of the host's that is mounted: not ours to keep."""
    return bool(options.keys() & _FOREIGN) and not is_disk(options)


def is_disk(options: Mapping[str, str]) -> bool:
    """Tell whether a volume is a disk, which a virtual machine has to itself."""
    return options.get("type") == "disk"


def is_bind(options: Mapping[str, str]) -> bool:
    """Tell whether a volume is another directory of the host, and no mount of its own."""
    flags = options.get("o", "").split(",")
    return "bind" in flags or "rbind" in flags or options.get("type") in ("none", "bind")


def size_of(options: Mapping[str, str]) -> int:
    """Return a volume's size in bytes, 0 for one that has none."""
    if "size" not in options:
        return 0
    return check_size(parse_bytes(options["size"], field="options.size"))


def home_of(name: str, record: VolumeRecord, base: str, pool: PoolRecord | None) -> Home:
    """Return where a volume lies that is nothing foreign. `base` is the directory that holds
    `volumes`: the root's, or its pool's."""
    size = size_of(record.options)
    encrypted = "encrypted" in record.options
    disk = is_disk(record.options)
    form = Form.FILE if disk else _form(pool, size, image=encrypted)
    return Home(
        name=name,
        directory=f"{base}/volumes/{name}",
        form=form,
        size=size or (DEFAULT_SIZE if form == Form.IMAGE else 0),
        project=record.project,
        # In a pool of a size others would take what this one was promised.
        reserved=form == Form.FILE and pool is not None and bool(pool.size),
        encrypted=encrypted,
        disk=disk,
    )


def _form(pool: PoolRecord | None, size: int, *, image: bool) -> Form:
    if image or (pool is not None and pool.kind == "qcow2"):
        return Form.IMAGE
    if pool is not None and pool.kind == "btrfs":
        return Form.SUBVOLUME
    if not size:
        return Form.TREE
    return Form.PROJECT if pool is not None and pool.quotas else Form.FILE
