"""A request as a handler sees it: parameters, query, body; and how it may answer."""

from __future__ import annotations

import asyncio
import base64
import binascii
import concurrent.futures
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from hutch.api.docker.errors import ApiError
from hutch.api.docker.http import Gone
from hutch.decoding import decode_json, prepare
from hutch.errors import InvalidArgument

if TYPE_CHECKING:
    from hutch.api.docker.front import Front
    from hutch.api.docker.http import Connection, Headers, Hijacked
    from hutch.api.docker.routing import Version

__all__ = ["Query", "Request"]

T = TypeVar("T")

_MAX_JSON = 8 << 20
_MAPS = frozenset({"PortBindings", "EndpointsConfig", "ExposedPorts", "Volumes"})
_FALSE = frozenset({"", "0", "no", "false", "none"})


def _without_nulls(value: Any, name: str = "") -> Any:
    """Leave out fields that are null; the names of ports, networks and labels are no fields."""
    if isinstance(value, dict):
        return {
            key: _without_nulls(member, key)
            for key, member in value.items()
            if member is not None or name in _MAPS
        }
    if isinstance(value, list):
        return [_without_nulls(member) for member in value]
    return value


class Query:
    """The parameters after the question mark. The last of several values counts, but where
    all are asked for."""

    def __init__(self, text: str) -> None:
        from urllib.parse import parse_qs

        try:
            self._values = parse_qs(text, keep_blank_values=True, max_num_fields=1000)
        except ValueError as exc:
            raise InvalidArgument(str(exc).lower(), field="query") from exc

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def text(self, name: str, default: str = "") -> str:
        """Return a value as it came."""
        return self._values[name][-1] if name in self._values else default

    def texts(self, name: str) -> list[str]:
        """Return all values of a name."""
        return self._values.get(name, [])

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a truth value, by Docker's rule: all is true but for "", 0, no, false, none."""
        if name not in self._values:
            return default
        return self.text(name).strip().lower() not in _FALSE

    def integer(self, name: str, default: int = 0) -> int:
        """Return a number; raise `InvalidArgument` for what is none."""
        found = self.optional_integer(name)
        return default if found is None else found

    def optional_integer(self, name: str) -> int | None:
        """Return a number, None where it is not given."""
        given = self.text(name).strip()
        if not given:
            return None
        try:
            return int(given)
        except ValueError:
            raise InvalidArgument(f"expected a number, got {given[:40]!r}", field=name) from None

    def filters(self) -> dict[str, list[str]]:
        """Return the filters, given as a JSON object of lists, or of objects as sets."""
        given = self.text("filters")
        if not given:
            return {}
        try:
            found = decode_json(given, dict[str, list[str] | dict[str, bool]])
        except msgspec.MsgspecError as exc:
            raise InvalidArgument(f"invalid filter: {exc}", field="filters") from exc
        return {
            key: values if isinstance(values, list) else [v for v, on in values.items() if on]
            for key, values in found.items()
        }


class BodyFile:
    """A request's body for blocking readers in threads: nothing is kept but one piece."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes, b"" at the end; raise `OSError` when the client leaves."""
        if size < 0:
            pieces = []
            while piece := self.read(1 << 20):
                pieces.append(piece)
            return b"".join(pieces)
        if not self._rest:
            self._rest = self._next()
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def _next(self) -> bytes:
        coming = asyncio.run_coroutine_threadsafe(self._connection.body(), self._loop)
        try:
            return coming.result()
        except (Gone, concurrent.futures.CancelledError) as exc:
            raise ConnectionAbortedError("the client has left") from exc


class Request:
    """One request."""

    def __init__(
        self,
        front: Front,
        connection: Connection,
        *,
        method: str,
        path: str,
        query: Query,
        version: Version,
        headers: dict[str, str],
        params: dict[str, str],
    ) -> None:
        self.front = front
        self.connection = connection
        self.method = method
        self.path = path
        self.query = query
        self.version = version
        self.headers = headers
        self.params = params

    @property
    def upgrade(self) -> bool:
        """Whether the client asks for another protocol on this connection."""
        return "upgrade" in self.headers.get("connection", "").lower() and bool(
            self.headers.get("upgrade")
        )

    # ---- the body ---------------------------------------------------------------------------

    async def read(self, limit: int = _MAX_JSON) -> bytes:
        """Return the whole body; raise for one that is larger than `limit` bytes."""
        pieces: list[bytes] = []
        left = limit
        while piece := await self.connection.body():
            left -= len(piece)
            if left < 0:
                raise ApiError(413, f"the request's body is larger than {limit} bytes")
            pieces.append(piece)
        return b"".join(pieces)

    async def json(self, kind: type[T]) -> T:
        """Return the body as `kind`; raise `InvalidArgument` naming the field."""
        found = await self.optional_json(kind)
        if found is None:
            raise ApiError(400, "invalid JSON: got EOF while reading request body")
        return found

    async def optional_json(self, kind: type[T]) -> T | None:
        """Return the body as `kind`, None where there is none."""
        data = await self.read()
        if not data.strip() or data.strip() == b"null":
            return None
        content_type = self.headers.get("content-type", "application/json")
        if content_type.split(";")[0].strip().lower() not in ("application/json", ""):
            raise ApiError(
                400,
                f"unsupported Content-Type header ({content_type[:80]}): must be "
                "'application/json'",
            )
        try:
            # In Go, null leaves a field as it is; clients send it for whatever is not given.
            given = _without_nulls(decode_json(data, Any))
            prepare(kind)
            return msgspec.convert(given, kind)
        except msgspec.ValidationError as exc:
            raise ApiError(400, f"invalid request: {exc}") from exc
        except (msgspec.DecodeError, RecursionError) as exc:
            raise ApiError(400, f"invalid JSON: {exc}") from exc

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes."""
        while piece := await self.connection.body():
            yield piece

    def body_file(self) -> BodyFile:
        """Return the body as something to read from in a thread, while the handler waits."""
        return BodyFile(self.connection)

    # ---- other ways to answer ---------------------------------------------------------------

    async def hijack(self, headers: Headers = ()) -> Hijacked:
        """Take the connection over as a plain stream."""
        await self.read()
        return await self.connection.hijack(upgrade=self.upgrade, headers=headers)

    def auth_config(self, header: str = "x-registry-auth") -> dict[str, object]:
        """Return the JSON object that clients send in a header, in URL-safe base64."""
        given = self.headers.get(header, "")
        if not given:
            return {}
        try:
            data = base64.urlsafe_b64decode(given + "=" * (-len(given) % 4))
            return decode_json(data, dict[str, object])
        except (binascii.Error, ValueError, msgspec.MsgspecError) as exc:
            raise ApiError(400, f"invalid {header} header") from exc
