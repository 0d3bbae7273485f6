"""Processes behind the guest's agent: started by its launcher, talked to through its channel."""

from __future__ import annotations

import errno
import os
import random
import select
import signal
import stat
import struct
from pathlib import Path

import pytest

from hutch.plan import guest, guest_answers, ops
from hutch.process import frames
from tests import fuzzing
from tests.native import guests
from tests.native.boxes import box
from tests.native.guests import ATTACH_ALL, Peer, Ran, Remote
from tests.requires import requires

pytestmark = [requires("root", "busybox", "cc"), pytest.mark.integration]

ENV = ("PATH=/usr/bin:/bin",)


def shell(script: str, *, slots: int = 0, stdin_open: bool = False) -> ops.Plan:
    supervision = ops.Supervision(linger=False, stdin_open=stdin_open)
    child = (ops.Exec(argv=("/bin/sh", "-c", script), env=ENV),)
    return ops.Plan(supervision=supervision, child=child, slots=slots)


def start(peer: Peer, plan: ops.Plan, kind: int = guests.SPAWN) -> Remote:
    return Remote(peer, kind, plan, ATTACH_ALL)


@pytest.fixture
def main(peer: Peer) -> Remote:
    """A main process that reads its stdin to the end."""
    remote = start(peer, shell("cat", stdin_open=True))
    remote.until(frames.STARTED)
    return remote


def test_output_streams_and_the_exit_code_come_apart(peer: Peer) -> None:
    assert start(peer, shell("echo out; echo err >&2; exit 3")).wait() == Ran(3, b"out\n", b"err\n")


def test_stdin_goes_through_whole(peer: Peer) -> None:
    content = random.Random(1).randbytes(300_000)
    remote = start(peer, shell("cat", stdin_open=True))
    remote.until(frames.STARTED)
    for at in range(0, len(content), 30_000):
        part = content[at : at + 30_000]
        remote.say(frames.STDIN, part)
        done = 0
        while done < len(part):
            done += struct.unpack("<I", remote.until(frames.ACK))[0]
    remote.say(frames.STDIN_EOF)
    assert remote.wait().stdout == content


def test_a_signal_reaches_the_process(peer: Peer, main: Remote) -> None:
    main.say(frames.SIGNAL, struct.pack("<I", signal.SIGTERM))
    assert main.wait().code == 128 + signal.SIGTERM


def test_an_exec_needs_a_main_process(peer: Peer) -> None:
    channel = peer.open(guests.EXEC)
    assert channel.closed() == errno.ESRCH


def test_an_exec_runs_beside_the_main_process(peer: Peer, main: Remote) -> None:
    assert start(peer, shell("echo beside", slots=1), guests.EXEC).wait().stdout == b"beside\n"
    main.say(frames.STDIN_EOF)
    assert main.wait().code == 0
    assert peer.open(guests.EXEC).closed() == errno.ESRCH


def test_a_terminal_has_a_size_and_changes_it(peer: Peer, rootfs: Path) -> None:
    script = "trap 'stty size; exit' WINCH; stty size; while :; do sleep 0.01; done"
    held = ops.Supervision(tty=True, stdin_open=True, linger=False)
    remote = start(peer, box(rootfs, ["sh", "-c", script], held=held, tty=True))
    remote.until_output(b"24 80\r\n")
    remote.say(frames.RESIZE, struct.pack("<HH", 50, 132))
    remote.until_output(b"50 132\r\n")
    assert remote.wait().code == 0


def test_a_failed_launch_is_reported(peer: Peer) -> None:
    plan = ops.Plan(child=(ops.Exec(argv=("/nonexistent",), env=()),))
    remote = start(peer, plan)
    while True:
        kind, section, payload = remote.channel.supervisor_frame()
        if kind == frames.FAILED:
            break
    assert section == 4
    assert struct.unpack_from("<Ii", payload)[1] == errno.ENOENT


@pytest.mark.parametrize("length", [0, (4 << 20) + 1, 0xFFFFFFFF])
def test_a_plan_of_a_wrong_length_is_refused(peer: Peer, length: int) -> None:
    channel = peer.open(guests.SPAWN)
    channel.write(struct.pack("<I", length))
    assert channel.closed() == errno.EMSGSIZE


