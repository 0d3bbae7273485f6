"""Run the quick checks one beside the other: format, lint, types, import rules, unit tests.

Everything runs even where something fails; the output of what failed is printed at the end.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PYTHON_TREES = ["src", "tests", "bench", "scripts"]

CHECKS: dict[str, list[str]] = {
    "format": [str(BIN / "ruff"), "format", "--check", *PYTHON_TREES],
    "lint": [str(BIN / "ruff"), "check", *PYTHON_TREES],
    "imports": [str(BIN / "lint-imports")],
    "types": [str(BIN / "mypy")],
    "unit tests": [sys.executable, "-m", "pytest", "-q", "-m", "unit", "-n", "2"],
}


def main() -> int:
    began = time.monotonic()
    running = {
        name: subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name, command in CHECKS.items()
    }
    failed: dict[str, str] = {}
    for name, process in running.items():
        output, _ = process.communicate()
        verdict = "ok" if process.returncode == 0 else "FAILED"
        last = output.strip().splitlines()[-1:] or [""]
        print(f"{name:12} {verdict:6} {last[0].strip('= ')}", flush=True)
        if process.returncode != 0:
            failed[name] = output
    for name, output in failed.items():
        print(f"\n--- {name} ---\n{output}")
    print(f"{len(CHECKS) - len(failed)} of {len(CHECKS)} ok in {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
