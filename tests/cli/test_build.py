"""`hutch build` and `hutch builder` as their users start them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from hutch.engine import Engine
from tests.cli.conftest import Cli, Terminal
from tests.requires import requires

pytestmark = [
    requires("root", "cgroup", "overlayfs", "seccomp", "busybox"),
    pytest.mark.integration,
]


@pytest.fixture
def unique() -> str:
    return os.urandom(6).hex()


@pytest.fixture
def context(tmp_path: Path, unique: str) -> Path:
    (tmp_path / "Dockerfile").write_text(
        f"FROM busybox\nARG A=1\nRUN --network=none echo {unique} $A\nCMD echo {unique}\n"
    )
    return tmp_path


def test_a_build_is_told_in_lines_and_found_again(cli: Cli, context: Path, unique: str) -> None:
    files = [f"--iidfile={context}/id", f"--metadata-file={context}/about"]
    first = cli(
        "build", "--progress=plain", "--build-arg", "A=2", *files, "-t", "t:1", str(context)
    )
    assert first.returncode == 0, first.stderr
    said = first.stderr.decode()
    assert f"{unique} 2" in said and "DONE" in said and "CACHED" not in said
    image = (context / "id").read_text()
    assert json.loads((context / "about").read_text())["containerimage.config.digest"] == image
    again = cli("build", "-q", "--build-arg=A=2", str(context))
    assert again.stdout.decode().strip() == image and again.stderr == b""
    lines = cli.out("build", "--progress=json", "--build-arg=A=2", str(context)).splitlines()
    assert [json.loads(line)["kind"] for line in lines][-1] == "image"
    assert cli.out("run", "--rm", "t:1").strip() == unique
    assert "CMD [" in cli.out("history", "t:1")
    cli.out("rmi", "t:1")


def test_a_mistake_is_shown_where_it_stands(cli: Cli, unique: str) -> None:
    done = cli("build", "-", input=f"FROM busybox\nRUN echo {unique}; exit 9\n".encode())
    assert done.returncode == 9
    assert b"Dockerfile:2: the command" in done.stderr
    assert f">>> RUN echo {unique}; exit 9".encode() in done.stderr
    assert b"note:" not in done.stderr
    wrong = cli("build", "-q", "-", input=b"FROM busybox\nCOPPY a b\n")
    assert wrong.returncode == 1 and b"did you mean COPY?" in wrong.stderr
    quiet = cli("build", "-q", "-", input=f"FROM busybox\nRUN echo why-{unique}; false\n".encode())
    assert quiet.returncode == 1 and f"\nwhy-{unique}\n".encode() in quiet.stderr


def test_checks_are_told_without_a_build(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM a as B\nMAINTAINER x\nWORKDIR y\nENV token 1\n")
    done = cli("build", "--check", str(tmp_path))
    rules = {line.split()[1] for line in done.stdout.decode().splitlines()[:-1]}
    assert done.returncode == 1
    assert rules == {
        "FromAsCasing:",
        "LegacyKeyValueFormat:",
        "MaintainerDeprecated:",
        "SecretsUsedInArgOrEnv:",
        "StageNameCasing:",
        "WorkdirRelativePath:",
    }
    done = cli("build", "--check", "-", input=b"FROM a\nMAINTAINER x\n")
    assert done.returncode == 1 and b"Dockerfile:2: MaintainerDeprecated" in done.stdout
    (tmp_path / "Dockerfile").rename(tmp_path / "Containerfile")
    assert b"Containerfile:1: FromAsCasing" in cli("build", "--check", str(tmp_path)).stdout
    assert b"is no directory" in cli("build", "--check", "https://x.invalid/x.git").stderr
    (tmp_path / "Dockerfile").write_text("# check=error=true\nFROM busybox\nMAINTAINER x\n")
    assert b"MaintainerDeprecated" in cli("build", str(tmp_path)).stderr
    (tmp_path / "Dockerfile").write_text("# check=skip=all\nFROM busybox\nMAINTAINER x\n")
    assert cli.out("build", "--check", str(tmp_path)) == "no warnings\n"


def test_files_go_to_a_directory_and_to_a_pipe(cli: Cli, tmp_path: Path) -> None:
    text = b"FROM scratch\nCOPY <<x /f\nhello\nx\n"
    cli.out("build", "-o", str(tmp_path / "out"), "-", input=text)
    assert (tmp_path / "out" / "f").read_text() == "hello\n"
    done = cli("build", "-o", "-", "-f", "-", str(tmp_path), input=text)
    assert b"hello\n" in done.stdout


def test_the_cache_is_listed_and_pruned(cli: Cli, unique: str) -> None:
    image = cli.out("build", "-q", "-", input=f"FROM busybox\nRUN : {unique}\n".encode()).strip()
    assert unique in cli.out("builder", "du")
    cli.out("builder", "prune", "-f")
    assert unique in cli.out("builder", "du"), "an image has it"
    cli.out("rmi", image)
    assert "Total reclaimed space" in cli.out("builder", "prune", "-f")
    assert unique not in cli.out("builder", "du")


def test_ctrl_c_ends_a_build_and_leaves_nothing(
    cli: Cli, hutch_engine: Engine, unique: str
) -> None:
    words = ["build", "-f", "-", "."]
    script = f"printf 'FROM busybox\\nRUN echo {unique}; sleep 1000\\n' | exec {' '.join(cli.argv)}"
    terminal = Terminal(["/bin/sh", "-c", f"{script} {' '.join(words)}"])
    try:
        terminal.expect(f"# {unique}".encode())
        terminal.type(b"\x03")
        assert terminal.wait() in (130, -signal.SIGINT)
    finally:
        terminal.close()
    assert hutch_engine.list(all=True) == []
