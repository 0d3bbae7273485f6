"""Choose images by filter, as `docker images --filter` and `docker image prune` do, and prune."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import msgspec

from hutch.errors import InvalidArgument
from hutch.image.catalog import Images, Removed
from hutch.image.records import ImageRecord
from hutch.oci.reference import parse
from hutch.units import parse_duration

__all__ = ["ImageFilter", "created_at", "parse_filters", "prune", "select"]


class ImageFilter(msgspec.Struct, frozen=True, kw_only=True):
    """What images must be to be chosen; the empty filter chooses all.

    `references` are patterns on familiar names (`debian`, `ghcr.io/*/tool:1.*`); any one
    may match. `labels` and `without_labels` are `key` or `key=value`, all must hold.
    `before` and `since` name images; `until` is in seconds since the epoch.
    """

    references: tuple[str, ...] = ()
    dangling: bool | None = None
    labels: tuple[str, ...] = ()
    without_labels: tuple[str, ...] = ()
    before: str | None = None
    since: str | None = None
    until: float | None = None


def parse_filters(filters: Mapping[str, Sequence[str]], *, now: float | None = None) -> ImageFilter:
    """Return the filter that Docker's keys with their values mean.

    Labels must all hold, references are alternatives, and of the others the last counts.
    """
    for key, values in filters.items():
        if key not in _KEYS:
            raise InvalidArgument(
                f"unknown filter {key!r}", field="filters", hint=f"use {', '.join(_KEYS)}"
            )
        if not all(values):
            raise InvalidArgument("needs a value", field=f"filters.{key}")
    last = {key: values[-1] for key, values in filters.items() if values}
    return ImageFilter(
        references=tuple(filters.get("reference", ())),
        dangling=_boolean(last["dangling"]) if "dangling" in last else None,
        labels=tuple(filters.get("label", ())),
        without_labels=tuple(filters.get("label!", ())),
        before=last.get("before"),
        since=last.get("since"),
        until=_moment(last["until"], time.time() if now is None else now)
        if "until" in last
        else None,
    )


_KEYS = ("reference", "dangling", "label", "label!", "before", "since", "until")


def select(images: Images, wanted: ImageFilter) -> list[ImageRecord]:
    """Return the images that the filter chooses, the newest first."""
    before = created_at(images.get(wanted.before)) if wanted.before else None
    since = created_at(images.get(wanted.since)) if wanted.since else None
    return [r for r in images.all() if _matches(r, wanted, before, since)]


def prune(images: Images, *, unused: bool = False, only: ImageFilter | None = None) -> Removed:
    """Delete dangling images, or all that no instance uses; return what went.

    `only` narrows the choice (labels, until). Blobs and layers go with the next garbage
    collection.
    """
    untagged: list[str] = []
    deleted: list[str] = []
    for record in select(images, only or ImageFilter()):
        if unused or not record.names:
            removed = images.delete(record.id, dangling=not unused)
            if removed is not None:
                untagged.extend(removed.untagged)
                deleted.extend(removed.deleted)
    return Removed(untagged=tuple(untagged), deleted=tuple(deleted))


def created_at(record: ImageRecord) -> float:
    """Return when an image says it was made, in seconds since the epoch (0: it does not)."""
    from datetime import UTC, datetime

    try:
        moment = datetime.fromisoformat(record.created)
    except ValueError:
        return 0.0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    try:
        return moment.timestamp()
    except (OverflowError, ValueError):
        return 0.0


def _matches(
    record: ImageRecord, wanted: ImageFilter, before: float | None, since: float | None
) -> bool:
    made = created_at(record)
    return (
        (wanted.dangling is None or wanted.dangling == (not record.names))
        and (before is None or made < before)
        and (since is None or made > since)
        and (wanted.until is None or made < wanted.until)
        and all(_has_label(record, label) for label in wanted.labels)
        and not any(_has_label(record, label) for label in wanted.without_labels)
        and (not wanted.references or _named(record, wanted.references))
    )


def _has_label(record: ImageRecord, label: str) -> bool:
    key, equals, value = label.partition("=")
    labels = record.config.labels
    return labels.get(key) == value if equals else key in labels


def _named(record: ImageRecord, patterns: Sequence[str]) -> bool:
    for name in record.names:
        reference = parse(name)
        texts = (reference.familiar(), reference.familiar_name(), name)
        if any(fnmatchcase(text, pattern) for text in texts for pattern in patterns):
            return True
    return False


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1"):
        return True
    if text.lower() in ("false", "0"):
        return False
    raise InvalidArgument(f"expected true or false, got {text!r}", field="filters.dangling")


def _moment(text: str, now: float) -> float:
    """Return the time that a duration before now, seconds since the epoch or a date means."""
    from datetime import datetime

    if text.isdigit():
        return float(text)
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return now - parse_duration(text, field="filters.until")
