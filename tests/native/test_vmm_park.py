"""A launch that waits in a template, and goes on under another monitor."""

from __future__ import annotations

import signal
import struct

import pytest

from hutch.plan import ops, wire
from hutch.process import MachineFailed
from hutch.process import frames as fr
from hutch.process.vmm import parked_rest
from tests.native.machines import ADOPT, HELLO, PLAN, SPAWN, WAIT_S, Machine, Machines, Process
from tests.requires import requires

pytestmark = [requires("root", "cc"), pytest.mark.integration]

NUMBER = 2


def parked(machine: Machine) -> Process:
    machine.peer.welcome()
    process = Process(machine.peer, machine.config.plan)
    process.tell(fr.PID, struct.pack("<ii", 7, 6))
    process.tell(fr.SYNC, struct.pack("<I", NUMBER))
    machine.link.wait_started(WAIT_S)
    return process


def test_a_launch_that_waits_is_told_as_started(machines: Machines) -> None:
    with machines.run(plan=PLAN, park=True, volatile=True) as machine:
        parked(machine)
        machine.supervisor.signal(signal.SIGTERM)
        assert machine.supervisor.wait(WAIT_S).code == 0


def test_without_being_asked_for_a_sync_is_nothing(machines: Machines) -> None:
    with machines.run(plan=PLAN, volatile=True) as machine:
        machine.peer.welcome()
        process = Process(machine.peer, machine.config.plan)
        process.tell(fr.SYNC, struct.pack("<I", NUMBER))
        process.started()
        machine.link.wait_started(WAIT_S)
        process.exit(0)
        assert machine.supervisor.wait(WAIT_S).code == 0


def test_a_launch_that_fails_before_it_waits_is_a_failure(machines: Machines) -> None:
    with machines.run(plan=PLAN, park=True) as machine:
        machine.peer.welcome()
        process = Process(machine.peer, machine.config.plan)
        process.tell(fr.FAILED, struct.pack("<Ii", 3, 2) + b"/x", 3)
        with pytest.raises(Exception, match="/x"):
            machine.link.wait_started(WAIT_S)


def test_a_guest_that_waits_before_it_has_its_plan_is_refused(machines: Machines) -> None:
    with machines.run(plan=b"p" * (2 << 20), park=True) as machine:
        machine.peer.welcome()
        channel = machine.peer.opened(SPAWN)
        machine.peer.data(channel, fr.encode_frame(fr.SYNC, struct.pack("<I", NUMBER)))
        with pytest.raises(MachineFailed, match="too early"):
            machine.link.wait_started(WAIT_S)


def _adopted(machine: Machine) -> int:
    hello = machine.peer.frame()  # and nothing before it
    assert (hello.type, hello.flag) == (HELLO, 1)
    machine.peer.send(0, HELLO, hello.payload[:8] + struct.pack("<IIQ", 1, 512, 123))
    return machine.peer.opened(ADOPT)


@pytest.mark.parametrize("padding", [10, 60_000])
def test_what_waits_is_sent_the_rest_and_runs(machines: Machines, padding: int) -> None:
    rest = (ops.Exec(argv=("true", "x" * padding), env=()),)
    plan = parked_rest(NUMBER, rest)
    assert plan == struct.pack("<I", NUMBER) + wire.encode_rest(rest)
    wanted = fr.encode_frame(fr.ATTACH, b"", 15) + fr.encode_frame(fr.GO, plan)
    with machines.run(plan=plan, adopt=True, volatile=True) as machine:
        peer = machine.peer
        channel = _adopted(machine)
        assert peer.collected(channel, len(wanted)) == wanted
        peer.data(channel, fr.encode_frame(fr.OK, b"", fr.ATTACH))
        peer.data(channel, fr.encode_frame(fr.STARTED, struct.pack("<Q", 5)))
        machine.link.wait_started(WAIT_S)
        peer.data(channel, fr.encode_frame(fr.OUTPUT, b"on", 1))
        peer.data(channel, fr.encode_frame(fr.EXIT, struct.pack("<iiQQ", 3, 0, 1, 2)))
        status, out, _ = machine.supervisor.collect(timeout_s=WAIT_S)
    assert (status.code, out) == (3, b"on")


def test_what_waited_and_has_ended_cannot_go_on(machines: Machines) -> None:
    plan = parked_rest(NUMBER, (ops.Exec(argv=("true",), env=()),))
    with machines.run(plan=plan, adopt=True) as machine:
        machine.peer.close(_adopted(machine), 3)
        with pytest.raises(MachineFailed, match="the process has ended"):
            machine.link.wait_started(WAIT_S)
