"""Machines that start from a disk of one's own, with its kernel and init: made and started."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, cast

import msgspec

from hutch.engine.context import Context
from hutch.engine.create import check_references, insert_record, new_directory
from hutch.engine.disk_keys import disk_key, take_key
from hutch.engine.finish import dispose, refresh
from hutch.engine.instance import Instance
from hutch.engine.lookup import find_id, load
from hutch.engine.records import InstanceRecord
from hutch.engine.reserve import reserve_at_create
from hutch.errors import InvalidArgument, NotFound, Unsupported, WrongState
from hutch.ids import new_instance_id
from hutch.lifecycle import State
from hutch.records import Progress, silent
from hutch.spec.build import build, check_name
from hutch.spec.defaults import ImageDefaults
from hutch.spec.limits import RESOURCE_OPTIONS
from hutch.spec.model import AttachedDisk, FromDisk, InstanceSpec, MachineOptions
from hutch.storage.diskimages import (
    DiskFormat,
    DiskImage,
    convert_disk,
    create_disk,
    disk_info,
    import_disk,
    require_whole,
    resize_disk,
    stamp_of,
)
from hutch.storage.diskkeys import DiskKey, read_key
from hutch.storage.disks import check_size
from hutch.storage.faults import disk_errors
from hutch.storage.seed import MAX_USER_DATA, check_user_data, user_data_for
from hutch.storage.snapshots import QCOW2_FILE
from hutch.units import parse_bytes

__all__ = ["Machines"]

# What a guest's init takes to end by the power button is not what one program takes.
_STOP_S = 30.0
# Of the options of `run`, those that mean something to a machine as a whole.
_OPTIONS = RESOURCE_OPTIONS | frozenset(
    """accel annotations cpu_model cpu_pin cpu_topology cpus_max devices disk_key dns dns_search
    hostname ip ip6 labels log_driver log_opts mac_address machine memory_lock memory_max
    name network network_aliases numa publish remove restart stop_timeout tpm""".split()
)


class Machines:
    """Machines without an image, of one root."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def create(
        self,
        disk: str | Path | None = None,
        *,
        format: DiskFormat | None = None,
        size: int | str | None = None,
        uefi: bool = False,
        cdroms: Sequence[str | Path] = (),
        disks: Sequence[str | Path] = (),
        user_data: bytes | str | Path | None = None,
        ssh_keys: Sequence[str] = (),
        vnc: str | None = None,
        progress: Progress = silent,
        **options: Any,
    ) -> Instance:
        """Create a machine that starts from `disk` (qcow2, raw, vmdk or vhdx), which is never
        written to; without one, from a new disk of `size` and the first of `cdroms`.

        `format` says what `disk` is where its content must not decide. `disks` are attached
        as they are, and written to unless they end in `:ro`; `,key=FILE` after that names the key
        of an encrypted one. `user_data` (bytes, or the path
        of a file) and `ssh_keys` are for cloud-init. `vnc` is `unix` for a socket in the
        instance's run directory, or ADDRESS:PORT. Of the options of `Engine.run` those of
        the machine as a whole apply; `network="user"` is QEMU's own network.
        """
        given = {name: value for name, value in options.items() if value is not None}
        key = take_key(given)
        name = given.pop("name", None)
        checked = check_name(cast("str", name)) if name is not None else None
        source = _source(disk, format)
        if source is None and not cdroms:
            raise InvalidArgument("give a disk to start from, or a cdrom", field="disk")
        data = _user_data(user_data, ssh_keys)
        wish = FromDisk(
            firmware="uefi" if uefi else "bios",
            cdroms=tuple(_cdrom(path, index) for index, path in enumerate(cdroms)),
            disks=tuple(_attached(entry, index) for index, entry in enumerate(disks)),
            seed=data is not None,
            screen=_screen(vnc),
        )
        if source is not None and source.format in ("raw", "qcow2"):
            base = "qcow2" if source.format == "qcow2" else "raw"
            wish = msgspec.structs.replace(
                wish,
                path=source.path,
                format=base,
                stamp=stamp_of(source.path),
                encrypted=source.encrypted,
            )
        title = os.path.basename(source.path if source else wish.cdroms[0])
        spec = _spec(title, wish, given)
        grown = _grown(size, source)
        identifier = new_instance_id()
        if not spec.hostname:
            spec = msgspec.structs.replace(spec, hostname=identifier[:12])
        machine = msgspec.structs.replace(spec.machine, disk=grown)
        spec = msgspec.structs.replace(spec, machine=machine)
        self._context.machines.check(spec)
        spec = check_references(self._context, spec)
        if source is not None and source.encrypted and key is None:
            raise InvalidArgument("the disk is encrypted", field="disk_key", hint="give its key")
        with reserve_at_create(self._context, identifier, spec, checked or ""):
            record = self._make(identifier, spec, source, data, checked, key, progress)
        return Instance(self._context, record.id, record.name)

    def start(self, disk: str | Path | None = None, **options: Any) -> Instance:
        """Create a machine (see `create`) and start it. As a context manager it is removed
        at the end."""
        instance = self.create(disk, **options)
        try:
            instance.start()
        except BaseException:
            instance.remove(force=True, volumes=True)
            raise
        return instance

    def export_disk(
        self,
        name: str,
        target: str | Path,
        *,
        format: DiskFormat = "qcow2",
        compress: bool = False,
        plain: bool = False,
        progress: Progress = silent,
    ) -> DiskImage:
        """Write the disk of a stopped machine into a new file that stands by itself.

        That of an encrypted one has the same key, unless it is to be `plain`.
        """
        record = refresh(self._context, load(self._context, find_id(self._context, name)))
        if record.state not in (State.CREATED, State.EXITED):
            raise WrongState(f"instance {record.name} is {record.state}", hint="stop it first")
        if record.spec.machine.from_disk is None:
            raise Unsupported(
                f"instance {record.name}: is of an image, and has no disk that starts by itself",
                hint="leave out --disk for its files, or `hutch commit` it to an image",
            )
        key = disk_key(self._context, record)
        if key is not None and not plain and format not in ("qcow2", "luks"):
            raise InvalidArgument(
                f"a disk of format {format} is not encrypted",
                field="format",
                hint="export a qcow2, or ask for a plain disk",
            )
        return convert_disk(
            str(self._context.directory(record.id) / QCOW2_FILE),
            str(target),
            source_format="qcow2",
            format=format,
            compress=compress,
            key=None if plain else key,
            source_key=key,
            base_key=key if record.spec.machine.from_disk.encrypted else None,
            progress=progress,
        )

    def _make(
        self,
        identifier: str,
        spec: InstanceSpec,
        source: DiskImage | None,
        user_data: bytes | None,
        name: str | None,
        key: DiskKey | None,
        progress: Progress,
    ) -> InstanceRecord:
        """Make the machine's directory and what is in it, then its record."""
        context, directory = self._context, self._context.directory(identifier)
        what = f"instance {identifier[:12]}"
        with disk_errors(what), new_directory(context, identifier), ExitStack() as undo:
            undo.callback(dispose, context, identifier)
            os.mkdir(directory / "run", 0o700)
            _make_files(directory, spec.machine, source, user_data, key, progress)
            record = insert_record(
                context,
                InstanceRecord(
                    id=identifier,
                    name=name or "",
                    spec=spec,
                    image_id="",
                    image_name=spec.image,
                    created_ns=time.time_ns(),
                ),
            )
            undo.pop_all()
        if key is not None:
            context.disk_keys[identifier] = key
        return record


