"""Wait for what an instance does in its own time."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["DEADLINE_S", "until"]

DEADLINE_S = 200.0


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until the condition holds; `what` says what did not happen."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
