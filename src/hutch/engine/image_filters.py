"""Docker's filters for lists of images."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Mapping, Sequence

from hutch.errors import InvalidArgument
from hutch.image.catalog import Images
from hutch.image.records import ImageRecord
from hutch.units import parse_duration

__all__ = ["select_images"]

_FILTERS = ("dangling", "label", "reference", "before", "since", "until")


def select_images(
    records: Sequence[ImageRecord], catalog: Images, filters: Mapping[str, Sequence[str]]
) -> list[ImageRecord]:
    """Return the images that pass all filters (values of one filter are alternatives)."""
    for key in filters:
        if key not in _FILTERS:
            raise InvalidArgument(
                f"unknown filter {key!r}", field="filters", hint=f"use {', '.join(_FILTERS)}"
            )
    bounds = {
        key: catalog.get(filters[key][-1]).created for key in ("before", "since") if key in filters
    }
    found = []
    for record in records:
        if "before" in bounds and record.created >= bounds["before"]:
            continue
        if "since" in bounds and record.created <= bounds["since"]:
            continue
        if all(_passes(record, key, values) for key, values in filters.items()):
            found.append(record)
    return found


def _passes(record: ImageRecord, key: str, values: Sequence[str]) -> bool:
    if key == "dangling":
        wanted = values[-1].lower() in ("1", "true")
        return (not record.names) == wanted
    if key == "label":
        return all(_has_label(record, value) for value in values)
    if key == "reference":
        return any(_named(record, value) for value in values)
    if key == "until":
        age = parse_duration(values[-1], field="filters.until")
        return record.added_at <= time.time() - age
    return True


def _has_label(record: ImageRecord, value: str) -> bool:
    name, equals, content = value.partition("=")
    labels = record.config.labels
    return name in labels and (not equals or labels[name] == content)


def _named(record: ImageRecord, pattern: str) -> bool:
    from hutch.oci.reference import parse

    for name in record.names:
        familiar = parse(name).familiar()
        repository = familiar.rpartition(":")[0]
        if fnmatch.fnmatchcase(familiar, pattern) or fnmatch.fnmatchcase(repository, pattern):
            return True
    return False
