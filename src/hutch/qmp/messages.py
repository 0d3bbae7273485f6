"""The messages of QMP: lines of JSON, decoded and bounded (QEMU's docs/interop/qmp-spec).

QEMU is trusted no more than its guest, which may have taken it over: a line that is too
long, nested too deeply or of no known shape raises `BadMessage`, and text from it is cut
before it gets into an error.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from hutch.decoding import decode_json
from hutch.plan.machine.version import QemuVersion

__all__ = [
    "ANSWER_MAX",
    "EVENT_MAX",
    "Answer",
    "BadMessage",
    "Event",
    "Failure",
    "Greeting",
    "decode_answer",
    "decode_greeting",
    "decode_message",
    "encode_command",
]

ANSWER_MAX = 4 << 20
"""Bytes of one answer. The largest by far, `query-qmp-schema`, has 210 kB in QEMU 7.2."""
EVENT_MAX = 16 << 10
_TEXT_MAX = 2000

T = TypeVar("T")


class BadMessage(ValueError):
    """A line that QEMU would not have sent."""


class _Number(msgspec.Struct, frozen=True):
    major: int
    minor: int
    micro: int


class _Version(msgspec.Struct, frozen=True):
    qemu: _Number
    package: str = ""


class _Hello(msgspec.Struct, frozen=True):
    version: _Version
    capabilities: list[str]


class _GreetingLine(msgspec.Struct, frozen=True):
    hello: _Hello = msgspec.field(name="QMP")


class Greeting(msgspec.Struct, frozen=True, kw_only=True):
    """What QEMU says first: its version, and what the protocol can do (`oob`)."""

    version: QemuVersion
    capabilities: tuple[str, ...]


class _Timestamp(msgspec.Struct, frozen=True):
    seconds: int
    microseconds: int = 0


class _ErrorBody(msgspec.Struct, frozen=True):
    kind: str = msgspec.field(name="class")
    description: str = msgspec.field(name="desc")


class _Line(msgspec.Struct, frozen=True):
    """Any line after the greeting; which fields are there says what it is."""

    event: str | None = None
    data: msgspec.Raw = msgspec.Raw()
    timestamp: _Timestamp | None = None
    answer: msgspec.Raw = msgspec.field(name="return", default=msgspec.Raw())
    error: _ErrorBody | None = None
    id: int | None = None


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened: its name, its data, and QEMU's clock (seconds since 1970)."""

    name: str
    data: dict[str, Any] = {}
    time: float = 0.0


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A command's answer as JSON text that is not decoded yet."""

    id: int | None
    body: bytes


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A command's refusal. Without `id` QEMU could not read what it was sent."""

    id: int | None
    kind: str
    description: str


def _decode(line: bytes, kind: type[T]) -> T:
    try:
        return decode_json(line, kind)
    except msgspec.DecodeError as exc:
        raise BadMessage(f"{str(exc)[:200]} in {line[:80]!r}") from exc


def decode_greeting(line: bytes) -> Greeting:
    """Return QEMU's first line; raise `BadMessage` for anything else."""
    hello = _decode(line, _GreetingLine).hello
    number = hello.version.qemu
    return Greeting(
        version=QemuVersion(number.major, number.minor, number.micro),
        capabilities=tuple(hello.capabilities),
    )


def decode_message(line: bytes) -> Event | Answer | Failure:
    """Return one line after the greeting; raise `BadMessage` for what is none of the three."""
    message = _decode(line, _Line)
    kinds = (message.event is not None, bytes(message.answer) != b"", message.error is not None)
    if sum(kinds) != 1:
        raise BadMessage(f"not an event, an answer or an error: {line[:80]!r}")
    if message.event is not None:
        return _event(line, message)
    if message.error is not None:
        return Failure(
            id=message.id,
            kind=message.error.kind[:_TEXT_MAX],
            description=message.error.description[:_TEXT_MAX],
        )
    return Answer(id=message.id, body=bytes(message.answer))


def _event(line: bytes, message: _Line) -> Event:
    if len(line) > EVENT_MAX:
        raise BadMessage(f"an event of {len(line)} bytes: {line[:80]!r}")
    stamp = message.timestamp or _Timestamp(0)
    # A hostile QEMU may send numbers that no float holds.
    seconds = min(max(stamp.seconds, -1), 1 << 40)
    body = bytes(message.data)
    data = _decode(body, dict[str, Any]) if body else {}
    return Event(
        name=message.event or "", data=data, time=seconds + stamp.microseconds % 10**6 / 1e6
    )


def decode_answer(answer: Answer, kind: type[T]) -> T:
    """Return an answer's body as `kind`; raise `BadMessage` where it is of another shape."""
    return _decode(answer.body, kind)


def encode_command(name: str, arguments: dict[str, Any] | None, id: int) -> bytes:
    """Return one command as QEMU reads it."""
    command: dict[str, Any] = {"execute": name, "id": id}
    if arguments:
        command["arguments"] = arguments
    return msgspec.json.encode(command) + b"\r\n"
