"""Who cannot be let in for want of a descriptor waits, and nobody's loop runs hot meanwhile."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from hutch.plan import ops
from hutch.process import Launcher, Supervisor
from tests.native.boxes import WAIT_S, Runner, box, deny_descriptors, sleeps, wait_until
from tests.requires import requires

pytestmark = [requires("root", "busybox", "cc"), pytest.mark.integration]


@contextmanager
def denied(pid: int, another: Callable[[], object] | None = None) -> Iterator[Callable[[], None]]:
    """Leave a process no descriptor for the block; give what waits until it has tried and sleeps.

    One that tries again at once would not: it never goes to sleep.
    """
    limit = deny_descriptors(pid, another)
    try:
        before = sleeps(pid)
        yield lambda: wait_until(lambda: sleeps(pid) > before, "the process to sleep")
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)


def test_a_supervisor_lets_a_client_in_later(
    runner: Runner, rootfs: Path, held: ops.Supervision
) -> None:
    with runner.running(box(rootfs, ["sleep", "100"], held=held)) as starter, ExitStack() as stack:

        def another() -> Supervisor:
            client = stack.enter_context(Supervisor.connect(held.directory))
            client.query()
            return client

        last = another()
        pid = starter.supervisor_pid
        assert pid is not None
        with denied(pid, another) as wait_asleep:
            late = stack.enter_context(Supervisor.connect(held.directory))
            wait_asleep()
            starter.query()  # the others are served
            later = stack.enter_context(Supervisor.connect(held.directory))
            last.close()  # one place, for the first who waits
            assert late.query().phase == "running"
            wait_asleep()
        assert later.query().phase == "running"  # and nobody has left


def test_a_templates_holder_lets_a_client_in_later(
    static_launcher: Launcher, static_vmm: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "memory.sock")
    plan = ops.Plan(
        child=(
            ops.SetsidTty(),
            ops.Inherit(slots=(0, 1)),
            ops.Exec(argv=(static_vmm, "hold", "1000"), env=()),
        ),
        slots=2,
        supervision=ops.Supervision(linger=False),
    )
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(path)
        server.listen()
        memory = stack.enter_context(open(os.devnull, "rb"))
        fds = (memory.fileno(), server.fileno())
        holder = stack.enter_context(static_launcher.start(plan, fds))
        holder.wait_started(WAIT_S)
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.settimeout(WAIT_S)
        assert holder.pid is not None
        with denied(holder.pid) as wait_asleep:
            client.connect(path)
            wait_asleep()
        _, (given,), _, _ = socket.recv_fds(client, 1, 1)
        assert os.path.sameopenfile(given, memory.fileno())
        os.close(given)
        holder.shutdown()
        holder.wait(WAIT_S)
