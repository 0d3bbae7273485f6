"""Speak netlink: messages and attributes as bytes, and a socket that sends and checks them.

What the messages of NETLINK_ROUTE mean is in `hutch.linux.rtnetlink`. See netlink(7) and
linux/netlink.h.
"""

from __future__ import annotations

import _socket
import os
import struct
from collections.abc import Iterator, Sequence

__all__ = ["NetlinkSocket", "attribute", "attributes", "message", "nested"]

SOL_NETLINK = 270
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11
NETLINK_GET_STRICT_CHK = 12

NLMSG_ERROR = 2
NLMSG_DONE = 3
NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_ROOT = 0x100
NLM_F_MATCH = 0x200
NLM_F_DUMP = NLM_F_ROOT | NLM_F_MATCH
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF
NLMSGERR_ATTR_MSG = 1

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_RECEIVE = 1 << 16


def attribute(kind: int, payload: bytes) -> bytes:
    """Return one attribute (struct nlattr and payload), padded to four bytes."""
    return _ATTRIBUTE.pack(4 + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def nested(kind: int, *inner: bytes) -> bytes:
    """Return an attribute that holds other attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(inner))


def message(kind: int, body: bytes, flags: int = NLM_F_ACK, sequence: int = 0) -> bytes:
    """Return a whole message; NLM_F_REQUEST is added to `flags`."""
    return _HEADER.pack(16 + len(body), kind, flags | NLM_F_REQUEST, sequence, 0) + body


def attributes(data: bytes) -> dict[int, bytes]:
    """Return the attributes in `data` by type; ends quietly at a malformed one."""
    found: dict[int, bytes] = {}
    offset = 0
    while offset + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4 or offset + length > len(data):
            break
        found[kind & NLA_TYPE_MASK] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def _messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield (type, flags, sequence, body) of each message in a datagram."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < 16 or offset + length > len(data):
            raise OSError(5, "truncated netlink message")
        yield kind, flags, sequence, data[offset + 16 : offset + length]
        offset += (length + 3) & ~3


def _failure(body: bytes, flags: int) -> OSError | None:
    """Return what an NLMSG_ERROR says, with the kernel's own text where it gave one."""
    code = -int(struct.unpack_from("=i", body)[0])
    if code == 0:
        return None
    text = os.strerror(code)
    if flags & NLM_F_ACK_TLVS:
        echoed = struct.unpack_from("=I", body, 4)[0]
        start = 20 if flags & NLM_F_CAPPED else 4 + ((echoed + 3) & ~3)
        detail = attributes(body[start:]).get(NLMSGERR_ATTR_MSG)
        if detail:
            text += f" ({detail.rstrip(bytes(1)).decode(errors='replace')})"
    return OSError(code, text)


class NetlinkSocket:
    """A netlink socket of one protocol; a context manager, for one thread at a time."""

    def __init__(self, protocol: int) -> None:
        kind = _socket.SOCK_RAW | _socket.SOCK_CLOEXEC
        self._socket = _socket.socket(_socket.AF_NETLINK, kind, protocol)
        self._sequence = 0
        try:
            self._socket.settimeout(30)
            self._socket.bind((0, 0))
            for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK):
                self._socket.setsockopt(SOL_NETLINK, option, 1)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> NetlinkSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def request(self, *batch: bytes, ignore: Sequence[int] = ()) -> None:
        """Send messages in one datagram and wait for every acknowledgement.

        Raises the first refusal as OSError (errno and the kernel's text), unless its
        errno is in `ignore`; the kernel carries out the messages after a refused one.
        """
        failures = self.try_request(*batch)
        for failure in failures:
            if failure is not None and failure.errno not in ignore:
                raise failure

    def try_request(self, *batch: bytes) -> list[OSError | None]:
        """Send messages in one datagram; return each one's refusal, or None."""
        first = self._sequence + 1
        self._sequence += len(batch)
        data = bytearray()
        for number, item in enumerate(batch, first):
            data += item[:8] + number.to_bytes(4, "little") + item[12:]
            data += b"\0" * (-len(data) % 4)
        self._socket.send(data)
        results: dict[int, OSError | None] = {}
        while len(results) < len(batch):
            for kind, flags, sequence, body in _messages(self._receive()):
                if kind == NLMSG_ERROR and first <= sequence < first + len(batch):
                    results[sequence] = _failure(body, flags)
        return [results[number] for number in sorted(results)]

    def ask(self, item: bytes) -> bytes:
        """Send one request that has one answer; return the answer's body."""
        self._sequence += 1
        self._socket.send(item[:8] + self._sequence.to_bytes(4, "little") + item[12:])
        while True:
            for kind, flags, sequence, body in _messages(self._receive()):
                if sequence != self._sequence:
                    continue
                if kind != NLMSG_ERROR:
                    return body
                failure = _failure(body, flags)
                if failure is not None:
                    raise failure

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """Return the bodies of a dump; one torn by a concurrent change is repeated."""
        for _ in range(16):
            answer = self._dump_once(kind, body)
            if answer is not None:
                return answer
        raise OSError(4, "netlink dump was interrupted again and again")

    def _dump_once(self, kind: int, body: bytes) -> list[bytes] | None:
        self._sequence += 1
        self._socket.send(message(kind, body, NLM_F_DUMP, self._sequence))
        found: list[bytes] = []
        torn = False
        while True:
            for answer, flags, sequence, content in _messages(self._receive()):
                if sequence != self._sequence:
                    continue
                torn = torn or bool(flags & NLM_F_DUMP_INTR)
                if answer == NLMSG_DONE:
                    return None if torn else found
                if answer == NLMSG_ERROR:
                    failure = _failure(content, flags)
                    if failure is not None:
                        raise failure
                found.append(content)

    def _receive(self) -> bytes:
        return self._socket.recv(_RECEIVE)
