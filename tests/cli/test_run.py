"""`hutch run`, `create` and `exec` for real: streams, exit codes, terminals, signals."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from hutch.engine import Engine
from tests.cli.conftest import wait_until
from tests.requires import requires

pytestmark = [requires("root", "overlayfs", "cgroup", "busybox"), pytest.mark.integration]

QUICK = ("run", "--rm", "--network", "none")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["nosuch"], 127),
        (["/etc/passwd"], 126),
        (["sh", "-c", "sh -c 'kill -TERM $$'; exit $?"], 143),
    ],
)
def test_the_exit_code_is_that_of_the_program(cli: Any, command: list[str], code: int) -> None:
    done = cli(*QUICK, "busybox", *command)
    assert done.returncode == code
    assert (b"hint: " in done.stderr) == (code in (126, 127))


@pytest.mark.parametrize(
    "args",
    [
        ("run", "--memory", "1m", "busybox"),
        ("run", "--rm", "--restart", "always", "busybox"),
        ("run", "-v", "x:y:z:w", "busybox"),
        ("run", "--pull", "never", "no/such:image"),
        ("run", "Not A Reference"),
        ("run", "--nope", "busybox"),
    ],
)
def test_what_hutch_refuses_is_125_and_leaves_nothing(
    cli: Any, hutch_engine: Engine, args: Any
) -> None:
    before = len(hutch_engine.list(all=True))
    done = cli(*args)
    assert done.returncode == 125
    assert done.stderr.startswith(b"hutch: ")
    assert len(hutch_engine.list(all=True)) == before


def test_streams_stay_apart_and_binary(cli: Any) -> None:
    data = bytes(range(256)) * 2000
    done = cli(*QUICK, "-i", "busybox", "sh", "-c", "cat; echo oops >&2", input=data)
    assert done.stdout == data
    assert done.stderr == b"oops\n"


def test_options_end_at_the_image(cli: Any) -> None:
    assert cli.out(*QUICK, "busybox", "echo", "-n", "--rm", "-it").strip() == "--rm -it"


def test_environment_comes_from_options_files_and_here(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "env").write_text("FILE=1\nHERE\n")
    done = cli(
        *QUICK, "--env-file", str(tmp_path / "env"), "-e", "A=x y", "-e", "UNSET_HERE",
        "busybox", "env", env={"HERE": "yes"},
    )  # fmt: skip
    lines = done.stdout.decode().split("\n")
    assert {"FILE=1", "HERE=yes", "A=x y"} <= set(lines)
    assert not any(line.startswith("UNSET_HERE") for line in lines)


def test_a_bind_mount_may_be_relative(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/f").write_text("inside")
    monkeypatch.chdir(tmp_path)
    assert cli.out(*QUICK, "-v", "./x:/y:ro", "busybox", "cat", "/y/f") == "inside"


def test_cidfile_is_written_once(cli: Any, name: str, tmp_path: Path) -> None:
    path = str(tmp_path / "cid")
    made = cli.out("create", "--cidfile", path, "--name", name, "busybox", "true").strip()
    assert Path(path).read_text() == made
    again = cli("run", "--rm", "--cidfile", path, "busybox", "true")
    assert again.returncode == 125
    assert b"exists already" in again.stderr


def test_detach_keys_are_read_before_anything_is_made(
    cli: Any, name: str, hutch_engine: Engine
) -> None:
    done = cli("run", "--rm", "--name", name, "--detach-keys", "bogus", "busybox", "true")
    assert done.returncode == 125
    assert b"--detach-keys" in done.stderr
    assert name not in {info.name for info in hutch_engine.list(all=True)}

    cli.out("run", "-d", "--network", "none", "--name", name, "busybox", "sleep", "1000")
    assert cli("exec", "--detach-keys", "bogus", name, "touch", "/made").returncode == 125
    assert cli("exec", name, "test", "-e", "/made").returncode == 1


def test_a_name_that_is_taken_is_refused(cli: Any, name: str) -> None:
    cli.out("create", "--name", name, "busybox", "true")
    done = cli("run", "--rm", "--name", name, "busybox", "true")
    assert done.returncode == 125
    assert name.encode() in done.stderr


def test_dry_run_prints_the_plan_and_leaves_nothing(cli: Any, hutch_engine: Engine) -> None:
    before = {info.id for info in hutch_engine.list(all=True)}
    plan = json.loads(cli.out("run", "--dry-run", "--network", "none", "busybox", "true"))
    assert any(op["type"] == "Exec" and op["argv"] == ["true"] for op in plan["child"])
    assert {info.id for info in hutch_engine.list(all=True)} == before


def test_rm_removes_and_without_it_the_instance_stays(cli: Any, name: str) -> None:
    cli.out(*QUICK, "--name", name, "busybox", "true")
    assert cli("inspect", name).returncode == 1
    cli.out("run", "--network", "none", "--name", name, "busybox", "true")
    assert cli.out("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", name) == "exited 0\n"


def test_what_ends_before_its_starter_lets_go_is_removed_all_the_same(
    cli: Any, name: str, hutch_engine: Engine
) -> None:
    for i in range(4):
        cli.out(
            "run", "-d", "--rm", "--network", "none", "--name", f"{name}-{i}", "busybox", "true"
        )
    wait_until(lambda: not hutch_engine.list(all=True, filters={"name": [name]}))


def test_signals_are_handed_on(cli: Any, name: str) -> None:
    script = "trap 'echo got; exit 9' INT; echo ready; while :; do sleep 0.05; done"
    process = cli.spawn(*QUICK, "--name", name, "busybox", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == (b"got\n", 9)


def test_who_asks_three_times_gets_the_prompt_back(cli: Any, name: str) -> None:
    script = "trap 'echo asked' INT; echo ready; while :; do sleep 0.05; done"
    process = cli.spawn(*QUICK, "--name", name, "busybox", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"asked\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"left running" in said
    assert cli.out("inspect", "-f", "{{.State.Status}}", name) == "running\n"


def test_a_closed_pipe_is_quiet_and_ends_it(cli: Any, name: str) -> None:
    process = cli.spawn(*QUICK, "--name", name, "busybox", "yes")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(2)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
    assert cli("inspect", name).returncode == 1


def test_a_terminal_is_raw_sized_and_resized(cli: Any, terminal: Any) -> None:
    shell = terminal(*QUICK, "-it", "busybox", "sh", rows=31, columns=97)
    shell.expect(b"#")
    shell.type(b"stty size; tty\n")
    shell.expect(b"31 97")
    shell.expect(b"/dev/pts/0")
    shell.type(b"trap 'stty size' WINCH\n")
    shell.resize(40, 120)
    shell.type(b"while stty size | grep -qv '40 120'; do :; done; echo re''sized\n")
    shell.expect(b"resized")
    shell.type(b"sh -c \"echo be''gun; exec sleep 100\"\n")
    shell.expect(b"begun")
    shell.type(b"\x03")
    shell.expect(b"#")
    shell.type(b"exit 5\n")
    assert shell.wait() == 5


def test_detach_keys_leave_it_running(cli: Any, name: str, terminal: Any) -> None:
    shell = terminal("run", "--network", "none", "--name", name, "-it", "busybox", "sh")
    shell.expect(b"#")
    shell.type(b"X=kept\n")
    shell.expect(b"#")
    shell.type(b"\x10\x11")
    assert shell.wait() == 0
    assert cli.out("inspect", "-f", "{{.State.Running}}", name) == "true\n"
    again = terminal("attach", "--detach-keys", "ctrl-a,x", name)
    again.type(b"echo $X\n")
    again.expect(b"kept")
    again.type(b"\x01x")
    assert again.wait() == 0
    assert cli.out("inspect", "-f", "{{.State.Running}}", name) == "true\n"


def test_a_terminal_is_put_back(cli: Any, terminal: Any) -> None:
    import termios

    shell = terminal(*QUICK, "-it", "busybox", "sh")
    before = termios.tcgetattr(shell.fd)
    shell.expect(b"#")
    during = termios.tcgetattr(shell.fd)
    assert not during[3] & termios.ECHO
    shell.type(b"exit\n")
    assert shell.wait() == 0
    # The other end is closed by now; the settings of a pty outlive it.
    assert before[3] & termios.ECHO


def test_tty_with_a_pipe_as_input_is_refused(cli: Any) -> None:
    done = cli(*QUICK, "-it", "busybox", "true", input=b"x")
    assert done.returncode == 1
    assert b"not a terminal" in done.stderr


def test_exec_has_its_own_user_environment_directory_and_code(cli: Any, name: str) -> None:
    cli.out("run", "-d", "--network", "none", "--name", name, "busybox", "sleep", "1000")
    script = 'echo "$(id -u) $A $(pwd)"; exit 4'
    done = cli("exec", "-u", "65534", "-e", "A=b", "-w", "/tmp", name, "sh", "-c", script)
    assert (done.stdout, done.returncode) == (b"65534 b /tmp\n", 4)
    assert cli("exec", "-i", name, "cat", input=b"through").stdout == b"through"
    assert cli("exec", name, "nosuch").returncode == 127
    assert cli("exec", name, "/etc/passwd").returncode == 126
    assert cli.out("exec", "-d", name, "touch", "/tmp/there") == ""


def test_exec_on_a_terminal(cli: Any, name: str, terminal: Any) -> None:
    cli.out("run", "-d", "--network", "none", "--name", name, "busybox", "sleep", "1000")
    shell = terminal("exec", "-it", name, "sh", rows=20, columns=70)
    shell.expect(b"#")
    shell.type(b"stty size; exit 6\n")
    shell.expect(b"20 70")
    assert shell.wait() == 6


def test_start_attached_shows_output_and_returns_the_code(cli: Any, name: str) -> None:
    cli.out(
        "create", "-i", "--network", "none", "--name", name, "busybox", "sh", "-c", "cat; exit 3"
    )
    done = cli("start", "-ai", name, input=b"again")
    assert (done.stdout, done.returncode) == (b"again", 3)


def test_an_instance_survives_its_command_line(cli: Any, name: str, hutch_engine: Engine) -> None:
    process = cli.spawn("run", "--network", "none", "--name", name, "busybox", "sh", "-c",
                        "echo up; sleep 1000")  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert str(hutch_engine.get(name).info().state) == "running"


def test_input_that_ends_does_not_end_that_of_a_program_attached_to(cli: Any, name: str) -> None:
    script = "while read -r line; do echo got $line; done; echo over"
    cli.out("run", "-d", "-i", "--network", "none", "--name", name, "busybox", "sh", "-c", script)
    for word in (b"one", b"two"):
        attached = cli.spawn("attach", name)
        assert attached.stdin is not None
        assert attached.stdout is not None
        attached.stdin.write(word + b"\n")
        attached.stdin.close()
        assert attached.stdout.readline() == b"got " + word + b"\n"
        attached.kill()
        attached.wait()
        attached.stdout.close()
    assert cli.out("inspect", "-f", "{{.State.Running}}", name) == "true\n"


def test_an_interrupted_pull_is_130_and_leaves_nothing(cli: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        reference = f"127.0.0.1:{server.getsockname()[1]}/no/such:image"
        process = cli.spawn("run", "--rm", reference, "true")
        connection, _ = server.accept()
        with connection:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert "no/such" not in cli.out("images")
