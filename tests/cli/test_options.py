"""Options as Docker reads them."""

from __future__ import annotations

from typing import Any

import pytest

from hutch.cli.options import Option, UsageError, parse
from hutch.cli.run_options import engine_options, read_env_file

TABLE: tuple[Option, ...] = (
    ("tty", "t", "flag", "", ""),
    ("interactive", "i", "flag", "", ""),
    ("env", "e", "list", "", ""),
    ("name", "", "text", "", ""),
    ("last", "n", "int", "", ""),
    ("dry-run", "", "flag", "", ""),
)


@pytest.mark.parametrize(
    ("argv", "values", "arguments"),
    [
        (["-it", "img", "-x"], {"interactive": True, "tty": True}, ["img", "-x"]),
        (["-ite", "A=1", "img"], {"interactive": True, "tty": True, "env": ["A=1"]}, ["img"]),
        (["-eA=1", "-e=B=2", "-e", "C=3", "i"], {"env": ["A=1", "B=2", "C=3"]}, ["i"]),
        (["--env=A=1", "--env", "B", "i"], {"env": ["A=1", "B"]}, ["i"]),
        (["--tty=false", "-i=false", "i"], {"tty": False, "interactive": False}, ["i"]),
        (["--name", "--", "--", "-t"], {"name": "--"}, ["-t"]),
        (["-n3", "--dry-run", "i"], {"last": 3, "dry_run": True}, ["i"]),
        (["-n", "-1", "i"], {"last": -1}, ["i"]),
        (["-", "i"], {}, ["-", "i"]),
        ([], {}, []),
    ],
)
def test_options_end_at_the_first_argument(
    argv: list[str], values: dict[str, Any], arguments: list[str]
) -> None:
    assert parse(TABLE, argv, interspersed=False) == (values, arguments)


def test_options_may_follow_arguments_where_the_command_allows() -> None:
    assert parse(TABLE, ["a", "-t", "b", "--", "-i"]) == ({"tty": True}, ["a", "b", "-i"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nmae", "x"], "unknown option: --nmae"),
        (["-x"], "unknown option: -x in -x"),
        (["-tx"], "unknown option: -x in -tx"),
        (["--name"], "option needs a value: --name"),
        (["-e"], "option needs a value: -e"),
        (["--tty=maybe"], "--tty: expected true or false, got 'maybe'"),
        (["-n", "x"], "-n: expected a whole number, got 'x'"),
    ],
)
def test_a_wrong_option_is_named(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(TABLE, argv)
    assert caught.value.message == message
    assert caught.value.exit_code == 125


def test_an_option_that_is_near_to_none_is_told_none() -> None:
    with pytest.raises(UsageError) as caught:
        parse((*TABLE, ("gpus", "", "text", "", "")), ["--bogus"], interspersed=False)
    assert caught.value.hint == "see --help"


def test_a_misspelt_option_is_told_the_near_one() -> None:
    with pytest.raises(UsageError) as caught:
        parse(TABLE, ["--nmae"])
    assert caught.value.hint == "did you mean --name?"


def test_run_options_become_those_of_the_engine(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    env_file = tmp_path / "env"
    env_file.write_text("# comment\nA=1\n\nFROM_HERE\nB=two words \n")
    monkeypatch.setenv("FROM_HERE", "yes")
    monkeypatch.delenv("NOT_HERE", raising=False)
    monkeypatch.chdir(tmp_path)
    profile = tmp_path / "profile.json"
    profile.write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
    options = engine_options(
        {
            "env": ["C=3", "FROM_HERE", "NOT_HERE"],
            "env_file": [str(env_file)],
            "rm": True,
            "volume": ["./x:/y", "data:/z", "/a:/b"],
            "mount": ["type=bind,source=x,target=/q"],
            "net": ["none"],
            "dns_opt": ["a"],
            "dns_option": ["b"],
            "security_opt": [f"seccomp={profile}", "seccomp=unconfined"],
            "vm": True,
            "detach": True,
        }
    )
    assert options == {
        "env": ["A=1", "FROM_HERE=yes", "B=two words ", "C=3", "FROM_HERE=yes"],
        "remove": True,
        "volumes": [f"{tmp_path}/x:/y", "data:/z", "/a:/b"],
        "mounts": [f"type=bind,source={tmp_path}/x,target=/q"],
        "network": ["none"],
        "dns_options": ["a", "b"],
        "security_opt": [
            'seccomp={"defaultAction": "SCMP_ACT_ALLOW"}',
            "seccomp=unconfined",
        ],
        "isolation": "vm",
    }


@pytest.mark.parametrize("content", [b"=x\n", b"a b=1\n", b"\xff\xfe\x00", b"x" * (2 << 20)])
def test_a_bad_env_file_is_refused(tmp_path: Any, content: bytes) -> None:
    path = tmp_path / "env"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="env"):
        read_env_file(str(path))
