"""Show a build: plain lines, a terminal that redraws itself, or JSON."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hutch.cli.output import is_tty
from hutch.units import format_bytes

if TYPE_CHECKING:
    from hutch.engine.builder.events import BuildEvent

__all__ = ["MODES", "shown_build"]

MODES = ("auto", "plain", "tty", "quiet", "json", "rawjson")
_INTERVAL_S = 0.1
_TAIL = 20
_SHOWN = ("FROM", "RUN", "COPY", "ADD", "WORKDIR", "")
_MAX_LINE = 64 << 10


@contextmanager
def shown_build(mode: str) -> Iterator[Callable[[BuildEvent], None]]:
    """Yield what takes the events of a build; what it writes goes to stderr, JSON to stdout."""
    if mode == "auto":
        mode = "tty" if is_tty(2) else "plain"
    shown: _Shown = {"plain": _Plain, "tty": _Terminal, "quiet": _Quiet}.get(mode, _Json)()
    try:
        yield shown.take
    finally:
        shown.close()


class _Step:
    """What is known of a step: its lines that are not whole yet, and its last ones."""

    def __init__(self, event: BuildEvent) -> None:
        self.number = event.step
        self.name = " ".join(event.name.split())
        self.began = event.time
        self.hidden = event.text.partition(" ")[0].upper() not in _SHOWN
        self.tail: list[str] = []
        self.progress: dict[str, tuple[int, int | None]] = {}
        self._rest = {1: b"", 2: b""}

    def lines(self, stream: int, data: bytes) -> list[str]:
        """Return the lines that are whole with this piece."""
        *whole, rest = (self._rest.get(stream, b"") + data).split(b"\n")
        if len(rest) > _MAX_LINE:
            whole, rest = [*whole, rest], b""
        self._rest[stream] = rest
        return self._keep(whole)

    def rest(self) -> list[str]:
        """Return what was not ended by a new line."""
        left = [part for part in self._rest.values() if part]
        self._rest = {1: b"", 2: b""}
        return self._keep(left)

    def _keep(self, pieces: list[bytes]) -> list[str]:
        # A bar that redraws itself shows its last state.
        texts = [piece.rstrip(b"\r").rpartition(b"\r")[2] for piece in pieces]
        shown = [_clean(text.decode(errors="replace")) for text in texts]
        self.tail = [*self.tail, *shown][-_TAIL:]
        return shown


def _clean(text: str) -> str:
    """Take out what would act on the terminal."""
    plain: list[str] = []
    skipping = False
    for char in text:
        if skipping:
            skipping = not ("@" <= char <= "~") or char == "["
        elif char == "\x1b":
            skipping = True
        elif char == "\t" or char.isprintable():
            plain.append(char)
    return "".join(plain)


class _Shown:
    """The steps of a build by their numbers."""

    def __init__(self) -> None:
        self.steps: dict[int, _Step] = {}
        self.failed: _Step | None = None
        self._lock = threading.RLock()

    def take(self, event: BuildEvent) -> None:
        with self._lock:
            if event.kind == "start":
                self.steps[event.step] = _Step(event)
            self._show(event, self.steps.get(event.step))

    def _show(self, event: BuildEvent, step: _Step | None) -> None:
        raise NotImplementedError

    def close(self) -> None:
        sys.stderr.flush()


class _Plain(_Shown):
    """Lines as they come, each with the number of its step."""

    def _show(self, event: BuildEvent, step: _Step | None) -> None:
        if event.kind == "warning":
            _say(f"WARNING: {event.text}")
        if event.kind == "image":
            _say(f"image {event.digest}")
        if step is None or (step.hidden and event.kind != "error"):
            return
        number = f"#{step.number}"
        match event.kind:
            case "start":
                _say(f"{number} {step.name}")
            case "output":
                for line in step.lines(event.stream, event.data):
                    _say(f"{number} {event.time - step.began:.3f} {line}")
            case "progress":
                if event.text not in step.progress:
                    step.progress[event.text] = (event.done, event.total_bytes)
                    _say(f"{number} {event.text}")
            case "cached":
                _say(f"{number} CACHED", "")
            case "done" | "error":
                for line in step.rest():
                    _say(f"{number} {event.time - step.began:.3f} {line}")
                if event.kind == "done":
                    _say(f"{number} DONE {event.time - step.began:.1f}s", "")
                else:
                    _say(f"{number} ERROR: {_clean(event.text)}", "")


class _Quiet(_Shown):
    """Nothing, but what the failing command wrote last."""

    def _show(self, event: BuildEvent, step: _Step | None) -> None:
        if step is None:
            return
        if event.kind == "output":
            step.lines(event.stream, event.data)
        elif event.kind == "error" and self.failed is None:
            step.rest()
            self.failed = step

    def close(self) -> None:
        if self.failed is not None and self.failed.tail:
            _say("------", f" > {self.failed.name}:", *self.failed.tail, "------")
        super().close()


class _Json(_Shown):
    """One event a line."""

    def _show(self, event: BuildEvent, step: _Step | None) -> None:
        import msgspec

        sys.stdout.buffer.write(msgspec.json.encode(event) + b"\n")
        sys.stdout.buffer.flush()


class _Terminal(_Quiet):
    """Ended steps stay; those that run are drawn below, each with its last lines."""

    def __init__(self) -> None:
        super().__init__()
        self._active: list[_Step] = []
        self._drawn = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="hutch-progress", daemon=True)
        self._thread.start()

    def _show(self, event: BuildEvent, step: _Step | None) -> None:
        super()._show(event, step)
        if event.kind == "warning":
            self._above(f"\x1b[33mWARNING: {_clean(event.text)}\x1b[0m")
        if event.kind == "image":
            self._above(f" => image {event.digest}")
        if step is None or step.hidden:
            return
        if event.kind == "start":
            self._active.append(step)
        elif event.kind == "progress":
            step.progress[event.text] = (event.done, event.total_bytes)
        elif event.kind in ("cached", "done", "error") and step in self._active:
            self._active.remove(step)
            self._above(self._ended(event, step))

    @staticmethod
    def _ended(event: BuildEvent, step: _Step) -> str:
        if event.kind == "cached":
            return f"\x1b[34m => CACHED {step.name}\x1b[0m"
        took = f"{event.time - step.began:.1f}s"
        if event.kind == "error":
            return f"\x1b[31m => ERROR {step.name}  {took}\x1b[0m"
        return f" => {step.name}  {took}"

    def _tick(self) -> None:
        while not self._done.wait(_INTERVAL_S):
            with self._lock:
                self._draw()

    def _above(self, line: str) -> None:
        self._erase()
        sys.stderr.write(f"{_cut(line, self._size()[0])}\n")
        self._draw()

    def _erase(self) -> None:
        if self._drawn:
            sys.stderr.write(f"\x1b[{self._drawn}A\x1b[J")
            self._drawn = 0

    @staticmethod
    def _size() -> tuple[int, int]:
        try:
            columns, rows = os.get_terminal_size(2)
        except OSError:
            columns, rows = 0, 0
        # A terminal that was never told its size says 0.
        return columns or 80, rows or 24

    def _draw(self) -> None:
        columns, rows = self._size()
        now = time.time()
        each = max(min(6, (rows - 2) // max(len(self._active), 1) - 1), 0)
        lines: list[str] = []
        for step in self._active:
            lines.append(f" => {step.name}  {now - step.began:.1f}s")
            running = [
                f"{text} {format_bytes(done)}{f'/{format_bytes(total)}' if total else ''}"
                for text, (done, total) in step.progress.items()
                if done and (total is None or done < total)
            ]
            shown = (running or step.tail)[-each:] if each else []
            lines += [f" => => # {line}" for line in shown]
        lines = lines[-(rows - 1) :]
        self._erase()
        sys.stderr.write("".join(f"{_cut(line, columns)}\n" for line in lines))
        self._drawn = len(lines)
        sys.stderr.flush()

    def close(self) -> None:
        self._done.set()
        self._thread.join()
        with self._lock:
            self._active = []
            self._erase()
        super().close()


def _cut(line: str, columns: int) -> str:
    return line if len(line) < columns else f"{line[: columns - 2]}…\x1b[0m"


def _say(*lines: str) -> None:
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    sys.stderr.flush()
