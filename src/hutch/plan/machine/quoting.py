"""Write options the way QEMU reads them: `kind,key=value,…`, a comma within doubled."""

from __future__ import annotations

import re

from hutch.errors import InvalidArgument
from hutch.plan.machine.model import Descriptor

__all__ = ["endpoint", "options", "path_of", "plain"]

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def options(*heads: str, **values: str | int | bool | None) -> str:
    """Return one option's text. Underscores in keys stand for dashes; None is left out.

    A key that QEMU itself writes with an underscore is a head: `max_ports=4`.
    """
    parts = [_quoted(head) for head in heads]
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool):
            value = "on" if value else "off"
        parts.append(f"{key.rstrip('_').replace('_', '-')}={_quoted(str(value))}")
    return ",".join(parts)


def _quoted(text: str) -> str:
    return plain(text, field="machine").replace(",", ",,")


def plain(text: str, *, field: str) -> str:
    """Return text that can be an argument: no NUL, no line ends."""
    if not text.isprintable() and _CONTROL.search(text):
        raise InvalidArgument(f"has a control character: {text!r}", field=field)
    return text


def path_of(file: str | Descriptor) -> str:
    """Return the name by which QEMU opens a file; a descriptor is in the set of its number."""
    return file if isinstance(file, str) else f"/dev/fdset/{file.fd}"


def endpoint(socket: str | Descriptor) -> dict[str, str | int | bool | None]:
    """Return the keys of a character device that say which socket it is connected to."""
    return {"path": socket} if isinstance(socket, str) else {"fd": socket.fd}
