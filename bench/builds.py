"""Builds of a Dockerfile of twenty steps: every step anew, and all found again."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from bench.cases import HUTCH, Peers
from bench.measure import Row, measure
from bench.peers import run
from bench.stage import IMAGE, Stage

__all__ = ["BUILD_CASES"]

STEPS = 20
_FILE_BYTES = 100_000


def _context(directory: Path) -> Path:
    """Make a context whose steps are by turns a command and a copy."""
    place = directory / "build"
    place.mkdir(exist_ok=True)
    lines = [f"FROM {IMAGE}"]
    for number in range(STEPS // 2):
        (place / f"file{number}").write_bytes(os.urandom(_FILE_BYTES))
        lines += [f"RUN echo {number} > /made{number}", f"COPY file{number} /copied{number}"]
    (place / "Dockerfile").write_text("\n".join(lines) + "\n")
    return place


def build(stage: Stage, with_peers: Peers, rounds: int) -> list[Row]:
    """The command lines; docker's is its classic builder, as the client builds without a plugin."""
    place = str(_context(stage.directory))
    turns = max(2, rounds // 4)
    with ExitStack() as stack:
        engine = stack.enter_context(stage.engine())
        hutch = [str(HUTCH), "--root", str(engine.root), "build", "-q", "--network", "none"]
        docker = ("build", "-q", "--network", "none")

        def cold() -> Row:
            return measure(
                f"build of {STEPS} steps, every step anew",
                {
                    "hutch": lambda: run([*hutch, "--no-cache", place]),
                    "docker": lambda: with_peers.docker(*docker, "--no-cache", place),
                },
                rounds=turns,
                targets={"docker": 0.5},
            )

        def cached() -> Row:
            return measure(
                f"build of {STEPS} steps, all found again",
                {
                    "hutch": lambda: run([*hutch, place]),
                    "docker": lambda: with_peers.docker(*docker, place),
                },
                rounds=rounds,
                targets={"docker": 1.0},
            )

        return [cold(), cached()]


BUILD_CASES = {"build": build}
