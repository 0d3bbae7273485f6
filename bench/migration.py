"""The cases of migration: how long a machine that writes 20 MB/s to its memory stands still.

It goes to and fro between two roots on this host, so the link is as fast as can be: what is
measured is what QEMU and hutch take to switch over. QEMU is the one that `scripts/setup`
unpacked where the host's cannot copy an emulated machine that runs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.machines import machines_root
from bench.measure import Row, measure
from bench.stage import IMAGE

if TYPE_CHECKING:
    from bench.cases import Peers
    from bench.stage import Stage

__all__ = ["MIGRATION_CASES"]

_MEMORY = "512M"
# 2 MB of noise, copied over the same 64 MB of memory twenty times in two seconds.
_WRITER = """
head -c 2097152 /dev/urandom > /dev/shm/noise
i=0
while :; do
  dd if=/dev/shm/noise of=/dev/shm/written bs=2M seek=$i conv=notrunc 2>/dev/null
  i=$(((i + 1) % 32)); sleep 0.1
done
"""
_NEWER = Path(__file__).parent.parent / f"build/qemu/usr/bin/qemu-system-{os.uname().machine}"


@contextmanager
def _qemu(path: Path | None) -> Iterator[None]:
    """Let hutch use this QEMU, or the host's own."""
    before = os.environ.pop("HUTCH_QEMU", None)
    if path is not None:
        os.environ["HUTCH_QEMU"] = str(path)
    try:
        yield
    finally:
        os.environ.pop("HUTCH_QEMU", None)
        if before is not None:
            os.environ["HUTCH_QEMU"] = before


class _Traveller:
    """A machine that goes to and fro."""

    def __init__(self, name: str, stage: Stage, held: ExitStack, qemu: Path | None) -> None:
        import hutch

        self._name = name
        self._qemu = qemu
        self._roots = [machines_root(), tempfile.mkdtemp(prefix="hutch-bench-target-")]
        held.callback(shutil.rmtree, self._roots[1], ignore_errors=True)
        with _qemu(qemu):
            self._engines: list[Any] = [
                held.enter_context(hutch.Engine(root)) for root in self._roots
            ]
            self._engines[0].images.import_(str(stage.tar), IMAGE)
            held.callback(self._remove)
            self._engines[0].start(
                IMAGE, ["sh", "-c", _WRITER], name=name, isolation="vm", memory=_MEMORY
            )

    def _remove(self) -> None:
        for engine in self._engines:
            for info in engine.list(all=True):
                engine.get(info.id).remove(force=True, volumes=True)
            engine._context.driver("vm").prune_templates()

    def go(self, way: str, **options: Any) -> float:
        """Move it to the other root; return the seconds that it stood still."""
        argv = [sys.executable, "-m", "hutch", "--root", str(self._roots[1]), "_migrate_target"]
        with _qemu(self._qemu):
            done = self._engines[0].migrate(self._name, f"exec:{shlex.join(argv)}", **options)
        # With little left QEMU sends it all at once, post-copy or not.
        if done.problem or done.way not in (way, "pre-copy"):
            raise RuntimeError(f"went by {done.way}: {done.problem}")
        self._engines.reverse()
        self._roots.reverse()
        return float(done.downtime_s)


def _newer() -> Path | None:
    """Return the QEMU that copies what runs, None where the host's own does."""
    from hutch.host.qemu import load_qemu

    if load_qemu(None).version.sees_emulated_writes:
        return None
    if not _NEWER.exists():
        raise RuntimeError("no QEMU 9 or later: run scripts/setup")
    return _NEWER


def migration(stage: Stage, with_peers: Peers, rounds: int) -> list[Row]:
    """A 512 MB machine that writes 20 MB/s, by pre-copy and post-copy; beside them one of the
    host's QEMU that is stopped for it, where that cannot do better."""
    rounds = max(3, rounds // 4)
    with ExitStack() as held:
        newer = _newer()
        live = _Traveller("live", stage, held, newer)
        ways: dict[str, Any] = {"hutch": lambda: live.go("pre-copy")}
        if newer is not None:
            stopped = _Traveller("stopped", stage, held, None)
            ways["stop-and-copy"] = lambda: stopped.go("stop-and-copy")
        by_pre_copy = measure(
            "machine that writes 20 MB/s: stands still in migration",
            ways,
            rounds=rounds,
            targets={"median ms": 300},
            warm_up=0,
        )
        by_post_copy = measure(
            "the same by post-copy",
            {"hutch": lambda: live.go("post-copy", post_copy=True)},
            rounds=rounds,
            targets={"median ms": 100},
            warm_up=0,
        )
    return [by_pre_copy, by_post_copy]


MIGRATION_CASES = {"vm-migration": migration}
