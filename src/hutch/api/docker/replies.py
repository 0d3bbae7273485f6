"""What a handler returns: a reply in one piece, or a stream that is sent as it is made."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec

__all__ = ["Answer", "Reply", "Stream", "empty", "json_lines", "json_reply", "text_reply"]


class Reply(msgspec.Struct, frozen=True):
    """A whole answer."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    headers: Mapping[str, str] = {}


class Stream(msgspec.Struct, frozen=True):
    """An answer sent in chunks: its head at once, then what the iterator yields. With
    `tells_errors` an error that comes later is sent as Docker's progress streams have it."""

    chunks: AsyncIterator[bytes]
    content_type: str = "application/octet-stream"
    status: int = 200
    headers: Mapping[str, str] = {}
    tells_errors: bool = False


# None where the connection was taken over.
Answer = Reply | Stream | None


def _plain(value: Any) -> Any:
    """Encode what JSON has not: bytes as text, as Go does with what is no UTF-8."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    raise NotImplementedError(f"cannot be put into JSON: {type(value).__name__}")


def encode(value: Any) -> bytes:
    """Return a value as JSON. Names of files that are no UTF-8 are shown with replacements."""
    try:
        return msgspec.json.encode(value, enc_hook=_plain)
    except UnicodeEncodeError:
        return msgspec.json.encode(_replaced(msgspec.to_builtins(value)))


def _replaced(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if isinstance(value, dict):
        return {_replaced(k): _replaced(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(v) for v in value]
    return value


def json_reply(value: Any, status: int = 200, **headers: str) -> Reply:
    """Return a value as JSON, with the newline that Docker's encoder ends with."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Reply(status, encode(value) + b"\n", headers=named)


def text_reply(text: str, status: int = 200, **headers: str) -> Reply:
    """Return plain text."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, text.encode(), "text/plain; charset=utf-8", named)


def empty(status: int = 204) -> Reply:
    """Return an answer without a body."""
    return Reply(status)


async def json_lines(values: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    """Yield each value as a line of JSON; CR LF ends it, as in Docker's streams."""
    async for value in values:
        yield encode(value) + b"\r\n"
