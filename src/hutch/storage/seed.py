"""The disk from which cloud-init takes its data: NoCloud, an ISO 9660 volume named CIDATA.

See https://cloudinit.readthedocs.io/en/latest/reference/datasources/nocloud.html. The
volume holds `meta-data`, `user-data`, `vendor-data` and `network-config` (version 2).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any

import msgspec

from hutch.errors import InvalidArgument, Unavailable, Unsupported
from hutch.storage.faults import disk_errors

__all__ = ["Card", "check_user_data", "make_seed", "network_config", "user_data_for"]

MAX_USER_DATA = 1 << 20
# Three names of one command line; what Debian has is first.
_PROGRAMS = ("genisoimage", "xorrisofs", "mkisofs")
_TIMEOUT_S = 60.0
_ENV = {"LC_ALL": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
# Addresses may change from start to start; cloud-init sets them up once unless told otherwise.
_VENDOR_DATA = b"#cloud-config\nupdates:\n  network:\n    when: [boot-new-instance, boot]\n"
# What user data may begin with; see the page on its formats.
_HEADS = (
    *("#cloud-config", "#!", "#include", "#cloud-boothook", "#part-handler", "## template:"),
    *("Content-Type:", "MIME-Version:", "From "),
)


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """What a network card is told: addresses as ADDRESS/PREFIX, gateways, name servers."""

    mac: str
    addresses: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()
    nameservers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    mtu: int = 0
    dhcp: bool = False


def check_user_data(data: bytes, field: str = "user_data") -> bytes:
    """Return user data that cloud-init would take, or raise `InvalidArgument`."""
    if len(data) > MAX_USER_DATA:
        raise InvalidArgument(f"at most {MAX_USER_DATA} bytes, got {len(data)}", field=field)
    # What is compressed it unpacks, and looks then.
    if data[:2] != b"\x1f\x8b" and not data.decode("utf-8", "replace").startswith(_HEADS):
        raise InvalidArgument(
            "does not begin as cloud-init expects it",
            field=field,
            hint="begin the file with #cloud-config, or with #! for a script",
        )
    return data


def user_data_for(keys: Sequence[str]) -> bytes:
    """Return user data that lets the default user in by these SSH keys."""
    for index, key in enumerate(keys):
        if len(key.split()) < 2 or "\n" in key or not key.isprintable():
            raise InvalidArgument("expected one public key, TYPE BASE64", field=f"ssh_key[{index}]")
    return b"#cloud-config\n" + msgspec.json.encode({"ssh_authorized_keys": list(keys)}) + b"\n"


def network_config(cards: Sequence[Card]) -> bytes:
    """Return the network configuration, version 2; JSON is YAML."""
    ethernets: dict[str, Any] = {}
    for index, card in enumerate(cards):
        entry: dict[str, Any] = {"match": {"macaddress": card.mac}, "set-name": f"eth{index}"}
        if card.dhcp:
            entry["dhcp4"] = True
        else:
            entry["addresses"] = list(card.addresses)
            entry["routes"] = [{"to": _default(g), "via": g} for g in card.gateways]
        if card.nameservers:
            entry["nameservers"] = {
                "addresses": list(card.nameservers),
                "search": list(card.search),
            }
        if card.mtu:
            entry["mtu"] = card.mtu
        ethernets[f"eth{index}"] = entry
    return msgspec.json.encode({"version": 2, "ethernets": ethernets}) + b"\n"


def _default(gateway: str) -> str:
    # `default` would do for cloud-init since 22.x; this is understood by all.
    return "::/0" if ":" in gateway else "0.0.0.0/0"


def make_seed(
    path: str, *, instance: str, hostname: str, user_data: bytes, cards: Sequence[Card]
) -> None:
    """Write the volume to `path`, replaced whole.

    `instance` tells cloud-init whether this machine is a new one.
    """
    meta: dict[str, Any] = {"instance-id": instance}
    if hostname:
        meta["local-hostname"] = hostname
    files = {
        "meta-data": msgspec.json.encode(meta) + b"\n",
        "user-data": user_data,
        "vendor-data": _VENDOR_DATA,
        "network-config": network_config(cards),
    }
    directory = os.path.dirname(path)
    with disk_errors(f"seed {path}"), tempfile.TemporaryDirectory(dir=directory) as work:
        os.mkdir(f"{work}/files")
        for name, content in files.items():
            with open(f"{work}/files/{name}", "xb") as file:
                file.write(content)
        _write_volume(f"{work}/seed.iso", f"{work}/files")
        os.chmod(f"{work}/seed.iso", 0o600)
        os.replace(f"{work}/seed.iso", path)


def _write_volume(path: str, directory: str) -> None:
    from hutch.host.programs import find_program
    from hutch.process.run import run_command

    program = next((found for name in _PROGRAMS if (found := find_program(name))), None)
    if program is None:
        raise Unsupported(
            "cloud_init: no program that writes ISO images is installed",
            hint="apt-get install genisoimage",
        )
    # Joliet and Rock Ridge: plain ISO 9660 has no such names.
    done = run_command(
        [program, "-quiet", "-volid", "CIDATA", "-joliet", "-rock", "-output", path, directory],
        env=_ENV,
        timeout_s=_TIMEOUT_S,
    )
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["failed"]
        raise Unavailable(f"seed {path}: {os.path.basename(program)}: {reason[0]}")
