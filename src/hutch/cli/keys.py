"""Keys on the command line: never the key itself, but where it is.

`FILE` (or `file:FILE`), `fd:N`, `env:NAME`, or `prompt` for whoever types it. Of these only a
file is remembered with an instance.
"""

from __future__ import annotations

import os
import sys

from hutch.cli.options import UsageError

__all__ = ["KEY_OPTION", "KEY_VALUE", "key_source"]

KEY_VALUE = "KEY"
KEY_OPTION = (
    *("disk-key", "", "text", KEY_VALUE),
    "Encrypt its disk (LUKS): FILE, fd:N, env:NAME or prompt",
)
_MAX = 4096


def key_source(text: str, *, option: str, new: bool = False) -> str | bytes:
    """Return the path of a key's file, or the key from elsewhere; a `new` one is asked twice."""
    kind, colon, rest = text.partition(":")
    if text == "prompt":
        return _ask(option, new)
    if colon and kind == "fd":
        return _from_descriptor(rest, option)
    if colon and kind == "env":
        value = os.environ.get(rest)
        if value is None:
            raise UsageError(f"{option}: {rest} is not set")
        return value.encode()
    return rest if colon and kind == "file" else text


def _from_descriptor(number: str, option: str) -> bytes:
    if not (number.isascii() and number.isdecimal()):
        raise UsageError(f"{option}: expected fd:N, got fd:{number}")
    data = b""
    try:
        while len(data) <= _MAX and (piece := os.read(int(number), _MAX)):
            data += piece
    except OSError as exc:
        raise UsageError(f"{option}: fd:{number}: {(exc.strerror or '').lower()}") from exc
    return data


def _ask(option: str, new: bool) -> bytes:
    from getpass import getpass

    if not sys.stdin.isatty():
        raise UsageError(f"{option}: there is no terminal to ask at", hint="use fd:0, or a file")
    key = getpass("Key of the disk: ")
    if new and getpass("Once more: ") != key:
        raise UsageError(f"{option}: the two are not the same")
    return key.encode()
