"""The life of an instance: made, started, asked to stop, killed, paused, started again, removed."""

from __future__ import annotations

import pytest

from hutch.engine import Engine
from hutch.errors import AlreadyExists, NotFound, OperationTimeout, WrongState
from hutch.lifecycle import State
from tests.engine.behaviours.conftest import Maker
from tests.engine.behaviours.waiting import DEADLINE_S, until

TRAP = "trap 'echo bye; exit 7' TERM; trap 'exit 9' USR1; echo up; while :; do sleep 0.1; done"


def _is_up(engine: Engine, name: str) -> bool:
    return any(record.data == b"up\n" for record in engine.get(name).logs())


def test_an_instance_is_made_then_started_then_ends(make: Maker) -> None:
    with make.create("echo done; exit 3") as one:
        assert one.info().state == State.CREATED
        one.start()
        assert one.wait(timeout=DEADLINE_S) == 3
        info = one.info()
        assert (info.state, info.exit_code, info.pid, info.error) == (State.EXITED, 3, 0, "")
        assert 0 < info.created_ns <= info.started_ns <= info.finished_ns


def test_a_start_of_what_runs_does_nothing(make: Maker) -> None:
    with make.start() as one:
        pid = one.info().pid
        one.start()
        assert one.info().pid == pid


def test_what_it_wrote_is_there_at_the_next_start(make: Maker) -> None:
    with make.start("cat /kept 2>/dev/null; echo again >> /kept") as one:
        one.wait(timeout=DEADLINE_S)
        one.start()
        one.wait(timeout=DEADLINE_S)
        assert [record.data for record in one.logs()] == [b"again\n"]


def test_stop_lets_the_program_end_in_its_own_way(make: Maker) -> None:
    with make.start(TRAP) as one:
        until(lambda: _is_up(make.engine, one.name), "not up")
        one.stop(timeout=DEADLINE_S)
        assert one.info().exit_code == 7
        assert [record.data for record in one.logs()][-1] == b"bye\n"


def test_stop_sends_the_signal_that_was_asked_for(make: Maker) -> None:
    with make.start(TRAP, stop_signal="USR1") as one:
        until(lambda: _is_up(make.engine, one.name), "not up")
        one.stop(timeout=DEADLINE_S)
        assert one.info().exit_code == 9


def test_stop_kills_a_program_that_does_not_listen(make: Maker) -> None:
    with make.start("trap '' TERM; echo up; while :; do sleep 0.1; done") as one:
        until(lambda: _is_up(make.engine, one.name), "not up")
        one.stop(timeout=0.2)
        assert one.info().exit_code == 137


def test_stop_of_what_does_not_run_is_no_error(make: Maker) -> None:
    with make.create() as one:
        one.stop()
        assert one.info().state == State.CREATED


def test_kill_ends_it_and_a_restart_makes_it_run_again(make: Maker) -> None:
    with make.start() as one:
        one.kill()
        assert (one.info().state, one.info().exit_code) == (State.EXITED, 137)
        with pytest.raises(WrongState, match="not running"):
            one.kill()
        one.restart(timeout=0)
        assert one.exec(["true"]).exit_code == 0
        first = one.info().pid
        one.restart(timeout=0)
        assert one.info().pid != first
        assert one.exec(["true"]).exit_code == 0


def test_what_goes_with_its_end_is_not_restarted(make: Maker) -> None:
    with make.start(remove=True) as one:
        with pytest.raises(WrongState, match="removed when it ends"):
            one.restart(timeout=0)
        assert one.exec(["true"]).exit_code == 0


def test_a_signal_reaches_the_program(make: Maker) -> None:
    with make.start(TRAP) as one:
        until(lambda: _is_up(make.engine, one.name), "not up")
        one.kill("USR1")
        assert one.wait(timeout=DEADLINE_S) == 9


def test_a_wait_ends_when_its_time_is_over(make: Maker) -> None:
    with make.start() as one, pytest.raises(OperationTimeout):
        one.wait(timeout=0.05)


