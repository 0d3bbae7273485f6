"""Events of a root: the journal in the store, past and to come, across processes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from hutch.engine.context import Context
from hutch.engine.results import Event
from hutch.errors import InvalidArgument
from hutch.units import to_ns

if TYPE_CHECKING:
    from hutch.units import Moment

__all__ = ["events"]

_POLL_S = 0.1
_BATCH = 1000
_FILTERS = ("type", "event", "container", "image", "network", "volume", "label")


def events(
    context: Context,
    *,
    since: Moment | None = None,
    until: Moment | None = None,
    filters: Mapping[str, Sequence[str]] | None = None,
    follow: bool = True,
) -> Iterator[Event]:
    """Yield events in order; without `since` only those from now on.

    `since` and `until` are seconds since the epoch (a Decimal loses no nanoseconds); an
    `until` in the past ends the stream at once. Other processes' events come within 100 ms.
    """
    wanted = {key: tuple(values) for key, values in (filters or {}).items()}
    for key in wanted:
        if key not in _FILTERS:
            raise InvalidArgument(
                f"unknown filter {key!r}", field="filters", hint=f"use {', '.join(_FILTERS)}"
            )
    after = 0 if since is not None else context.store.last_event()
    return _stream(context, after, since, until, wanted, follow)


def _stream(
    context: Context,
    after: int,
    since: Moment | None,
    until: Moment | None,
    wanted: Mapping[str, tuple[str, ...]],
    follow: bool,
) -> Iterator[Event]:
    first_ns = to_ns(since or 0)
    last_ns = None if until is None else to_ns(until)
    while True:
        rows = context.store.events(after, _BATCH)
        for row in rows:
            after = row.seq
            if last_ns is not None and row.time_ns > last_ns:
                return
            event = Event(**msgspec.structs.asdict(row))
            if row.time_ns >= first_ns and _matches(event, wanted):
                yield event
        if len(rows) == _BATCH:
            continue
        if not follow or (last_ns is not None and time.time_ns() >= last_ns):
            return
        time.sleep(_POLL_S)


def _matches(event: Event, wanted: Mapping[str, tuple[str, ...]]) -> bool:
    for key, values in wanted.items():
        if key == "type":
            found = event.kind in values
        elif key == "event":
            found = event.action in values
        elif key == "label":
            found = any(_has_label(event, value) for value in values)
        elif key == "container":
            found = event.kind == "container" and any(
                event.subject.startswith(value) or event.attributes.get("name") == value
                for value in values
            )
        else:
            names = (event.subject, event.attributes.get("name"), event.attributes.get(key))
            found = any(value in names for value in values)
        if not found:
            return False
    return True


def _has_label(event: Event, wanted: str) -> bool:
    name, equals, value = wanted.partition("=")
    return name in event.attributes and (not equals or event.attributes[name] == value)
