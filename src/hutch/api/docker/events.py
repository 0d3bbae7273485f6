"""Events as Docker tells them: past ones from the journal, then those to come."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from hutch.api.docker.errors import ApiError
from hutch.api.docker.replies import Answer, Stream, encode
from hutch.api.docker.routing import Route
from hutch.errors import HutchError, InvalidArgument
from hutch.oci.reference import parse
from hutch.units import parse_time_ns

if TYPE_CHECKING:
    from hutch.api.docker.front import Front
    from hutch.api.docker.journal import Listener
    from hutch.api.docker.requests import Request
    from hutch.store.database import EventRow

__all__ = ["ROUTES"]

_KINDS = ("builder", "container", "image", "network", "volume")
_IMAGES = frozenset("commit create delete import load mount prune pull push save tag untag".split())
_FILTERS = frozenset(
    """config container daemon event image label network node plugin scope secret service type
    volume""".split()
)
_OTHERS = ("config", "daemon", "node", "plugin", "secret", "service")
_BATCH = 500
_KNOWN = 4096


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """An event in Docker's terms."""

    kind: str
    action: str
    id: str
    attributes: dict[str, str]
    time_ns: int

    def json(self) -> dict[str, Any]:
        """Return it as Docker's JSON, with the fields of old clients."""
        found: dict[str, Any] = {}
        if self.kind in ("container", "image"):
            found |= {"status": self.action, "id": self.id}
        if self.kind == "container":
            found["from"] = self.attributes.get("image", "")
        return found | {
            "Type": self.kind,
            "Action": self.action,
            "Actor": {"ID": self.id, "Attributes": self.attributes},
            "scope": "local",
            "time": self.time_ns // 10**9,
            "timeNano": self.time_ns,
        }


class Translator:
    """Turns events of the journal into Docker's; knows the labels of containers that it saw."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._labels: dict[str, dict[str, str]] = {}
        self._networks: dict[str, tuple[str, str]] = {}

    def tell(self, row: EventRow) -> Told | None:
        """Return the event, None for one of a kind that Docker has not."""
        if row.kind not in _KINDS or (row.kind == "image" and row.action not in _IMAGES):
            return None
        if row.action == "prune":
            return self._prune(row)
        change = getattr(self, f"_{row.kind}")
        told: Told = change(row)
        return told

    def _prune(self, row: EventRow) -> Told:
        return Told(
            kind=row.kind,
            action=row.action,
            id=row.subject,
            attributes=row.attributes,
            time_ns=row.time_ns,
        )

    def _container(self, row: EventRow) -> Told:
        if row.action == "create":
            own = ("name", "image")
            self._keep(row.subject, {k: v for k, v in row.attributes.items() if k not in own})
        attributes = {**self._labels_of(row.subject), **row.attributes}
        if "oldName" in attributes:
            attributes["oldName"] = f"/{attributes['oldName'].removeprefix('/')}"
        return Told(
            kind="container",
            action=row.action,
            id=row.subject,
            attributes=attributes,
            time_ns=row.time_ns,
        )

    def _labels_of(self, identifier: str) -> dict[str, str]:
        found = self._labels.get(identifier)
        if found is None:
            from hutch.engine.lookup import load

            try:
                found = load(self._front.engine.context, identifier).spec.labels
            except HutchError:
                return {}  # it is gone, and nobody knows them any more
            self._keep(identifier, found)
        return found

    def _keep(self, identifier: str, labels: dict[str, str]) -> None:
        if len(self._labels) >= _KNOWN:
            self._labels.pop(next(iter(self._labels)))
        self._labels[identifier] = labels

    def _image(self, row: EventRow) -> Told:
        if row.action == "commit":
            return self._made(row)
        identifier, name = row.subject, row.attributes.get("name", row.subject)
        attributes = {**row.attributes, "name": name}
        if row.action == "pull":
            identifier = name
            with suppress(InvalidArgument):
                attributes["name"] = parse(name).familiar_name()
        return Told(
            kind="image",
            action=row.action,
            id=identifier,
            attributes=attributes,
            time_ns=row.time_ns,
        )

    def _made(self, row: EventRow) -> Told:
        """Return what Docker tells of an image made from a container."""
        return Told(
            kind="image",
            action="create",
            id=row.subject,
            attributes={"name": row.subject},
            time_ns=row.time_ns,
        )

    def _network(self, row: EventRow) -> Told:
        identifier = row.attributes.get("id", "")
        driver = row.attributes.get("driver", "")
        if identifier and driver:
            self._networks[row.subject] = (identifier, driver)
        else:
            identifier, driver = self._network_of(row.subject, identifier)
        attributes = {"name": row.subject, "type": driver}
        if "instance" in row.attributes:
            attributes["container"] = row.attributes["instance"]
        return Told(
            kind="network",
            action=row.action,
            id=identifier,
            attributes=attributes,
            time_ns=row.time_ns,
        )

    def _network_of(self, name: str, identifier: str) -> tuple[str, str]:
        if name in self._networks:
            return self._networks[name]
        try:
            network = self._front.engine.networks.get(name)
        except HutchError:
            return identifier or name, "bridge"
        return network.id, network.driver

    def _volume(self, row: EventRow) -> Told:
        return Told(
            kind="volume",
            action=row.action,
            id=row.subject,
            attributes={"driver": "local", **row.attributes},
            time_ns=row.time_ns,
        )


# ---- filters ------------------------------------------------------------------------------


def _check(filters: dict[str, list[str]]) -> None:
    for key in filters:
        if key not in _FILTERS:
            raise ApiError(400, f"invalid filter '{key}'")


def passes(event: Told, filters: dict[str, list[str]]) -> bool:
    """Tell whether Docker's filters let an event through: all keys must, of each one value."""
    return all(not values or _TESTS[key](event, values) for key, values in filters.items())


