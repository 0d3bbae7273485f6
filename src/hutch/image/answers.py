"""What a registry's answers mean: errors with their text, patience, and what may be shown."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol
from urllib.parse import urljoin, urlsplit

import msgspec

from hutch.decoding import decode_json
from hutch.errors import Denied, HutchError, InvalidArgument, NotFound, Unavailable

__all__ = [
    "RETRY_STATUSES",
    "Answer",
    "check_status",
    "describe",
    "join_url",
    "origin",
    "read_bounded",
    "reason",
    "retry_after",
]

RETRY_STATUSES = frozenset((408, 429, 500, 502, 503, 504))
_MAX_ERROR_BODY = 64 << 10


class Answer(Protocol):
    """An answer to a request, as the transport gives it."""

    status: int

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers, names in lower case."""
        ...

    def chunks(self) -> Iterator[bytes]:
        """Yield the body."""
        ...

    def close(self) -> None:
        """Give the connection back."""
        ...


def read_bounded(chunks: Iterable[bytes], limit: int, what: str) -> bytes:
    """Return the joined chunks; raise `InvalidArgument` once they are more than `limit`."""
    parts, size = [], 0
    for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise InvalidArgument(f"{what}: answer longer than {limit} bytes")
        parts.append(chunk)
    return b"".join(parts)


def describe(url: str) -> str:
    """Return host and path of a URL for an error: queries carry signatures and tokens."""
    parts = urlsplit(url)
    netloc = parts.netloc.rpartition("@")[2]
    return f"{netloc}{parts.path}"[:300]


def join_url(base: str, target: str) -> str:
    """Return the http(s) URL that a registry's Location or link means, seen from `base`."""
    try:
        url = urljoin(base, target)
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise Unavailable(f"{describe(base)}: leads to an unusable address")
    return url


def check_status(response: Answer, accepted: tuple[int, ...], what: str) -> None:
    """Raise the error that an unexpected status stands for, with what the registry says."""
    if response.status in accepted:
        return
    try:
        said = _message(read_bounded(response.chunks(), _MAX_ERROR_BODY, what))
    except HutchError:
        said = ""
    finally:
        response.close()
    because = f" ({said})" if said else ""
    if response.status in (401, 403):
        raise Denied(
            f"{what}: access denied" + because,
            hint="check the name; for a private image log in with docker login or podman login",
        )
    if response.status == 404:
        raise NotFound(f"{what}: not found in the registry" + because)
    if response.status in RETRY_STATUSES or response.status >= 500:
        raise Unavailable(f"{what}: registry answered {response.status}" + because)
    raise InvalidArgument(f"{what}: {said or f'registry answered {response.status}'}")


class _ErrorEntry(msgspec.Struct):
    code: str = ""
    message: str = ""


class _ErrorBody(msgspec.Struct):
    errors: list[_ErrorEntry] = []


def _message(body: bytes) -> str:
    """Return the first error of a registry's answer, as one printable line."""
    try:
        decoded = decode_json(body, _ErrorBody)
    except msgspec.DecodeError:
        return ""
    if not decoded.errors:
        return ""
    entry = decoded.errors[0]
    text = entry.message or entry.code
    return "".join(letter if letter.isprintable() else " " for letter in text)[:200].strip()


def origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    return parts.scheme, (parts.hostname or ""), port or (443 if parts.scheme == "https" else 80)


def reason(exc: BaseException) -> str:
    """Return why a connection failed, without the object addresses urllib3 puts in."""
    inner: BaseException | None = exc
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror.lower()
        inner = inner.__cause__ or inner.__context__
    name = type(exc).__name__
    return {
        "ConnectTimeoutError": "no connection in time",
        "ReadTimeoutError": "no answer in time",
        "NameResolutionError": "name cannot be resolved",
        "IncompleteRead": "connection closed early",
        "ProtocolError": "connection closed early",
        "NewConnectionError": "no connection",
    }.get(name, name)


def retry_after(response: Answer) -> float | None:
    """Return the seconds of Retry-After (a number or a date), or None."""
    text = response.headers.get("retry-after", "").strip()
    if not text:
        return None
    if text.isascii() and text.isdigit():
        return float(text[:9])
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
