"""Run the whole suite: tests that need the machine to themselves first, then the rest in parallel.

Both runs are pytest's; the second one's closing line ends the output. Arguments go to both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

NO_TESTS_COLLECTED = 5


def pytest(*arguments: str) -> int:
    """Run pytest in the root of the checkout; an empty selection is no failure."""
    # Why a test was tried again, and where the minutes go.
    told = ("--rerun-show-tracebacks", "--durations=60", "--durations-min=5")
    command = [sys.executable, "-m", "pytest", *told, *arguments, *sys.argv[1:]]
    print("+ pytest", *arguments, *sys.argv[1:], flush=True)
    status = subprocess.run(command, cwd=Path(__file__).parent.parent).returncode
    return 0 if status == NO_TESTS_COLLECTED else status


def main() -> int:
    workers = os.environ.get("HUTCH_TEST_WORKERS", "3")
    serial = pytest("-q", "-m", "serial")
    # The order is that of tests/conftest.py, not that of how many tests a module has.
    spread = ("-n", workers, "--dist", "loadscope", "--no-loadscope-reorder")
    rest = pytest("-q", "-m", "not serial", *spread)
    if serial:
        print("the serial tests failed; see the first run above", file=sys.stderr)
    return serial or rest


if __name__ == "__main__":
    sys.exit(main())
