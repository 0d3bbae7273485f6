"""What a protected instance's requests cost beside a hog, beside what they cost an unprotected
one, and alone: half of them, and 99 in 100, are answered within that."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.measure import Row, Samples
from bench.stage import IMAGE

if TYPE_CHECKING:
    from bench.cases import Peers
    from bench.stage import Stage

__all__ = ["PROTECTION_CASES"]

_REQUESTS = 100
_ALL = "192M"
# What a request needs: a process, some processor time, and 8 MiB of files, read again.
_SERVER = "while read line; do md5sum /tmp/data >/dev/null; echo $line; done"
_PREPARE = "dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null; sync; sleep 100000"
_PROTECTION = {"memory_reservation": "64M", "cpu_shares": 8192}
_HOGS = {
    "processors": "for i in 1 2 3 4 5 6 7 8; do while :; do :; done & done; wait",
    "memory": "while :; do x=$(head -c 40000000 /dev/zero | tr '\\0' x); x=; done & "
    "while :; do dd if=/dev/zero of=/tmp/x bs=1M count=200 conv=notrunc; done 2>/dev/null",
    "disk": "while :; do dd if=/dev/zero of=/tmp/x bs=64k count=400 conv=fsync; done 2>/dev/null",
    "a fork bomb": "while :; do for i in 1 2 3 4 5 6 7 8 9; do sh -c : & done; wait; done",
}


@contextmanager
def _bounded(stage: Stage) -> Iterator[Any]:
    """An engine whose instances have a group of their own, with little memory."""
    with stage.engine() as engine:
        parent = f"hutch-bench-{os.getpid()}"
        engine.resources.configure({"parent": parent, "memory": _ALL})
        try:
            yield engine
        finally:
            for info in engine.list(all=True):
                engine.get(info.id).remove(force=True)
            engine.resources.configure({"parent": "none", "memory": "none"})


def _latencies(session: Any) -> list[float]:
    """Ask one after the other; return the seconds to each answer, sorted."""
    taken = []
    for number in range(_REQUESTS):
        wanted = b"%d\n" % number
        began = time.perf_counter()
        session.send(wanted)
        seen = b""
        for piece in session.output(timeout=60):
            seen += piece.data
            if seen.endswith(wanted):
                break
        taken.append(time.perf_counter() - began)
    return sorted(taken)


def _share(taken: list[float], share: float) -> float:
    return taken[math.ceil(share * len(taken)) - 1]


def _beside(hog: str) -> Callable[[Stage, Peers, int], list[Row]]:
    def case(stage: Stage, _peers: Peers, rounds: int) -> list[Row]:
        found: dict[str, list[list[float]]] = {"hutch": [], "unprotected": [], "alone": []}
        with _bounded(stage) as engine, ExitStack() as stack:
            served = {}
            for name, options in (("hutch", _PROTECTION), ("unprotected", {})):
                box = engine.start(IMAGE, ["sh", "-c", _PREPARE], network="none", **options)
                session = box.exec_stream(["sh", "-c", _SERVER], stdin=True)
                served[name] = stack.enter_context(session)
                _latencies(session)
            slowed = _slowed(stage.directory) if hog == "disk" else {}
            for _ in range(max(2, rounds // 4)):
                found["alone"].append(_latencies(served["hutch"]))
                with _hog(engine, hog):
                    for name, session in served.items():
                        found[name].append(_latencies(session))
                if slowed:
                    with _hog(engine, hog, **slowed):
                        taken = _latencies(served["hutch"])
                    found.setdefault("the hog bounded", []).append(taken)
        return [
            Row(
                case=f"a request beside a hog of {hog}, {text}",
                ways={
                    name: Samples(seconds=[_share(taken, share) for taken in rows])
                    for name, rows in found.items()
                },
            )
            for text, share in (("median", 0.5), ("99th percentile", 0.99))
        ]

    return case


def _slowed(directory: Path) -> dict[str, Any]:
    """Return the options that hold a hog of the disk back; none where the files are on no disk."""
    number = os.stat(directory).st_dev
    found = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not found.exists():
        return {}
    found = found.resolve()
    disk = found.parent if (found / "partition").exists() else found
    return {"device_write_bps": [f"/dev/{disk.name}:5mb"]}


@contextmanager
def _hog(engine: Any, hog: str, **bounds: Any) -> Iterator[None]:
    options = {"network": "none", "pids_limit": 64, **bounds}
    box = engine.start(IMAGE, ["sh", "-c", _HOGS[hog]], **options)
    try:
        time.sleep(1.0)  # the storm rises
        yield
    finally:
        box.remove(force=True)


def protection(stage: Stage, with_peers: Peers, rounds: int) -> list[Row]:
    """Each hog in turn."""
    return [row for hog in _HOGS for row in _beside(hog)(stage, with_peers, rounds)]


PROTECTION_CASES = {"protect": protection}
