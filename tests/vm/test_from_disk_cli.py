"""`hutch vm run`, `console`, `vm disk` and `export --disk` as their users start them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hutch.storage.diskimages import create_disk, disk_info
from tests.cli.conftest import Cli, Terminal, wait_until
from tests.requires import requires
from tests.vm.bootdisks import SIZE, sector_disk

pytestmark = [pytest.mark.integration, requires("root", "qemu", "qemu-img", "cc")]


@pytest.fixture
def hutch(tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(tmp_path / "root")
    yield cli
    for name in cli.out("ps", "-aq").split():
        cli("rm", "-f", name)


@pytest.fixture
def terminal(hutch: Cli) -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def start(*args: str) -> Terminal:
        made.append(Terminal([*hutch.argv, *args]))
        return made[-1]

    yield start
    for one in made:
        one.close()


def _on_the_console(terminal: Callable[..., Terminal], key: bytes) -> Terminal:
    """Join, and have a key echoed: by the machine, no longer by the terminal."""
    console = terminal("console", "box")
    wait_until(lambda: not termios.tcgetattr(console.fd)[3] & termios.ECHO)
    console.type(key)
    console.expect(key)
    return console


def _read_until_it_runs(process: subprocess.Popen[bytes]) -> None:
    """Before that nobody would heed the power button."""
    assert process.stdout is not None
    seen = b""
    while b"runs" not in seen:
        piece = os.read(process.stdout.fileno(), 4096)
        assert piece, seen
        seen += piece


def test_a_machine_from_start_to_its_disk_in_a_file(
    hutch: Cli, terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    disk = sector_disk(tmp_path / "mine.raw")
    name = hutch.out(
        *("vm", "run", "-d", "--name", "box", "--memory", "128m", "--network", "none"),
        *("--device-write-bps", "disk:8m", "--vnc", "unix", str(disk)),
    )
    assert len(name.strip()) == 64
    shown = json.loads(hutch.out("inspect", "-f", "{{json .FromDisk}}", "box"))
    assert (shown["Path"], shown["Format"], shown["Firmware"]) == (str(disk), "raw", "bios")
    assert Path(shown["Screen"]).is_socket()
    (row,) = json.loads(hutch.out("ps", "-o", "json"))
    assert (row["Names"], row["Image"]) == ("box", "mine.raw")
    console = _on_the_console(terminal, b"x")
    console.type(b"\x1d")
    assert console.wait() == 0
    console = _on_the_console(terminal, b"y")
    hutch.out("update", "--device-write-bps", "disk:9m", "box")
    rates = hutch.out("inspect", "-f", "{{json .HostConfig.BlkioDeviceWriteBps}}", "box")
    assert json.loads(rates) == [{"Path": "disk", "Rate": 9 << 20}]
    hutch.out("stop", "-t", "60", "box")
    console.expect(b"off")
    assert console.wait() == 0
    assert "disk A runs" in hutch.out("logs", "box")
    target = tmp_path / "whole.qcow2"
    hutch.out("export", "--disk", "-o", str(target), "box")
    assert disk_info(str(target)).size == SIZE
    hutch.out("rm", "box")


def test_attached_it_shows_the_console_and_a_signal_presses_the_button(
    hutch: Cli, tmp_path: Path
) -> None:
    disk = sector_disk(tmp_path / "mine.raw")
    running = hutch.spawn("vm", "run", "--rm", "--memory", "128m", "--network", "none", str(disk))
    assert running.stdout is not None
    _read_until_it_runs(running)
    running.send_signal(signal.SIGTERM)
    assert b"off" in running.stdout.read()
    assert running.wait() == 0
    assert hutch.out("ps", "-aq") == ""


def test_disks_are_made_looked_at_converted_and_grown(hutch: Cli, tmp_path: Path) -> None:
    made, other = str(tmp_path / "a.qcow2"), str(tmp_path / "b.vmdk")
    hutch.out("vm", "disk", "create", made, "8M")
    hutch.out("vm", "disk", "resize", made, "16M")
    assert json.loads(hutch.out("vm", "disk", "info", "-o", "json", made))["size"] == 16 << 20
    assert "vmdk, 16" in hutch.out("vm", "disk", "convert", "-q", made, other)
    refused = hutch("vm", "disk", "resize", made, "1M")
    assert b"a disk cannot shrink" in refused.stderr
    assert b"size: must be at least a byte" in hutch("vm", "disk", "create", other, "0").stderr
    assert b"is no regular file" in hutch("vm", "disk", "info", str(tmp_path)).stderr


@pytest.mark.parametrize(
    ("name", "format"), [("a.raw", "raw"), ("a.vmdk", "vmdk"), ("a.vhd", "vpc"), ("a", "qcow2")]
)
def test_a_disk_is_of_the_format_that_its_name_says(
    hutch: Cli, tmp_path: Path, name: str, format: str
) -> None:
    made = str(tmp_path / name)
    hutch.out("vm", "disk", "create", made, "8M")
    assert disk_info(made).format == format


def test_a_name_that_says_no_format_is_refused_unless_one_is_given(
    hutch: Cli, tmp_path: Path
) -> None:
    odd, made = str(tmp_path / "a.foo"), str(tmp_path / "a.raw")
    hutch.out("vm", "disk", "create", made, "8M")
    for command in (
        ("vm", "disk", "create", odd, "8M"),
        ("vm", "disk", "convert", "-q", made, odd),
        ("export", "--disk", "-o", odd, "nothing"),
    ):
        refused = hutch(*command)
        assert b".foo is the ending of no format that is known" in refused.stderr
        assert b"give --format, or a name that ends in raw, qcow2, vmdk" in refused.stderr
        assert not Path(odd).exists()
    hutch.out("vm", "disk", "create", "--format", "qcow2", odd, "8M")
    assert disk_info(odd).format == "qcow2"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cloud-init", "/a", "--user-data", "/b", "DISK"], "give one"),
        (["--ssh-key", "/nowhere", "DISK"], "--ssh-key: /nowhere: cannot be read"),
        (["--cloud-init", "/nowhere", "DISK"], "user_data: /nowhere: no such file"),
        ([], "give a disk to start from"),
    ],
)
def test_what_is_wrong_is_named(
    hutch: Cli, tmp_path: Path, arguments: list[str], said: str
) -> None:
    create_disk(str(tmp_path / "d.raw"), SIZE, format="raw")
    words = [str(tmp_path / "d.raw") if word == "DISK" else word for word in arguments]
    done = hutch("vm", "run", *words)
    assert done.returncode != 0
    assert said in done.stderr.decode()


def test_a_console_is_of_machines_that_start_from_a_disk(hutch: Cli) -> None:
    done = hutch("console", "nobody")
    assert b"no such instance" in done.stderr


def test_a_key_comes_from_a_file_a_descriptor_the_environment_or_a_prompt(
    hutch: Cli, terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    disk, key = str(tmp_path / "secret.luks"), tmp_path / "key"
    key.write_text("geheim\n")
    hutch.out("vm", "disk", "create", "--format", "luks", "--key", str(key), disk, "1M")
    assert json.loads(hutch.out("vm", "disk", "info", "-o", "json", disk))["encrypted"]
    out = str(tmp_path / "plain.raw")
    convert = ("vm", "disk", "convert", "-q", disk, out, "--key")
    assert b"the key does not open it" in hutch(*convert, "fd:0", input=b"other").stderr
    hutch.out(*convert, "fd:0", input=b"geheim")
    os.unlink(out)
    assert hutch(*convert, "env:KEY", env={"KEY": "geheim"}).returncode == 0
    os.unlink(out)
    assert b"KEY is not set" in hutch(*convert, "env:KEY").stderr
    assert b"no terminal to ask at" in hutch(*convert, "prompt").stderr
    asking = terminal(*convert, "prompt")
    asking.expect(b"Key of the disk: ")
    asking.type(b"geheim\n")
    assert asking.wait() == 0
    assert os.path.getsize(out) == SIZE
