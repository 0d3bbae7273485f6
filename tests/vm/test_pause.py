"""Pausing a machine that may stand still already, for want of room on the host."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import pytest

from hutch.drivers.vm.running import RunningMachines
from hutch.errors import WrongState
from hutch.qmp import Monitor


class _Qemu:
    """Answers `query-status` with one state after the other, and counts what it is told."""

    def __init__(self, *states: str) -> None:
        self.states = list(states)
        self.stops = 0

    def execute(self, command: str) -> None:
        assert command == "stop"
        self.stops += 1

    def ask(self, command: str, kind: Any) -> Any:
        assert command == "query-status" and self.stops
        return kind(status=self.states.pop(0), running=False)


class _Driver(RunningMachines):
    def __init__(self, qemu: _Qemu) -> None:
        self.qemu = qemu

    def _monitor(self, identifier: str) -> AbstractContextManager[Monitor]:
        return nullcontext(cast(Monitor, self.qemu))


@pytest.mark.parametrize("states", [("paused",), ("running", "paused"), ("suspended",)])
def test_a_machine_is_paused_when_it_says_so(states: tuple[str, ...]) -> None:
    qemu = _Qemu(*states)
    _Driver(qemu).pause("box")
    assert qemu.stops == len(states) and not qemu.states


@pytest.mark.parametrize("states", [("io-error",), ("running", "io-error"), ("running",) * 3])
def test_a_machine_without_room_is_not_said_to_be_paused(states: tuple[str, ...]) -> None:
    with pytest.raises(WrongState, match="no room for what it writes"):
        _Driver(_Qemu(*states)).pause("box")