def test_a_plan_that_is_cut_off_is_refused(peer: Peer) -> None:
    channel = peer.open(guests.SPAWN)
    channel.write(struct.pack("<I", 100) + bytes(99))
    channel.eof()
    assert channel.closed() == errno.EPROTO


def test_closing_the_channel_ends_a_process_that_does_not_linger(peer: Peer) -> None:
    remote = start(peer, shell("exec cat", stdin_open=True))
    pid, _ = struct.unpack("<ii", remote.until(frames.PID))
    remote.until(frames.STARTED)
    descriptor = os.pidfd_open(pid)
    remote.channel.close()
    assert select.select([descriptor], [], [], guests.WAIT_S)[0]
    os.close(descriptor)


def test_much_output_is_held_back_by_credit_and_not_lost(peer: Peer) -> None:
    remote = start(peer, shell("head -c 3000000 /dev/zero; echo end >&2"))
    remote.channel.generous = False
    while remote.channel.granted:
        peer.turn()
    assert peer.call(guest.Call.PING).errno == 0
    remote.channel.generous = True
    remote.channel.grant()
    done = remote.wait()
    assert (len(done.stdout), done.stderr, done.code) == (3_000_000, b"end\n", 0)


def test_fifty_processes_at_once(peer: Peer) -> None:
    remotes = [start(peer, shell(f"echo {n}; exit {n}")) for n in range(50)]
    for n, remote in enumerate(remotes):
        assert remote.wait() == Ran(n, f"{n}\n".encode(), b"")


def test_nothing_is_left_of_ended_channels(peer: Peer) -> None:
    def run() -> None:  # not over before the agent has seen its number
        remote = start(peer, shell("read line", stdin_open=True))
        remote.until(frames.STARTED)
        remote.say(frames.STDIN, b"go\n")
        remote.wait()

    run()
    before = guests.descriptors(peer.pid)
    for _ in range(10):
        run()
    assert guests.descriptors(peer.pid) == before


def test_a_launcher_waits_for_the_next_plan_and_is_replaced(peer: Peer) -> None:
    guests.descriptors(peer.pid)
    waits = guests.waiting_launcher(peer.pid)
    remote = start(peer, shell("echo $PPID; cat", stdin_open=True))
    _, supervisor = struct.unpack("<ii", remote.until(frames.PID))
    assert supervisor == waits
    guests.descriptors(peer.pid)
    assert guests.waiting_launcher(peer.pid) not in (None, waits)


def test_a_launcher_killed_while_it_waits_is_no_loss(peer: Peer) -> None:
    guests.descriptors(peer.pid)
    waits = guests.waiting_launcher(peer.pid)
    assert waits is not None
    os.kill(waits, signal.SIGKILL)
    while Path(f"/proc/{waits}/stat").exists():  # until it is reaped
        peer.call(guest.Call.PING)
    assert start(peer, shell("echo hi")).wait() == Ran(0, b"hi\n", b"")


# SETUP, as far as a host may be set up by a test.


def test_setup_reads_what_is_there_of_the_image(peer: Peer, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(20 << 20))
    (tmp_path / "link").symlink_to("/file")
    (tmp_path / "loop").symlink_to("/loop")
    os.mkfifo(tmp_path / "fifo")
    wanted = [guest.Warm(path=f"/{name}") for name in ("file", "link", "loop", "fifo", "", "none")]
    assert peer.setup(*wanted).errno == 0


def test_setup_makes_files_and_links(peer: Peer, tmp_path: Path) -> None:
    at = tmp_path / "made"
    answer = peer.setup(
        guest.Mkdir(path=f"{at}/a/b", mode=0o1777),
        guest.WriteFile(path=f"{at}/etc/hosts", mode=0o640, content=b"127.0.0.1 x\n"),
        guest.WriteFile(path=f"{at}/etc/hosts", mode=0o644, content=b"127.0.0.1 y\n"),
        guest.Symlink(target="/dev/vda", path=f"{at}/dev/root"),
        guest.Symlink(target="/dev/vdb", path=f"{at}/dev/root"),
    )
    assert answer == guest_answers.Answer(errno=0, index=0, detail="", body=b"")
    assert stat.S_IMODE((at / "a/b").stat().st_mode) == 0o1777
    assert (at / "etc/hosts").read_text() == "127.0.0.1 y\n"
    assert stat.S_IMODE((at / "etc/hosts").stat().st_mode) == 0o644
    assert os.readlink(at / "dev/root") == "/dev/vdb"
    assert os.listdir(at / "etc") == ["hosts"]


