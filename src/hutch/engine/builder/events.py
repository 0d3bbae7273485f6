"""What a build tells while it goes on: one stream for a terminal, for JSON, for an API."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

import msgspec

__all__ = ["BuildEvent", "BuildProgress", "Reporter", "Step", "no_progress"]

Kind = Literal["start", "cached", "output", "progress", "done", "error", "warning", "image"]


class BuildEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that happened.

    `step` numbers the steps in the order in which they begin; 0 is the build itself. `start`
    has the step's `name` (`[app 2/5] RUN make`), and for instructions its `number` of `total`
    in its `stage` and the instruction itself as `text`; `output` has a piece of what a command
    wrote in `data`, on `stream` 1 or 2; `progress` counts `done` of `total_bytes` of `text`;
    `done` and `cached` end a step, with the layer's `digest` where it made one (the step that
    reads the Dockerfile tells the `total` of instructions to come); `error` ends it
    with the reason; `image` tells the id of the image in `digest`. `time` is in seconds since
    the epoch.
    """

    kind: Kind
    step: int = 0
    name: str = ""
    stage: str = ""
    number: int = 0
    total: int = 0
    text: str = ""
    stream: int = 0
    data: bytes = b""
    done: int = 0
    total_bytes: int | None = None
    digest: str = ""
    time: float = 0.0


BuildProgress = Callable[[BuildEvent], None]


def no_progress(_: BuildEvent) -> None:
    """Take an event and show nothing."""


class Step:
    """A step that has begun; exactly one of `cached`, `end` and `fail` ends it."""

    def __init__(self, reporter: Reporter, number: int) -> None:
        self._reporter = reporter
        self.number = number

    def output(self, stream: int, data: bytes) -> None:
        """Tell what a command wrote."""
        self._reporter.tell(BuildEvent(kind="output", step=self.number, stream=stream, data=data))

    def progress(self, text: str, done: int, total: int | None) -> None:
        """Tell how far something long has come."""
        self._reporter.tell(
            BuildEvent(kind="progress", step=self.number, text=text, done=done, total_bytes=total)
        )

    def cached(self, digest: str = "") -> None:
        """Say that it was done before."""
        self._reporter.tell(BuildEvent(kind="cached", step=self.number, digest=digest))

    def end(self, digest: str = "", *, total: int = 0) -> None:
        """Say that it is done; `total` are the instructions that are to come."""
        self._reporter.tell(BuildEvent(kind="done", step=self.number, digest=digest, total=total))

    def fail(self, reason: str) -> None:
        """Say that it failed."""
        self._reporter.tell(BuildEvent(kind="error", step=self.number, text=reason))


class Reporter:
    """Numbers the steps of one build and hands its events on, one at a time."""

    def __init__(self, progress: BuildProgress) -> None:
        self._progress = progress
        self._count = 0
        self._lock = threading.Lock()
        self.warnings: list[str] = []

    def tell(self, event: BuildEvent) -> None:
        """Hand on an event, with the time."""
        with self._lock:
            self._progress(msgspec.structs.replace(event, time=time.time()))

    def begin(
        self, name: str, *, stage: str = "", number: int = 0, total: int = 0, text: str = ""
    ) -> Step:
        """Begin a step."""
        with self._lock:
            self._count += 1
            step = Step(self, self._count)
        self.tell(
            BuildEvent(
                kind="start",
                step=step.number,
                name=name,
                stage=stage,
                number=number,
                total=total,
                text=text,
            )
        )
        return step

    def warn(self, text: str) -> None:
        """Tell what is amiss without stopping."""
        self.warnings.append(text)
        self.tell(BuildEvent(kind="warning", text=text))

    def image(self, digest: str) -> None:
        """Tell the image that came out."""
        self.tell(BuildEvent(kind="image", digest=digest))
