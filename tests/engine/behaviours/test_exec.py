"""Further programs in a running instance."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from hutch.drivers.failures import CommandFailed
from hutch.engine import Instance
from hutch.errors import Exhausted, InvalidArgument, OperationTimeout
from hutch.process.frames import Output
from tests.engine.behaviours.conftest import Maker, Sh
from tests.engine.behaviours.waiting import DEADLINE_S, until


def test_output_errors_and_input_are_apart(box: Instance) -> None:
    done = box.exec(["sh", "-c", "cat; echo err >&2"], input=b"in")
    assert (done.exit_code, done.stdout, done.stderr) == (0, b"in", b"err\n")


@pytest.mark.parametrize("code", [0, 1, 42, 125, 126, 127, 128, 137, 254, 255])
def test_the_exit_code_is_the_programs(box: Instance, code: int) -> None:
    assert box.exec(["sh", "-c", f"exit {code}"]).exit_code == code


@pytest.mark.parametrize(("signal", "code"), [("TERM", 143), ("KILL", 137), ("ABRT", 134)])
def test_a_signals_exit_code_is_128_and_its_number(box: Instance, signal: str, code: int) -> None:
    assert box.exec(["sh", "-c", f"kill -{signal} $$"]).exit_code == code


@pytest.mark.parametrize(("program", "code"), [("/no/such", 127), ("/etc/passwd", 126)])
def test_a_program_that_cannot_be_started_is_told(box: Instance, program: str, code: int) -> None:
    with pytest.raises(Exception, match=program) as failure:
        box.exec([program])
    assert getattr(failure.value, "exit_code", 0) == code


@pytest.mark.parametrize(
    ("user", "ids"), [("nobody", "65534:65534"), ("7:8", "7:8"), ("daemon", "1:1"), (None, "0:0")]
)
def test_the_user_is_found_by_name_and_number(box: Instance, user: str | None, ids: str) -> None:
    done = box.exec(["sh", "-c", "echo $(id -u):$(id -g)"], user=user)
    assert done.text.strip() == ids


def test_the_environment_is_the_instances_with_more_on_top(inside: Sh) -> None:
    assert inside("echo $COLOUR $SHAPE", env={"SHAPE": "round"}) == "green round"
    assert inside("echo $COLOUR", env=["COLOUR=red"]) == "red"


def test_the_working_directory_is_as_asked(inside: Sh) -> None:
    assert inside("pwd", workdir="/usr") == "/usr"


def test_it_sees_the_instances_own_processes_and_files(inside: Sh) -> None:
    assert inside("cat /proc/1/cmdline | tr '\\0' ' '") == "sleep 1000"
    assert inside("touch /scratch/mine; ls /scratch") == "mine"
    assert inside("hostname") == "shared"


def test_a_terminal_of_its_own(box: Instance) -> None:
    with box.exec_stream(["sh", "-c", "tty; stty size"], tty=True, rows=20, columns=70) as session:
        seen = b"".join(p.data for p in session.output(DEADLINE_S) if isinstance(p, Output))
        assert session.wait(DEADLINE_S) == 0
    assert b"/dev/pts/" in seen and b"20 70\r\n" in seen


def test_detached_it_goes_on(box: Instance, inside: Sh) -> None:
    line = "sleep 0.2; echo written > /scratch/later; sleep 1000"
    box.exec_stream(["sh", "-c", line], detach=True).close()
    until(lambda: inside("cat /scratch/later 2>/dev/null") == "written", "did not go on")


def test_left_alone_it_is_ended(box: Instance, inside: Sh) -> None:
    with box.exec_stream(["sh", "-c", "echo here; exec sleep 4321"]) as session:
        next(iter(session.output(DEADLINE_S)))
        assert inside("ps -o args | grep -c '[s]leep 4321'") != "0"
    until(lambda: inside("ps -o args | grep -c '[s]leep 4321'") == "0", "still running")


def test_a_program_that_takes_too_long_is_killed(box: Instance, inside: Sh) -> None:
    with pytest.raises(OperationTimeout, match="did not end"):
        box.exec(["sleep", "5432"], timeout=0.3)
    until(lambda: inside("ps -o args | grep -c '[s]leep 5432'") == "0", "still running")


def test_a_program_that_writes_without_end_is_ended(box: Instance, inside: Sh) -> None:
    with pytest.raises(Exhausted, match="more than 1000 bytes") as caught:
        box.exec(["yes"], limit=1000)
    assert caught.value.stdout == b"y\n" * 500
    until(lambda: inside("ps -o args | grep -cx '[y]es'") == "0", "still running")


def test_a_signal_is_handed_on(box: Instance) -> None:
    script = "trap 'exit 5' USR1; echo up; while :; do sleep 0.1; done"
    with box.exec_stream(["sh", "-c", script]) as session:
        next(iter(session.output(DEADLINE_S)))
        session.signal(10)
        assert session.wait(DEADLINE_S) == 5


def test_thirty_at_once_each_get_their_own(box: Instance) -> None:
    def one(number: int) -> tuple[int, str]:
        done = box.exec(["sh", "-c", f"cat; exit {number}"], input=b"%d" % number)
        return done.exit_code, done.text

    with ThreadPoolExecutor(30) as pool:
        assert list(pool.map(one, range(30))) == [(n, str(n)) for n in range(30)]


def test_a_megabyte_each_way(box: Instance) -> None:
    data = bytes(range(256)) * 4096
    assert box.exec(["cat"], input=data).stdout == data


def test_it_is_not_possible_in_what_does_not_run(make: Maker) -> None:
    with make.create() as one, pytest.raises(Exception, match="not running"):
        one.exec(["true"])


def test_a_further_program_has_the_limits_of_the_first(make: Maker) -> None:
    with make.start(ulimits=["nofile=123:456", "core=0"]) as box:
        shown = box.exec(["sh", "-c", "ulimit -n; ulimit -Hn; ulimit -c"]).text
        assert shown.split() == ["123", "456", "0"]


def test_a_hundred_thousand_arguments_arrive(box: Instance) -> None:
    words = map(str, range(100_000, 200_000))
    done = box.exec(["sh", "-c", 'shift 99998; echo "$# $0 $*"', "name", *words])
    assert (done.exit_code, done.text.strip()) == (0, "2 name 199998 199999")


def test_more_arguments_than_the_kernel_takes_are_told(box: Instance) -> None:
    with pytest.raises(CommandFailed, match="too long") as failure:
        box.exec(["true", *[""] * 250_000])
    assert "2 MiB" in str(failure.value.hint)
    with pytest.raises(InvalidArgument, match="command: more than"):
        box.exec(["true", *[""] * 300_000])