def test_setup_stops_at_the_first_failure_and_names_it(peer: Peer, tmp_path: Path) -> None:
    answer = peer.setup(
        guest.Mkdir(path=f"{tmp_path}/before"),
        guest.Insmod(path="/nonexistent.ko"),
        guest.Mkdir(path=f"{tmp_path}/after"),
    )
    assert (answer.errno, answer.index, answer.detail) == (errno.ENOENT, 1, "/nonexistent.ko")
    assert (tmp_path / "before").is_dir()
    assert not (tmp_path / "after").exists()


@pytest.mark.parametrize(
    ("op", "error"),
    [
        (guest.Entropy(data=bytes(513)), errno.E2BIG),
        (guest.Interface(index=0, name=""), errno.EINVAL),
        (guest.Interface(index=0, name="a" * 16), errno.EINVAL),
        (guest.Interface(index=0, name="eth9", mac=b"12345"), errno.EINVAL),
        (guest.Address(interface="hutch-none", address=bytes(4), prefix=24), errno.ENODEV),
        (guest.Address(interface="lo", address=bytes(5), prefix=24), errno.EINVAL),
        (guest.Address(interface="lo", address=bytes(4), prefix=33), errno.EINVAL),
        (guest.Route(interface="lo", gateway=bytes(3)), errno.EINVAL),
        (guest.LinkUp(interface="hutch-none"), errno.ENODEV),
        (guest.LinkUp(interface="a" * 20), errno.ENAMETOOLONG),
        (guest.Sysctl(key="kernel/../../../tmp/x", value="1"), errno.EINVAL),
        (guest.Sysctl(key="..", value="1"), errno.EINVAL),
        (guest.Cgroup(path="../x"), errno.EINVAL),
        (guest.Cgroup(path="x/.."), errno.EINVAL),
        (guest.Cgroup(path=""), errno.EINVAL),
    ],
)
def test_a_setup_value_that_cannot_be_is_refused(peer: Peer, op: guest.SetupOp, error: int) -> None:
    assert peer.setup(op).errno == error


def test_setup_bytes_that_nobody_meant(peer: Peer, tmp_path: Path) -> None:
    """Nothing runs of a request of which one length is wrong."""
    dice = fuzzing.dice(4)
    good = guest.encode_setup(
        [
            guest.Mkdir(path=f"{tmp_path}/x"),
            guest.Symlink(target="a", path=f"{tmp_path}/y"),
            guest.WriteFile(path=f"{tmp_path}/z", content=b"content"),
        ]
    )
    for _ in range(fuzzing.rounds(200)):
        cut = good[: dice.randrange(len(good))]
        assert peer.call(guest.Call.SETUP, cut).errno == errno.EPROTO
    for _ in range(50):
        assert peer.call(guest.Call.SETUP, good + dice.randbytes(3)).errno == errno.EPROTO
    assert [p for p in os.listdir(tmp_path) if len(p) == 1] == []


def test_calls_that_there_are_not(peer: Peer) -> None:
    channel = peer.open(guests.CALL)
    channel.write(struct.pack("<I", 99))
    channel.eof()
    assert guest_answers.decode_answer(channel.rest()).errno == errno.ENOSYS
    channel = peer.open(guests.CALL)
    channel.eof()
    assert guest_answers.decode_answer(channel.rest()).errno == errno.EPROTO
    assert peer.call(guest.Call.PING, b"more").errno == errno.EPROTO


def test_processes_are_listed(peer: Peer) -> None:
    answer = peer.call(guest.Call.PROCESSES, guest.group_argument())
    found = {p.pid: p for p in guest_answers.decode_processes(answer.body)}
    mine = found[os.getpid()]
    assert mine.ppid == os.getppid()
    own = Path("/proc/self/cmdline").read_bytes().replace(b"\0", b" ").strip()
    assert mine.command == own.decode()
