"""The supervisor's streams: input, terminals, several clients, slow clients, the log."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from hutch.plan import flags, ops
from hutch.process import Gap, Output, Supervisor, read_log
from tests.native.boxes import (
    WAIT_S,
    Runner,
    box,
    is_stopped,
    read_until,
    shell,
    unread,
    wait_until,
)
from tests.requires import requires

pytestmark = [requires("root", "busybox", "cc"), pytest.mark.integration]

OPEN = ops.Supervision(stdin_open=True)


def test_input_reaches_the_program_whole(runner: Runner, rootfs: Path) -> None:
    data = os.urandom(2 << 20)
    status, out, _ = runner.run(box(rootfs, ["cat"], held=OPEN), input=data)
    assert status.code == 0
    assert out == data


def test_input_that_nobody_reads_does_not_block(runner: Runner, rootfs: Path) -> None:
    plan = shell(rootfs, "exec 0<&-; sleep 0.05; exit 4", held=OPEN)
    status, _, _ = runner.run(plan, input=bytes(1 << 20))
    assert status.code == 4


def test_a_request_passes_input_that_is_stuck(runner: Runner, rootfs: Path) -> None:
    plan = box(rootfs, ["sleep", "100"], held=OPEN, clone_flags=flags.CLONE_NEWNS)
    with runner.start(plan) as supervisor:
        supervisor.wait_started(WAIT_S)
        supervisor.send_stdin(bytes(supervisor.stdin_room))
        supervisor.signal(9)
        assert supervisor.wait(WAIT_S).signal == 9


def test_without_an_open_stdin_the_program_reads_the_end(runner: Runner, rootfs: Path) -> None:
    status, out, _ = runner.run(box(rootfs, ["cat"]), input=b"unwanted")
    assert (status.code, out) == (0, b"")


def test_stdin_once_ends_the_input_when_its_client_leaves(
    runner: Runner, rootfs: Path, run_dir: Path
) -> None:
    held = ops.Supervision(stdin_open=True, stdin_once=True, directory=str(run_dir))
    with runner.start(box(rootfs, ["cat"], held=held), attach=0) as starter:
        starter.wait_started(WAIT_S)
        with Supervisor.connect(str(run_dir)) as client:
            client.attach(stdin=True)
            client.send_stdin(b"last words")
        assert starter.wait(WAIT_S).code == 0


def test_input_stays_open_for_the_next_client(
    runner: Runner, rootfs: Path, held: ops.Supervision
) -> None:
    import msgspec

    held = msgspec.structs.replace(held, stdin_open=True)
    with runner.running(box(rootfs, ["cat"], held=held), attach=0):
        for text in (b"first\n", b"second\n"):
            with Supervisor.connect(held.directory) as client:
                client.attach(stdin=True)
                client.send_stdin(text)
                assert read_until(client, text) == text


def test_a_user_may_reopen_dev_stdout(runner: Runner, rootfs: Path) -> None:
    plan = shell(
        rootfs,
        "echo out >/dev/stdout; echo err >/dev/stderr",
        after_pivot=[ops.User(uid=1000, gid=1000)],
    )
    status, out, err = runner.run(plan)
    assert (status.code, out, err) == (0, b"out\n", b"err\n")


# ---- terminals ------------------------------------------------------------------------

TTY = ops.Supervision(tty=True, stdin_open=True)


def test_a_terminal_is_controlling_and_sized(runner: Runner, rootfs: Path) -> None:
    script = "tty; stty size; echo typed >/dev/tty; [ -c /dev/console ] && echo console"
    status, out, err = runner.run(shell(rootfs, script, held=TTY, tty=True))
    assert out.splitlines() == [b"/dev/pts/0", b"24 80", b"typed", b"console"]
    assert (status.code, err) == (0, b"")


def test_a_terminal_is_resized(runner: Runner, rootfs: Path) -> None:
    script = "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.01; done"
    with runner.running(shell(rootfs, script, held=TTY, tty=True)) as supervisor:
        read_until(supervisor, b"ready")
        supervisor.resize(33, 99)
        assert b"33 99" in read_until(supervisor, b"33 99")


def test_a_resize_without_a_terminal_is_refused(runner: Runner, rootfs: Path) -> None:
    with (
        runner.running(box(rootfs, ["sleep", "100"])) as supervisor,
        pytest.raises(OSError, match=r"ioctl|tty"),
    ):
        supervisor.resize(1, 1)


@pytest.mark.parametrize("init", [False, True])
def test_ctrl_c_interrupts(runner: Runner, rootfs: Path, init: bool) -> None:
    script = "trap 'echo caught; exit 7' INT; echo ready; while :; do sleep 0.01; done"
    plan = shell(rootfs, script, held=TTY, tty=True, init=init)
    with runner.start(plan) as supervisor:
        read_until(supervisor, b"ready")
        supervisor.send_stdin(b"\x03")
        status, out, _ = supervisor.collect(timeout_s=WAIT_S)
    assert status.code == 7
    assert out.count(b"caught") == 1


def test_the_terminal_belongs_to_the_user(runner: Runner, rootfs: Path) -> None:
    plan = shell(
        rootfs,
        "stat -c %u /dev/pts/0; echo again >/dev/stdout",
        held=TTY,
        tty=True,
        after_pivot=[ops.User(uid=1000, gid=1000)],
    )
    _, out, _ = runner.run(plan)
    assert out.splitlines() == [b"1000", b"again"]


def test_closing_the_input_of_a_terminal_types_the_end(runner: Runner, rootfs: Path) -> None:
    status, out, _ = runner.run(box(rootfs, ["cat"], held=TTY, tty=True), input=b"line\n")
    assert (status.code, out) == (0, b"line\r\nline\r\n")


# ---- clients --------------------------------------------------------------------------


def test_a_second_client_attaches(runner: Runner, rootfs: Path, held: ops.Supervision) -> None:
    script = "while [ ! -e /go ]; do sleep 0.01; done; echo both; echo err >&2"
    with runner.start(shell(rootfs, script, held=held)) as starter:
        starter.wait_started(WAIT_S)
        with Supervisor.connect(held.directory) as client:
            client.attach(stderr=False)
            (rootfs / "go").touch()
            assert client.collect(timeout_s=WAIT_S)[1:] == (b"both\n", b"")
        assert starter.collect(timeout_s=WAIT_S)[1:] == (b"both\n", b"err\n")


def test_a_client_learns_the_exit_without_attaching(
    runner: Runner, rootfs: Path, held: ops.Supervision
) -> None:
    with runner.start(shell(rootfs, "sleep 0.1; exit 6", held=held), attach=0) as starter:
        starter.wait_started(WAIT_S)
        with Supervisor.connect(held.directory) as client:
            assert client.query().phase == "running"
            assert client.wait(WAIT_S).code == 6


def test_a_client_that_does_not_read_delays_nobody(
    runner: Runner, rootfs: Path, held: ops.Supervision
) -> None:
    script = "while [ ! -e /go ]; do sleep 0.01; done; head -c 2000000 /dev/zero; echo; echo end"
    with runner.start(shell(rootfs, script, held=held), attach=0) as starter:
        starter.wait_started(WAIT_S)
        with Supervisor.connect(held.directory) as lazy:
            lazy.attach()
            (rootfs / "go").touch()
            assert starter.wait(WAIT_S).code == 0
            logged = b"".join(record.data for record in read_log(held.log_path))
            assert logged == bytes(2000000) + b"\nend\n"
            got = list(lazy.output(WAIT_S))
        sizes = [len(item.data) for item in got if isinstance(item, Output)]
        lost = [item.lost for item in got if isinstance(item, Gap)]
        assert sum(sizes) + sum(lost) <= 2000005
        assert sum(sizes) < 1000000


def test_a_gap_is_told_in_its_place(runner: Runner, rootfs: Path, held: ops.Supervision) -> None:
    script = (
        "while [ ! -e /go ]; do sleep 0.01; done; head -c 1500000 /dev/zero;"
        "touch /written; while [ ! -e /on ]; do sleep 0.01; done; echo end"
    )
    with runner.start(shell(rootfs, script, held=held), attach=0) as starter:
        starter.wait_started(WAIT_S)
        with Supervisor.connect(held.directory) as lazy:
            lazy.attach()
            (rootfs / "go").touch()
            wait_until((rootfs / "written").exists, "the output to be taken")
            output = lazy.output(WAIT_S)
            seen: list[Output | Gap] = []
            while not seen or not isinstance(seen[-1], Gap):
                seen.append(next(output))
            (rootfs / "on").touch()
            seen += output
    sizes = sum(len(item.data) for item in seen if isinstance(item, Output))
    lost = sum(item.lost for item in seen if isinstance(item, Gap))
    assert sizes + lost == 1500004
    assert isinstance(seen[-1], Output) and seen[-1].data == b"end\n"


def test_a_lossless_client_holds_the_program_back(runner: Runner, rootfs: Path) -> None:
    script = "head -c 4000000 /dev/zero; touch /written"
    with runner.start(shell(rootfs, script)) as supervisor:
        supervisor.wait_started(WAIT_S)
        supervisor.query()  # the supervisor still answers
        assert not (rootfs / "written").exists()
        status, out, _ = supervisor.collect(timeout_s=WAIT_S)
        assert (status.code, len(out)) == (0, 4000000)
        assert (rootfs / "written").exists()


def test_what_stands_in_the_pipe_is_logged_on_demand(
    runner: Runner, rootfs: Path, held: ops.Supervision
) -> None:
    # A lossless client that does not read holds the program back: the pipe is full then.
    with runner.running(box(rootfs, ["cat", "/dev/zero"], held=held)) as lazy:
        assert lazy.pid is not None
        pid = lazy.pid
        with Supervisor.connect(held.directory) as other:

            def is_stuck() -> bool:
                other.signal(signal.SIGCONT)
                wait_until(lambda: unread(pid) > 60_000, "the pipe to be full")
                other.signal(signal.SIGSTOP)
                wait_until(lambda: is_stopped(pid), "the program to stop")
                other.query()
                return unread(pid) > 60_000

            wait_until(is_stuck, "the client's queue to be full")
            other.query(logged=True)
            assert unread(pid) == 0


def test_what_a_terminal_holds_is_logged_on_demand(
    runner: Runner, rootfs: Path, run_dir: Path
) -> None:
    held = ops.Supervision(directory=str(run_dir), log_path=str(run_dir / "log"), tty=True)
    log = run_dir / "log"
    sizes = [0]

    def is_held_back() -> bool:
        time.sleep(0.1)
        sizes.append(log.stat().st_size)
        return sizes[-1] == sizes[-2] > 200_000

    # As above; a terminal holds three times as much as it gives at once.
    with (
        runner.running(box(rootfs, ["yes"], held=held, tty=True)) as lazy,
        Supervisor.connect(held.directory) as other,
    ):
        wait_until(is_held_back, "the client's queue to be full")
        other.signal(signal.SIGSTOP)
        wait_until(lambda: is_stopped(lazy.pid or 0), "the program to stop")
        other.query(logged=True)
        size = log.stat().st_size
        other.query(logged=True)
        assert log.stat().st_size == size


def test_output_before_the_exit_is_complete_for_a_lossless_client(
    runner: Runner, rootfs: Path, held: ops.Supervision
) -> None:
    # More than a socket holds, less than pipe and queue: written, and the program is gone.
    with runner.start(shell(rootfs, "head -c 300000 /dev/zero", held=held)) as supervisor:
        wait_until((Path(held.directory) / "exit").exists, "the exit to be recorded")
        assert len(supervisor.collect(timeout_s=WAIT_S)[1]) == 300000


def test_a_left_open_pipe_does_not_delay_the_exit(runner: Runner, rootfs: Path) -> None:
    # No PID namespace: the sleeper outlives the process and keeps its stdout.
    plan = shell(
        rootfs, "sleep 30 & echo $!; exit 2", clone_flags=flags.CLONE_NEWNS | flags.CLONE_NEWIPC
    )
    status, out, _ = runner.run(plan)
    os.kill(int(out), 9)
    assert status.code == 2


@pytest.mark.parametrize(
    "frame",
    [
        b"\x02\x00\x00\x00\xff\xff\xff\x7f",  # far too long
        b"\x03\x00\x00\x00\x01\x00\x02\x00",  # input beyond the window
        b"\x06\x00\x00\x00\x41\x00\x00\x00" + bytes(65),  # a signal of 65 bytes
    ],
)
def test_a_client_that_speaks_nonsense_is_dropped(
    runner: Runner, rootfs: Path, held: ops.Supervision, frame: bytes
) -> None:
    with runner.running(box(rootfs, ["sleep", "100"], held=held)) as starter:
        with Supervisor.connect(held.directory) as client:
            client._sock.sendall(frame)
            assert client.next_event(WAIT_S) is None
            assert client.is_over
        assert starter.query().phase == "running"


@pytest.mark.parametrize("kind", [0, 12, 65, 255])
def test_an_unknown_request_is_answered_with_an_error(
    runner: Runner, rootfs: Path, held: ops.Supervision, kind: int
) -> None:
    with (
        runner.running(box(rootfs, ["sleep", "100"], held=held)),
        Supervisor.connect(held.directory) as client,
        pytest.raises(OSError) as refused,
    ):
        client._request(kind)
    assert refused.value.errno == errno.EPROTO


# ---- the log --------------------------------------------------------------------------


def test_the_log_keeps_both_streams(runner: Runner, rootfs: Path, held: ops.Supervision) -> None:
    runner.run(shell(rootfs, "echo out; sleep 0.05; echo err >&2; printf partial", held=held))
    got = [(r.stream, r.data) for r in read_log(held.log_path)]
    assert sorted(got) == [(1, b"out\n"), (1, b"partial"), (2, b"err\n")]


def test_the_log_is_rotated_by_size(runner: Runner, rootfs: Path, run_dir: Path) -> None:
    held = ops.Supervision(
        directory=str(run_dir),
        log_path=str(run_dir / "log"),
        log_max_bytes=10_000,
        log_max_files=3,
    )
    script = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done"
    runner.run(shell(rootfs, script, held=held))
    names = sorted(path.name for path in run_dir.iterdir() if path.name.startswith("log"))
    assert names == ["log", "log.1", "log.2"]
    sizes = [(run_dir / name).stat().st_size for name in names]
    assert max(sizes) <= 10_000
    lines = [record.data for record in read_log(held.log_path)]
    assert lines == [b"line %d\n" % n for n in range(3000 - len(lines), 3000)]


def test_a_moved_log_is_opened_anew_on_request(
    runner: Runner, rootfs: Path, held: ops.Supervision
) -> None:
    script = "echo first; while [ ! -e /go ]; do sleep 0.01; done; echo second"
    with runner.start(shell(rootfs, script, held=held)) as supervisor:
        read_until(supervisor, b"first\n")
        moved = held.log_path + ".moved"
        os.rename(held.log_path, moved)
        supervisor.log_reopen()
        (rootfs / "go").touch()
        supervisor.wait(WAIT_S)
    assert [r.data for r in read_log(held.log_path)] == [b"second\n"]
    assert [r.data for r in read_log(moved)] == [b"first\n"]


def test_a_terminal_may_be_closed_and_opened_again(runner: Runner, rootfs: Path) -> None:
    script = (
        "echo before; (exec setsid sh -c 'exec <&- >&- 2>&-; sleep 0.1;"
        " exec >/dev/pts/0; echo after') <&- >/dev/null 2>&1"
    )
    plan = shell(rootfs, f"trap '' HUP; exec 2>&1; {script}; echo end", held=TTY, tty=True)
    _, out, _ = runner.run(plan)
    assert out.split() == [b"before", b"after", b"end"]


def test_a_writer_that_stays_does_not_cost_a_lossless_client_the_exit(
    runner: Runner, rootfs: Path
) -> None:
    plan = shell(rootfs, "yes & echo $! >/pid; exit 3", clone_flags=flags.CLONE_NEWNS)
    with runner.start(plan) as supervisor:
        supervisor.wait_started(WAIT_S)
        try:
            status, _, _ = supervisor.collect(timeout_s=WAIT_S)
        finally:
            os.kill(int((rootfs / "pid").read_text()), 9)
    assert status.code == 3


def test_slots_are_not_held_while_the_program_runs(
    runner: Runner, rootfs: Path, tmp_path: Path
) -> None:
    plan = box(
        rootfs,
        ["sleep", "100"],
        slots=1,
        prepare=[ops.OpenTree(slot=1, path=str(tmp_path))],
        before_pivot=[ops.MoveMount(slot=1, target="/mnt", create="dir")],
    )
    file = os.open(tmp_path, os.O_RDONLY)
    try:
        with runner.running(plan, [file]) as supervisor:
            supervisor.query()
            held = Path(f"/proc/{supervisor.supervisor_pid}/fd")
            targets = [os.readlink(link) for link in held.iterdir()]
            assert not [target for target in targets if str(tmp_path) in target or target == "/"]
    finally:
        os.close(file)


def test_threads_may_ask_while_another_reads(runner: Runner, rootfs: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    script = "while [ ! -e /go ]; do echo tick; sleep 0.01; done; exit 9"
    with runner.running(shell(rootfs, script)) as supervisor, ThreadPoolExecutor(4) as pool:
        collected = pool.submit(supervisor.collect, timeout_s=WAIT_S)
        waited = [pool.submit(supervisor.wait, WAIT_S) for _ in range(2)]
        for _ in range(50):
            assert supervisor.query().phase == "running"
            supervisor.signal(0)
        (rootfs / "go").touch()
        assert collected.result()[0].code == 9
        assert [future.result().code for future in waited] == [9, 9]


def test_a_full_disk_cuts_no_record_and_no_output(
    runner: Runner, rootfs: Path, run_dir: Path
) -> None:
    import subprocess

    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(run_dir)], check=True)
    try:
        held = ops.Supervision(
            directory=str(run_dir), log_path=str(run_dir / "log"), stdin_open=True
        )
        script = "read go; i=0; while [ $i -lt 4000 ]; do echo this is line $i; i=$((i+1)); done"
        before = b"1700000000000000000 o of another host\n" * 500
        with runner.start(shell(rootfs, script, held=held)) as supervisor:
            supervisor.wait_started(WAIT_S)
            # As a migration does with what the log has got at the source meanwhile.
            (run_dir / "log").write_bytes(before)
            status, out, _ = supervisor.collect(b"go\n", timeout_s=WAIT_S)
        lines = [b"this is line %d\n" % n for n in range(4000)]
        assert (status.code, out) == (0, b"".join(lines))
        kept = [record.data for record in read_log(held.log_path)]
        assert kept[:500] == [b"of another host\n"] * 500
        del kept[:500]
        assert 0 < len(kept) < 4000
        # A busy supervisor reads several lines at once, the last of them perhaps in part.
        text = b"\n" + b"".join(lines)
        assert all(data in text for data in kept)
        assert (run_dir / "log").read_bytes().endswith(b"\n")
    finally:
        wait_until(lambda: subprocess.run(["umount", str(run_dir)]).returncode == 0, "umount")
