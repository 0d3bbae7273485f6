"""Storms beside a protected instance: it answers each request, has the processor time that its
share is, and keeps its memory; when the storm is over everything is as before."""

from __future__ import annotations

import pytest

from hutch.engine import Engine, Instance
from hutch.engine.session import Session
from tests.requires import requires
from tests.resources.test_pressure import MIB, hold, small, start, until, usage

__all__ = ["small"]

pytestmark = [
    requires("root", "cgroup", "overlayfs", "seccomp", "busybox"),
    pytest.mark.integration,
]

ANSWER_S = 60.0
HOGS = {
    "processors": "for i in 1 2 3 4 5 6 7 8; do while :; do :; done & done; wait",
    "memory": "while :; do x=$(head -c 40000000 /dev/zero | tr '\\0' x); x=; done",
    "files": "while :; do dd if=/dev/zero of=/tmp/x bs=1M count=200 conv=notrunc; done",
    "disk": "while :; do dd if=/dev/zero of=/tmp/x bs=64k count=200 conv=fsync; done",
    "forks": "f() { f | f & }; f; exec sleep 1000",
}
SERVER = "while read line; do md5sum /tmp/data >/dev/null; echo $line; done"


def ask(server: Session, count: int = 10) -> None:
    """Have so many requests answered, one after the other."""
    for number in range(count):
        server.send(b"%d\n" % number)
        said = b""
        for piece in server.output(timeout=ANSWER_S):
            said += getattr(piece, "data", b"")
            if said.endswith(b"%d\n" % number):
                break
        assert said == b"%d\n" % number


def storm(engine: Engine, script: str) -> Instance:
    """Start a hog, of no more than 40 processes, and wait until it is at work."""
    box = engine.start(
        "busybox", ["sh", "-c", f"exec 2>/dev/null; {script}"], network="none", pids_limit=40
    )
    until(lambda: box.stats().cpu.total_ns > 1_000_000, "the storm does not rise")
    return box


@pytest.mark.parametrize("hog", HOGS)
def test_each_request_of_a_protected_one_is_answered_beside_a_hog(small: Engine, hog: str) -> None:
    data = "dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null"
    kept = start(small, "kept", f"{hold(10)}; {data}", memory_reservation="64M", cpu_shares=8192)
    with kept.exec_stream(["sh", "-c", SERVER], stdin=True) as server:
        ask(server)
        box = storm(small, HOGS[hog])
        ask(server)
        assert kept.exec(["echo", "here"]).text == "here\n"
        assert usage(small, "kept") >= 10 * MIB and not kept.info().oom_killed
        box.remove(force=True)
        ask(server)
    assert [use.name for use in small.resources.memory().instances] == ["kept"]


def test_processor_time_goes_by_shares(small: Engine) -> None:
    """On every processor both have work all the time: what they get is their shares' matter."""
    burn = HOGS["processors"]
    kept = small.start("busybox", ["sh", "-c", burn], network="none", cpu_shares=8192)
    hog = small.start("busybox", ["sh", "-c", burn], network="none")
    for box in (kept, hog):
        until(lambda box=box: box.stats().pids.current >= 8, "not at work")  # type: ignore[misc]
    before = [box.stats().cpu.total_ns for box in (kept, hog)]
    until(lambda: kept.stats().cpu.total_ns > before[0] + 1_500_000_000, "has no time")
    given = [box.stats().cpu.total_ns - had for box, had in zip((kept, hog), before, strict=True)]
    # Eight to one; loads on other processors' queues are balanced in turns only.
    assert given[0] > 2 * given[1]