def _make_files(
    directory: Path,
    machine: MachineOptions,
    source: DiskImage | None,
    user_data: bytes | None,
    key: DiskKey | None,
    progress: Progress,
) -> None:
    from hutch.drivers.vm.fromdisk import USER_DATA_FILE, VARIABLES_FILE

    wish = machine.from_disk
    assert wish is not None
    target = str(directory / QCOW2_FILE)
    if wish.path or source is None:
        create_disk(target, machine.disk, base=wish.path, base_format=wish.format, key=key)
    else:
        # No machine runs on these formats as they are: it gets a copy.
        format = cast("DiskFormat", source.format)
        import_disk(
            source.path,
            target,
            source_format=format,
            format="qcow2",
            key=key,
            source_key=key if source.encrypted else None,
            progress=progress,
        )
        resize_disk(target, machine.disk, format="qcow2", key=key)
    if user_data is not None:
        path = directory / USER_DATA_FILE
        path.touch(0o600)
        path.write_bytes(user_data)
    if wish.firmware == "uefi":
        from hutch.host.firmware import find_uefi

        shutil.copyfile(find_uefi().variables, directory / VARIABLES_FILE)
        os.chmod(directory / VARIABLES_FILE, 0o600)


def _spec(title: str, wish: FromDisk, given: dict[str, Any]) -> InstanceSpec:
    """Return the specification: options checked as those of `run` are."""
    for name in given:
        if name not in _OPTIONS:
            raise InvalidArgument(
                "has no meaning for a machine that starts from a disk",
                field=name,
                hint="what runs in it is set up in it, by cloud-init for one",
            )
    given.setdefault("stop_timeout", _STOP_S)
    if given.get("network") in ("user", ["user"], ("user",)):
        del given["network"]
        wish = msgspec.structs.replace(wish, user_network=True)
    spec = build(title, ImageDefaults(), [wish.firmware], isolation="vm", **given)
    process = msgspec.structs.replace(spec.process, tty=True, stdin=True)
    machine = msgspec.structs.replace(spec.machine, from_disk=wish)
    return msgspec.structs.replace(spec, process=process, machine=machine)


