"""`vm run` and `vm disk …`: machines that start from a disk of their own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from hutch.cli.command import Command
from hutch.cli.keys import KEY_OPTION, KEY_VALUE, key_source
from hutch.cli.options import UsageError
from hutch.cli.output import print_json
from hutch.cli.progress import pull_progress
from hutch.cli.run import run_attached, run_detached
from hutch.cli.run_options import RESOURCES
from hutch.cli.session import Invocation
from hutch.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from hutch.storage.diskimages import DiskImage
    from hutch.storage.diskkeys import DiskKey

__all__ = ["COMMANDS"]

_RENAMED = {
    "annotation": "annotations",
    "attach_disk": "disks",
    "cdrom": "cdroms",
    "cloud_init": "user_data",
    "disk": "size",
    "device": "devices",
    "label": "labels",
    "log_opt": "log_opts",
    "network_alias": "network_aliases",
    "rm": "remove",
    "ssh_key": "ssh_keys",
}
_OURS = frozenset(("detach", "detach_keys", "dry_run", "quiet", "sig_proxy"))
_CONSOLE_KEYS = "ctrl-]"


def _run(invocation: Invocation) -> int:
    values = invocation.options
    options = {_RENAMED.get(key, key): value for key, value in values.items() if key not in _OURS}
    if "cloud_init" in values and "user_data" in values:
        raise UsageError("--cloud-init and --user-data are the same: give one")
    if "disk_key" in options:
        options["disk_key"] = key_source(options["disk_key"], option="--disk-key", new=True)
    if "ssh_keys" in options:
        options["ssh_keys"] = [_key(entry) for entry in options["ssh_keys"]]
    disk = invocation.arguments[0] if invocation.arguments else None
    with pull_progress(quiet=invocation.flag("quiet")) as progress:
        instance = invocation.engine.machines.create(disk, progress=progress, **options)
    if values.get("detach"):
        return run_detached(invocation, instance)
    console = {"detach_keys": _CONSOLE_KEYS, **values, "tty": True, "interactive": os.isatty(0)}
    return run_attached(instance, console)


def _key(entry: str) -> str:
    """Return a public key, which may be named by its file."""
    if " " in entry.strip():
        return entry.strip()
    try:
        with open(os.path.expanduser(entry), encoding="utf-8") as file:
            return file.read(1 << 16).strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"--ssh-key: {entry}: cannot be read: {exc}") from exc


# ---- disks ------------------------------------------------------------------------------


def _show(invocation: Invocation, image: DiskImage) -> int:
    if invocation.json:
        print_json(image)
        return 0
    print(f"{image.path}: {image.format}, {format_bytes(image.size)}, ", end="")
    print(f"takes {format_bytes(image.allocated)}{', encrypted' if image.encrypted else ''}")
    for reference in image.references:
        print(f"  needs {reference}")
    return 0


def _disk_create(invocation: Invocation) -> int:
    from hutch.storage.diskimages import create_disk, format_of

    path, size = invocation.arguments
    format = invocation.options.get("format") or format_of(path, otherwise="qcow2")
    key = _disk_key(invocation, "key", new=True)
    made = create_disk(path, parse_bytes(size, field="size"), format=format, key=key)
    return _show(invocation, made)


def _disk_key(invocation: Invocation, option: str, *, new: bool = False) -> DiskKey | None:
    from hutch.storage.diskkeys import DiskKey, read_key

    given = invocation.options.get(option)
    if given is None:
        return None
    found = key_source(given, option=f"--{option.replace('_', '-')}", new=new)
    return read_key(found, field=option) if isinstance(found, str) else DiskKey(found, field=option)


def _disk_info(invocation: Invocation) -> int:
    from hutch.storage.diskimages import disk_info

    (path,) = invocation.arguments
    return _show(invocation, disk_info(path, format=invocation.options.get("format")))


def _disk_convert(invocation: Invocation) -> int:
    from hutch.storage.diskimages import convert_disk, disk_info, format_of, require_whole

    source, target = invocation.arguments
    values = invocation.options
    image = require_whole(disk_info(source, format=values.get("from")), field="source")
    given: Any = image.format
    with pull_progress(quiet=invocation.flag("quiet")) as progress:
        made = convert_disk(
            source,
            target,
            source_format=given,
            format=values.get("format") or format_of(target),
            compress=invocation.flag("compress"),
            key=_disk_key(invocation, "new_key", new=True),
            source_key=_disk_key(invocation, "key"),
            progress=progress,
        )
    return _show(invocation, made)


def _disk_resize(invocation: Invocation) -> int:
    from hutch.storage.diskimages import disk_info, require_whole, resize_disk

    path, size = invocation.arguments
    found: Any = invocation.options.get("format")
    if found is None:
        found = require_whole(disk_info(path), field="disk").format
    key = _disk_key(invocation, "key")
    resized = resize_disk(path, parse_bytes(size, field="size"), format=found, key=key)
    return _show(invocation, resized)


_FORMATS = "raw, qcow2, luks, vmdk, vhdx, vpc or vdi"
_FORMAT = ("format", "", "text", "FORMAT", _FORMATS)
_KEY = ("key", "", "text", KEY_VALUE, "Its key: FILE, fd:N, env:NAME or prompt")

COMMANDS = {
    "vm run": Command(
        handler=_run,
        summary="Start a virtual machine from a disk with its own kernel and init.",
        arguments="[DISK]",
        high=1,
        options=(
            *RESOURCES,
            ("accel", "", "text", "NAME", "auto, kvm or tcg"),
            ("annotation", "", "list", "KEY=VALUE", "Add an annotation"),
            (
                "attach-disk",
                "",
                "list",
                "FILE[:ro][,key=FILE]",
                "A further disk, written to unless :ro",
            ),
            ("cdrom", "", "list", "ISO", "A CD; started from while the disk is empty"),
            ("cloud-init", "", "text", "FILE", "User data for cloud-init"),
            ("cpu-model", "", "text", "MODEL", "CPU model, such as max or EPYC"),
            ("cpu-pin", "", "flag", "", "Keep each of its CPUs to one of the host's"),
            ("cpu-topology", "", "text", "SPEC", "Its CPUs: sockets=1,cores=2,threads=2"),
            ("cpus-max", "", "int", "NUMBER", "CPUs that `update` may give it while it runs"),
            ("detach", "d", "flag", "", "Leave it running in the background"),
            ("detach-keys", "", "text", "KEYS", f"Keys that leave it running ({_CONSOLE_KEYS})"),
            ("device", "", "list", "DEVICE", "A PCI device of the host: vfio=ADDRESS, or by CDI"),
            ("disk", "", "text", "SIZE", "Size of its disk, at least that of DISK"),
            KEY_OPTION,
            ("dns", "", "list", "IP", "Name server (by cloud-init)"),
            ("dns-search", "", "list", "DOMAIN", "Search domain (by cloud-init)"),
            ("format", "", "text", "FORMAT", "What DISK is: raw, qcow2, vmdk or vhdx"),
            ("hostname", "h", "text", "NAME", "Host name (by cloud-init)"),
            ("ip", "", "text", "ADDRESS", "IPv4 address on the first network"),
            ("ip6", "", "text", "ADDRESS", "IPv6 address on the first network"),
            ("label", "l", "list", "KEY=VALUE", "Set a label"),
            ("log-driver", "", "text", "NAME", "local or none"),
            ("log-opt", "", "list", "KEY=VALUE", "max-size=… and max-file=…"),
            ("mac-address", "", "text", "ADDRESS", "MAC address on the first network"),
            ("memory-lock", "", "flag", "", "Keep its memory from being swapped out"),
            ("memory-max", "", "text", "SIZE", "Memory that `update` may give it while it runs"),
            ("name", "", "text", "NAME", "Name of the instance"),
            ("network", "", "list", "NETWORK", "bridge, none, user or a network"),
            ("network-alias", "", "list", "NAME", "Further name on the first network"),
            ("numa", "", "list", "SPEC", "A node: cpus=0-1,memory=512M[,host=0]"),
            ("publish", "p", "list", "PORTS", "Publish: [[IP:]HOST:]PORT[/udp]"),
            ("quiet", "q", "flag", "", "Show no progress"),
            ("rm", "", "flag", "", "Remove it with its disk when it has ended"),
            ("sig-proxy", "", "flag", "", "Let signals to hutch press the power button (true)"),
            ("ssh-key", "", "list", "KEY", "Public key, or its file, for cloud-init's user"),
            ("stop-timeout", "", "int", "SECONDS", "Time from power button to the end (30)"),
            ("tpm", "", "flag", "", "A TPM 2.0, kept with the machine"),
            ("uefi", "", "flag", "", "Start by UEFI instead of BIOS"),
            ("user-data", "", "text", "FILE", "The same as --cloud-init"),
            ("vnc", "", "text", "WHERE", "A screen: unix, or 127.0.0.1:PORT"),
        ),
        epilog="DISK is never written to: what the machine writes goes to a disk of its own in "
        "the root. The serial console is what is attached to and logged. Such a machine has no "
        "agent: exec, cp and top are not possible.",
        examples=(
            "hutch vm run --rm debian-12-genericcloud-amd64.qcow2 --ssh-key ~/.ssh/id.pub",
            "hutch vm run -d --name db --memory 2G --disk 20G --cloud-init seed.yaml cloud.qcow2",
            "hutch vm run --uefi --cdrom installer.iso --disk 20G --vnc 127.0.0.1:5901",
        ),
    ),
    "vm disk create": Command(
        handler=_disk_create,
        summary="Make an empty disk image.",
        arguments="FILE SIZE",
        low=2,
        high=2,
        options=(
            (
                "format",
                "",
                "text",
                "FORMAT",
                f"{_FORMATS} (as its name ends; qcow2 where it has no ending)",
            ),
            _KEY,
        ),
        examples=(
            "hutch vm disk create data.qcow2 20G",
            "hutch vm disk create --key prompt secret.qcow2 20G",
        ),
    ),
    "vm disk info": Command(
        handler=_disk_info,
        summary="Say what a disk image is, how large, and what further files it needs.",
        arguments="FILE",
        low=1,
        high=1,
        options=(_FORMAT,),
        examples=("hutch vm disk info cloud.qcow2",),
    ),
    "vm disk convert": Command(
        handler=_disk_convert,
        summary="Copy a disk image into a new file of another format.",
        arguments="SOURCE TARGET",
        low=2,
        high=2,
        options=(
            ("compress", "c", "flag", "", "Compress a qcow2"),
            (
                "format",
                "",
                "text",
                "FORMAT",
                "Format of TARGET (as its name ends; raw where it has no ending)",
            ),
            ("from", "", "text", "FORMAT", "Format of SOURCE (as its content says)"),
            ("key", "", "text", KEY_VALUE, "Key of SOURCE: FILE, fd:N, env:NAME or prompt"),
            ("new-key", "", "text", KEY_VALUE, "Encrypt TARGET (LUKS), likewise"),
            ("quiet", "q", "flag", "", "Show no progress"),
        ),
        examples=("hutch vm disk convert appliance.vmdk appliance.qcow2",),
    ),
    "vm disk resize": Command(
        handler=_disk_resize,
        summary="Grow a disk image that no machine uses.",
        arguments="FILE SIZE",
        low=2,
        high=2,
        options=(_FORMAT, _KEY),
        epilog="Partitions and file systems on it stay as they are; cloud-init grows them.",
        examples=("hutch vm disk resize data.qcow2 40G",),
    ),
}