def test_a_paused_instance_stands_still(make: Maker) -> None:
    with make.start("i=0; while :; do echo $i > /count; i=$((i + 1)); done") as one:
        until(lambda: one.files.exists("/count"), "does not count")
        one.pause()
        assert one.info().state == State.PAUSED
        with pytest.raises(WrongState, match="paused"):
            one.exec(["true"])
        with pytest.raises(WrongState):
            one.pause()
        one.unpause()
        assert one.info().state == State.RUNNING
        before = one.files.read("/count")
        until(lambda: one.files.read("/count") != before, "does not go on")
        with pytest.raises(WrongState):
            one.unpause()


def test_a_paused_instance_can_be_killed(make: Maker) -> None:
    with make.start() as one:
        one.pause()
        one.kill()
        assert (one.info().state, one.info().exit_code) == (State.EXITED, 137)


def test_a_running_instance_is_removed_only_by_force(make: Maker) -> None:
    one = make.start()
    with pytest.raises(WrongState, match="running"):
        one.remove()
    one.remove(force=True)
    with pytest.raises(NotFound):
        make.engine.get(one.id)


def test_an_instance_is_found_under_its_new_name_only(make: Maker, kind: str) -> None:
    with make.create(name=f"old-{kind}") as one:
        one.rename(f"new-{kind}")
        assert make.engine.get(f"new-{kind}").id == one.id
        with pytest.raises(NotFound):
            make.engine.get(f"old-{kind}")


def test_a_name_is_given_once(make: Maker, kind: str) -> None:
    with make.create(name=f"twice-{kind}"), pytest.raises(AlreadyExists, match="is taken"):
        make.create(name=f"twice-{kind}")


@pytest.mark.parametrize("code", [0, 1, 125, 126, 127, 128, 255])
def test_the_exit_code_is_the_programs(make: Maker, code: int) -> None:
    assert make.sh(f"exit {code}").exit_code == code


@pytest.mark.parametrize(("signal", "code"), [("TERM", 143), ("KILL", 137), ("SEGV", 139)])
def test_a_signals_exit_code_is_128_and_its_number(make: Maker, signal: str, code: int) -> None:
    # As the first process it would be spared its own signals.
    assert make.sh(f"sh -c 'kill -{signal} $$'; exit $?").exit_code == code


def test_a_program_that_is_not_there_is_told_by_127(make: Maker) -> None:
    with pytest.raises(Exception, match="not found in the image") as failure:
        make.run("/no/such/program")
    assert getattr(failure.value, "exit_code", 0) == 127


def test_a_program_that_cannot_be_run_is_told_by_126(make: Maker) -> None:
    with pytest.raises(Exception, match="permission denied") as failure:
        make.run("/etc/passwd")
    assert getattr(failure.value, "exit_code", 0) == 126


def test_auto_remove_leaves_nothing(make: Maker) -> None:
    one = make.start("exit 0", remove=True)

    def gone() -> bool:
        try:
            make.engine.get(one.id).info()
        except NotFound:
            return True
        return False

    until(gone, "not removed")


def test_a_failing_program_is_started_again_as_often_as_was_said(make: Maker) -> None:
    with make.start("exit 3", restart="on-failure:2") as one:
        until(lambda: one.info().restart_count == 2, "not started twice")
        until(lambda: one.info().state == State.EXITED, "still going")
        assert one.info().exit_code == 3


def test_always_means_until_somebody_stops_it(make: Maker) -> None:
    with make.start("exit 4", restart="always") as one:
        until(lambda: one.info().restart_count >= 2, "not started again")
        one.stop(timeout=0)
        assert one.info().state == State.EXITED


def test_events_tell_of_its_life(make: Maker) -> None:
    with make.start("exit 5") as one:
        one.wait(timeout=DEADLINE_S)
        until(lambda: one.info().state == State.EXITED, "not booked")
        wanted = {"container": [one.id]}
        told = [event.action for event in make.engine.events(since=0, follow=False, filters=wanted)]
        assert told == ["create", "start", "die"]