def _fuzzy(kind: str, event: Told, values: list[str]) -> bool:
    """Docker compares the beginning of identifier or name, whatever the event is of."""
    name = event.attributes.get("name", "")
    return event.kind == kind and any(
        event.id.startswith(value) or name.startswith(value) for value in values
    )


def _image_matches(event: Told, values: list[str]) -> bool:
    name = event.attributes.get("name" if event.kind == "image" else "image", "")
    texts = {event.id, name, _untagged(event.id), _untagged(name)}
    return any(value in texts for value in values)


def _untagged(name: str) -> str:
    try:
        return parse(name).familiar_name()
    except InvalidArgument:
        return name


def _action_matches(event: Told, values: list[str]) -> bool:
    # `exec_start: sh` is asked for as `exec_start`, `health_status: healthy` likewise.
    short = event.action.partition(":")[0]
    return event.action in values or short in values


def _label_matches(event: Told, values: list[str]) -> bool:
    for value in values:
        key, equals, wanted = value.partition("=")
        if key not in event.attributes or (equals and event.attributes[key] != wanted):
            return False
    return True


_TESTS: dict[str, Callable[[Told, list[str]], bool]] = {
    "type": lambda event, values: event.kind in values,
    "event": _action_matches,
    "scope": lambda event, values: "local" in values,
    "label": _label_matches,
    "image": _image_matches,
    **{
        kind: functools.partial(_fuzzy, kind)
        for kind in ("container", "network", "volume", *_OTHERS)
    },
}


# ---- the stream ---------------------------------------------------------------------------


async def _events(request: Request) -> Answer:
    query = request.query
    filters = query.filters()
    _check(filters)
    since = parse_time_ns(query.text("since"), "since") if query.text("since") else None
    until = parse_time_ns(query.text("until"), "until") if query.text("until") else None
    if since is not None and until is not None and since > until:
        raise ApiError(400, "`since` time cannot be after `until` time")
    # From now on, even while the head of the answer is under way.
    listener = request.front.journal.listen().__enter__()
    return Stream(
        _Lines(_told(request.front, listener, since, until, filters), listener),
        content_type="application/json",
    )


class _Lines:
    """The stream, with a listener that goes with it even if it was never read."""

    def __init__(self, lines: AsyncIterator[bytes], listener: Listener) -> None:
        self._lines = lines
        self._listener = listener

    def __aiter__(self) -> _Lines:
        return self

    async def __anext__(self) -> bytes:
        return await anext(self._lines)

    async def aclose(self) -> None:
        """Listen no more."""
        self._listener.__exit__(None, None, None)
        close = getattr(self._lines, "aclose", None)
        if close is not None:
            await close()


async def _told(
    front: Front,
    listener: Listener,
    since: int | None,
    until: int | None,
    filters: dict[str, list[str]],
) -> AsyncIterator[bytes]:
    translator = Translator(front)
    last = 0
    if since is not None or (until is not None and until <= time.time_ns()):
        first_ns = since if since is not None else time.time_ns()
        while True:
            rows = await front.call(front.engine.context.store.events, last, _BATCH)
            for row in rows:
                last = row.seq
                if until is not None and row.time_ns > until:
                    return
                if row.time_ns >= first_ns and (line := _line(translator, row, filters)):
                    yield line
            if len(rows) < _BATCH:
                break
    async for row in _coming(listener, until):
        if row.seq > last and (line := _line(translator, row, filters)):
            yield line


async def _coming(listener: Listener, until: int | None) -> AsyncIterator[EventRow]:
    """Yield events as they come, to the moment `until` (nanoseconds)."""
    import asyncio

    while True:
        left = None if until is None else (until - time.time_ns()) / 1e9
        if left is not None and left <= 0:
            return
        try:
            row = await asyncio.wait_for(listener.next(), left)
        except TimeoutError:
            return
        if until is not None and row.time_ns > until:
            return
        yield row


def _line(translator: Translator, row: EventRow, filters: dict[str, list[str]]) -> bytes:
    event = translator.tell(row)
    if event is None or not passes(event, filters):
        return b""
    return encode(event.json()) + b"\n"


ROUTES = (
    Route(
        method="GET",
        path="/events",
        handler=_events,
        summary="Tell what happens, and what happened, also through other processes",
        verdict="differs: without `resize`, `top` and the like of containers",
        options={"since": "works", "until": "works", "filters": "works"},
    ),
)
