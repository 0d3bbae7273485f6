"""What the filters of a prune keep: `until` and `label!`, which only prunes have. Its event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hutch.api.docker.errors import ApiError
from hutch.units import parse_time

if TYPE_CHECKING:
    from hutch.api.docker.front import Front

__all__ = ["Spared", "note_prune"]


class Spared:
    """Tells what is not to be pruned. Raises for filters other than these, `label` and `more`."""

    def __init__(self, filters: Mapping[str, Sequence[str]], *more: str) -> None:
        for key in filters:
            if key not in ("label", "label!", "until", *more):
                raise ApiError(400, f"invalid filter '{key}'")
        self._before = [parse_time(text, "filters.until") for text in filters.get("until", ())]
        self._labels = [text.partition("=") for text in filters.get("label!", ())]

    def __call__(self, labels: Mapping[str, str], created_s: float) -> bool:
        """Tell whether what has these labels, and was made then, stays."""
        return any(created_s > moment for moment in self._before) or any(
            key in labels and (not equals or labels[key] == value)
            for key, equals, value in self._labels
        )


def note_prune(front: Front, kind: str, reclaimed: int) -> None:
    """Put into the journal that what nobody used was removed, and the bytes it had taken."""
    with front.engine.context.store.write() as tx:
        tx.event(kind, "prune", "", reclaimed=str(reclaimed))
