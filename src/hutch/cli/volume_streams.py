"""Volumes in and out: backup, restore, export, import."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import IO, BinaryIO, cast

from hutch.cli.command import Command
from hutch.cli.networks import pairs
from hutch.cli.options import UsageError
from hutch.cli.output import is_tty, show_result
from hutch.cli.session import Invocation
from hutch.cli.volumes import VOLUME_KEY, volume_key

__all__ = ["COMMANDS"]

_OUTPUT = ("output", "o", "text", "FILE", "Write to this file; `-` is stdout (default)")


def _write(invocation: Invocation, act: Callable[[str, str | IO[bytes]], None]) -> int:
    name = invocation.arguments[0]
    target = invocation.options.get("output", "-")
    if target != "-":
        act(name, target)
        return show_result(invocation, "", Name=name, File=target)
    if is_tty(1):
        raise UsageError(
            "the archive will not be written to a terminal",
            hint="use -o FILE, or redirect stdout",
            exit_code=1,
        )
    act(name, sys.stdout.buffer)
    sys.stdout.buffer.flush()
    return 0


def _source(text: str) -> str | BinaryIO:
    if text != "-":
        return text
    if is_tty(0):
        raise UsageError("stdin is a terminal", hint="name a file", exit_code=1)
    return cast("BinaryIO", sys.stdin.buffer)


def _backup(invocation: Invocation) -> int:
    return _write(invocation, invocation.engine.volumes.backup)


def _export(invocation: Invocation) -> int:
    return _write(invocation, invocation.engine.volumes.export)


def _restore(invocation: Invocation) -> int:
    values = invocation.options
    name = invocation.arguments[0] if invocation.arguments else ""
    plain = invocation.flag("plain")
    key = volume_key(invocation, new=True)
    if plain and key is not None:
        raise UsageError("--plain: a volume that is not encrypted has no key")
    volume = invocation.engine.volumes.restore(
        _source(values.get("input", "-")),
        name,
        pool=values.get("pool", ""),
        size=values.get("size", 0),
        encrypted=False if plain else None,
        key=key,
        labels=pairs(values["label"], "label") if "label" in values else None,
    )
    return show_result(invocation, volume.name, Name=volume.name)


def _import(invocation: Invocation) -> int:
    name, source = invocation.arguments
    invocation.engine.volumes.import_(name, _source(source))
    return show_result(invocation, "", Name=name)


COMMANDS = {
    "volume backup": Command(
        handler=_backup,
        summary="Write a volume with what it is and a digest to a file.",
        arguments="VOLUME",
        low=1,
        high=1,
        options=(_OUTPUT,),
        epilog="Who writes to the volume waits meanwhile: its file system is frozen or a "
        "snapshot is read where there is one, else the instances that use it are paused. "
        "The backup of an encrypted volume is not encrypted.",
        examples=(
            "hutch volume backup -o data.tar data",
            "hutch volume backup data | zstd > data.tar.zst",
        ),
    ),
    "volume restore": Command(
        handler=_restore,
        summary="Create a volume from a backup; print its name.",
        arguments="[VOLUME]",
        high=1,
        options=(
            ("input", "i", "text", "FILE", "Read this file, compressed or not; `-` is stdin"),
            VOLUME_KEY,
            ("label", "", "list", "KEY=VALUE", "Set a label, in place of those it had"),
            ("plain", "", "flag", "", "Do not encrypt it, even if it was"),
            ("pool", "", "text", "POOL", "The storage pool to keep it in"),
            ("size", "", "text", "SIZE", "Its size, in place of the one it had"),
        ),
        epilog="It appears when all of it is there and matches its digest.",
        examples=(
            "hutch volume restore -i data.tar",
            "hutch volume restore -i data.tar.zst --pool fast data2",
        ),
    ),
    "volume export": Command(
        handler=_export,
        summary="Write a volume's files as a tar archive.",
        arguments="VOLUME",
        low=1,
        high=1,
        options=(_OUTPUT,),
        examples=("hutch volume export data -o data.tar",),
    ),
    "volume import": Command(
        handler=_import,
        summary="Put a tar archive's files into a volume that exists.",
        arguments="VOLUME FILE",
        low=2,
        high=2,
        epilog="FILE may be compressed, and `-` is stdin. What has the same name is replaced.",
        examples=("hutch volume import data data.tar", "tar c . | hutch volume import data -"),
    ),
}
