"""How long fuzzing goes on: `HUTCH_FUZZ=50` does fifty times as much, from another seed.

In the suite it takes seconds, and finds what it found the day before. `HUTCH_FUZZ_SEED` says
where a longer run began, to repeat it.
"""

from __future__ import annotations

import os
import random

from hypothesis import settings

__all__ = ["LONGER", "dice", "rounds", "thorough"]

LONGER = int(os.environ.get("HUTCH_FUZZ", "1"))
_SEED = os.environ.get("HUTCH_FUZZ_SEED", str(random.randrange(1 << 32)) if LONGER > 1 else "0")


def rounds(usual: int) -> int:
    """Return how often to try what is tried so often in the suite."""
    return usual * LONGER


def dice(number: int) -> random.Random:
    """Return a source of chance of its own for one test; a longer run tells its seed."""
    if LONGER > 1:
        print(f"HUTCH_FUZZ_SEED={_SEED}")
    return random.Random(number if _SEED == "0" else f"{_SEED}/{number}")


def thorough(usual: settings) -> settings:
    """Return Hypothesis' settings for as many examples."""
    return settings(usual, max_examples=rounds(usual.max_examples), derandomize=LONGER == 1)
