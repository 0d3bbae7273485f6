"""Show long work: bars that redraw on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hutch.cli.output import is_tty
from hutch.records import Progress, ProgressEvent, silent
from hutch.units import format_bytes

__all__ = ["pull_progress"]

_INTERVAL_S = 0.1
_BAR = 24


@contextmanager
def pull_progress(*, quiet: bool) -> Iterator[Progress]:
    """Yield what takes the progress events of a pull, push, load or bootstrap."""
    if quiet:
        yield silent
        return
    shown: _Bars | _Lines = _Bars() if is_tty(2) else _Lines()
    try:
        yield shown.take
    finally:
        shown.close()


class _Lines:
    """A line when an item enters a phase."""

    def __init__(self) -> None:
        self._phases: dict[str, str] = {}
        self._lock = threading.Lock()

    def take(self, event: ProgressEvent) -> None:
        with self._lock:
            if self._phases.get(event.item) == event.phase:
                return
            self._phases[event.item] = event.phase
            print(f"{_name(event.item)}: {event.phase}", file=sys.stderr)

    def close(self) -> None:
        sys.stderr.flush()


class _Bars:
    """One line per item, redrawn in place."""

    def __init__(self) -> None:
        self._items: dict[str, ProgressEvent] = {}
        self._drawn = 0
        self._last = 0.0
        self._lock = threading.Lock()

    def take(self, event: ProgressEvent) -> None:
        with self._lock:
            before = self._items.get(event.item)
            self._items[event.item] = event
            now = time.monotonic()
            changed = before is None or before.phase != event.phase
            if changed or now - self._last > _INTERVAL_S:
                self._last = now
                self._draw()

    def close(self) -> None:
        with self._lock:
            if self._items:
                self._draw()
        sys.stderr.flush()

    def _draw(self) -> None:
        try:
            columns, rows = os.get_terminal_size(2)
        except OSError:
            columns, rows = 0, 0
        # A terminal that was never told its size says 0.
        columns, rows = columns or 80, rows or 24
        shown = list(self._items.values())[-max(rows - 1, 1) :]
        text = f"\x1b[{self._drawn}A" if self._drawn else ""
        for event in shown:
            text += "\r\x1b[K" + _line(event)[: columns - 1] + "\n"
        self._drawn = len(shown)
        sys.stderr.write(text)
        sys.stderr.flush()


def _name(item: str) -> str:
    return item.removeprefix("sha256:")[:12] if item.startswith("sha256:") else item


def _line(event: ProgressEvent) -> str:
    text = f"{_name(event.item)}: {event.phase}"
    if event.total:
        part = min(max(event.done / event.total, 0.0), 1.0)
        filled = int(part * _BAR)
        amounts = f"{_amount(event.done, event.unit)}/{_amount(event.total, event.unit)}"
        return f"{text:<30} [{'=' * filled:<{_BAR}}] {amounts}"
    return f"{text:<30} {_amount(event.done, event.unit)}" if event.done else text


def _amount(number: int, unit: str) -> str:
    return format_bytes(number) if unit == "bytes" else f"{number} {unit}"
