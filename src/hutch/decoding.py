"""Decode JSON into msgspec types, from any thread; encode what users gave.

msgspec 0.22 works out a type's fields when it is first decoded, and two threads that do so
at once crash the interpreter (seen as a segmentation fault in `get_class_annotations`), as
does an exception out of a signal handler. So each type's decoder is made once, under a lock
and with signals held back; using it afterwards needs neither.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec

from hutch.errors import InvalidArgument

__all__ = ["decode_json", "encode_json", "prepare"]

T = TypeVar("T")

_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}
_lock = threading.Lock()


def prepare(kind: Any) -> msgspec.json.Decoder[Any]:
    """Return the decoder of a type, made on first use."""
    decoder = _decoders.get(kind)
    if decoder is None:
        with _lock, _signals_held_back():
            decoder = _decoders.get(kind)
            if decoder is None:
                decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    return decoder


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Let handlers written in Python, that of Ctrl-C above all, run only afterwards.

    They run in the main thread, whichever the kernel chose, so a mask of signals would not
    do where there are others. The handlers themselves are exchanged for one that takes note.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        handler = signal.getsignal(number)
        if callable(handler):
            handlers[number] = handler
            signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for pending in came:
            signal.raise_signal(pending)


def decode_json(data: bytes | str, kind: type[T]) -> T:
    """Return `data` as `kind`; raise `msgspec.DecodeError` for whatever is wrong with it.

    Not so `msgspec.json.decode`: text that is no UTF-8 and what is nested too deeply have
    exceptions of their own there.
    """
    try:
        found: T = prepare(kind).decode(data)
    except UnicodeDecodeError as exc:
        raise msgspec.DecodeError(f"not UTF-8 text: {exc.reason}") from exc
    except RecursionError as exc:
        raise msgspec.DecodeError("nested too deeply") from exc
    return found


def encode_json(value: Any) -> bytes:
    """Return `value` as JSON; raise `InvalidArgument` naming the field whose text is no Unicode.

    Arguments and file names of Linux are bytes; Python hands on those that are not UTF-8 as
    lone surrogates, which JSON cannot hold.
    """
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        field = _not_unicode(value, "")
        raise InvalidArgument("is not UTF-8 text", field=field.removeprefix(".")) from None


def _not_unicode(value: Any, path: str) -> str:
    """Return where in a value the first text is that cannot be encoded, "" for nowhere."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return path
        return ""
    members: list[tuple[str, Any]] = []
    if isinstance(value, msgspec.Struct):
        members = [(f".{name}", getattr(value, name)) for name in value.__struct_fields__]
    elif isinstance(value, dict):
        for key in value:
            if found := _not_unicode(key, path):
                return found
        members = [(f".{key}", member) for key, member in value.items()]
    elif isinstance(value, list | tuple):
        members = [(f"[{i}]", member) for i, member in enumerate(value)]
    return next((found for name, m in members if (found := _not_unicode(m, path + name))), "")