def _source(disk: str | Path | None, format: DiskFormat | None) -> DiskImage | None:
    if disk is None:
        return None
    return require_whole(disk_info(str(disk), format=format), field="disk")


def _grown(size: int | str | None, source: DiskImage | None) -> int:
    """Return how large the machine sees its disk."""
    least = source.size if source else 0
    if size is None:
        if source is None:
            raise InvalidArgument("a new disk needs a size", field="size", hint="such as 20G")
        return least
    wanted = check_size(parse_bytes(size, field="size"), field="size")
    if wanted < least:
        raise InvalidArgument(f"the disk has {least} bytes already, got {wanted}", field="size")
    return wanted


def _cdrom(path: str | Path, index: int) -> str:
    full = os.path.abspath(path)
    if not os.path.isfile(full):
        raise NotFound(f"cdroms[{index}]: {full}: no such file")
    return full


def _attached(entry: str | Path, index: int) -> AttachedDisk:
    path, _, key_file = str(entry).partition(",key=")
    read_only = path.endswith(":ro")
    if read_only:
        path = path[:-3]
    image = require_whole(disk_info(path), field=f"disks[{index}]")
    if image.encrypted != bool(key_file):
        raise InvalidArgument(
            f"disk {image.path}: is {'' if image.encrypted else 'not '}encrypted",
            field=f"disks[{index}]",
            hint=f"{path},key=FILE" if image.encrypted else "leave out its key",
        )
    if key_file:
        key_file = os.path.abspath(key_file)
        read_key(key_file, field=f"disks[{index}]")
    if image.format not in ("raw", "qcow2", "luks"):
        raise InvalidArgument(
            f"disk {image.path}: a machine writes to raw and qcow2 only, got {image.format}",
            field=f"disks[{index}]",
            hint=f"hutch vm disk convert {image.path} DISK.qcow2",
        )
    format = cast("Literal['raw', 'qcow2', 'luks']", image.format)
    return AttachedDisk(path=image.path, format=format, read_only=read_only, key_file=key_file)


def _screen(vnc: str | None) -> str:
    if not vnc or vnc == "unix":
        return vnc or ""
    address, _, port = vnc.rpartition(":")
    if not address or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidArgument(
            f"expected unix or ADDRESS:PORT, got {vnc!r}", field="vnc", hint="127.0.0.1:5901"
        )
    return vnc


def _user_data(data: bytes | str | Path | None, keys: Sequence[str]) -> bytes | None:
    if data is None:
        return user_data_for(keys) if keys else None
    if keys:
        raise InvalidArgument(
            "goes without user data", field="ssh_keys", hint="name the keys in the user data"
        )
    return check_user_data(data if isinstance(data, bytes) else _read(data))


def _read(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(MAX_USER_DATA + 1)
    except OSError as exc:
        reason = (exc.strerror or str(exc)).lower()
        raise InvalidArgument(f"{path}: {reason}", field="user_data") from exc
