"""Every command has help with examples; every error has an exit code."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest

from hutch import __version__, errors
from hutch.cli.completion import COMMANDS as COMPLETION
from hutch.cli.exitcodes import EXIT_CODES, exit_code, report
from hutch.cli.help import command_page, overview
from hutch.cli.main import find_command, load_command, run
from hutch.cli.options import UsageError, parse
from hutch.cli.run_options import CREATE_OPTIONS, engine_options
from hutch.cli.table import ALIASES, GROUPS, HIDDEN, TABLE
from hutch.spec.build import OPTIONS


@pytest.mark.parametrize("words", sorted(TABLE))
def test_every_command_loads_and_explains_itself(words: str) -> None:
    command = load_command(words)
    page = command_page(words, command)
    assert page.startswith(f"Usage: hutch {words}")
    assert command.summary.endswith(".")
    if words not in HIDDEN and command.arguments:
        assert command.examples, words
    names = [option[0] for option in command.options]
    shorts = [option[1] for option in command.options if option[1]]
    assert len(set(names)) == len(names)
    assert len(set(shorts)) == len(shorts)
    for example in command.examples:
        assert "hutch" in example


@pytest.mark.parametrize("words", sorted(set(TABLE) - HIDDEN))
def test_help_is_shown_for_every_command(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*words.split(), "--help"]) == 0
    assert f"Usage: hutch {words}" in capsys.readouterr().out


def test_the_overview_names_every_command() -> None:
    text = overview(None)
    for words in set(TABLE) - HIDDEN:
        assert words.split()[0] in text
    for group in set(GROUPS) - {"container"}:
        for words in TABLE:
            if words.startswith(group + " "):
                assert words.split()[1] in overview(group)


@pytest.mark.parametrize(
    ("argv", "words", "rest"),
    [
        (["run", "-it", "x"], "run", ["-it", "x"]),
        (["container", "run", "x"], "run", ["x"]),
        (["container", "ls", "-a"], "ps", ["-a"]),
        (["image", "rm", "x"], "image rm", ["x"]),
        (["volume", "list"], "volume ls", []),
        (["inspect", "image"], "inspect", ["image"]),
    ],
)
def test_commands_are_found(argv: list[str], words: str, rest: list[str]) -> None:
    assert find_command(argv) == (words, rest)


@pytest.mark.parametrize(
    ("argv", "near"),
    [(["rnu"], "run"), (["network", "crate"], "network create"), (["imagse"], "images")],
)
def test_an_unknown_command_is_told_the_near_one(argv: list[str], near: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_command(argv)
    assert near in (caught.value.hint or "")
    assert caught.value.exit_code == 1


def test_aliases_lead_to_commands() -> None:
    assert set(ALIASES.values()) <= set(TABLE)


def test_every_error_has_an_exit_code() -> None:
    kinds = [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.HutchError)
    ]
    assert set(kinds) == set(EXIT_CODES)
    for kind in kinds:
        assert exit_code(kind("x")) == EXIT_CODES[kind]
        assert exit_code(kind("x"), run_like=True) == 125


def test_a_failed_program_keeps_its_own_exit_code() -> None:
    from hutch.drivers.failures import CommandFailed

    assert exit_code(CommandFailed("x", exit_code=127), run_like=True) == 127
    assert exit_code(CommandFailed("x", exit_code=126)) == 126


def test_an_error_is_shown_with_its_cure(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(errors.Busy("port 80 is taken", hint="choose another")) == 1
    assert capsys.readouterr().err == "hutch: port 80 is taken\nhint: choose another\n"
    assert report(ValueError("oops")) == 1
    assert "internal error" in capsys.readouterr().err


_SAMPLES = {"flag": True, "int": 1, "list": ["x"], "text": "x"}


@pytest.mark.parametrize("option", [o for o in CREATE_OPTIONS if o[0] != "dry-run"])
def test_every_option_of_run_is_one_of_the_engine(option: Any, tmp_path: Any) -> None:
    text = tmp_path / "file"
    text.write_text("A=1\n")
    value: Any = "local" if option[0] == "volume-driver" else _SAMPLES[option[2]]
    if option[0].endswith("-file"):
        value = [str(text)]
    options = engine_options({option[0].replace("-", "_"): value})
    assert set(options) <= OPTIONS


def test_completion_scripts_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert run(["completion", shell]) == 0
        assert "hutch _complete" in capsys.readouterr().out
    assert COMPLETION["completion"].summary
    assert run(["completion", "tcsh"]) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ru"], "run"),
        (["image", ""], "bootstrap"),
        (["network", ""], "connect"),
        (["run", "--priv"], "--privileged"),
        (["--"], "--root"),
        (["-o", "json", "ps", "--f"], "--format"),
        (["ps", "-o", ""], "json"),
        (["run", "--pull", ""], "missing"),
        (["run", "--pull", "=", "m"], "missing"),
        (["run", "--name", "x", "-e", "a", "--priv"], "--privileged"),
        (["container", "r"], "run"),
    ],
)
def test_words_are_completed(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["_complete", "--", *words]) == 0
    assert expected in capsys.readouterr().out.split()


def test_trailing_options_do_not_shadow_those_of_a_command() -> None:
    values, _ = parse(load_command("save").options, ["-o", "file", "img"])
    assert values["output"] == "file"


def test_usage_errors_have_dockers_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ps", "--nope"]) == 125
    assert run(["rm"]) == 1
    assert run(["nosuch"]) == 1
    assert run(["-o", "yaml", "ps"]) == 125
    assert run(["migrate", "--parallel", "nan", "box", "unix:///nowhere"]) == 125
    assert "hutch rm INSTANCE [INSTANCE...]" in capsys.readouterr().err


def test_what_commands_leave_out_of_msgspec_is_whole_for_who_asks_later() -> None:
    program = """
import sys
from hutch.cli.main import _load_msgspec
_load_msgspec()
assert not {"platform", "inspect", "msgspec.inspect", "typing_extensions"} & set(sys.modules)
import uuid, platform, msgspec, msgspec.inspect
assert platform.machine()
assert msgspec.inspect.type_info(int) == msgspec.inspect.IntType()
assert msgspec.json.decode(msgspec.json.encode(uuid.UUID(int=7)), type=uuid.UUID).int == 7
"""
    subprocess.run([sys.executable, "-I", "-c", program], check=True, timeout=30)


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["create", "--link-local-ip=169.254.1.1", "x"], "--ip6"),
        (["container", "run", "--runtime", "runc", "x"], "--isolation"),
        (["start", "--checkpoint", "c", "x"], "hutch snapshot create"),
        (["image", "save", "--platform", "linux/arm64", "x"], "hutch pull --platform"),
        (["rmi", "--platform", "linux/arm64", "x"], "hutch pull --platform"),
        (["network", "create", "--ipam-driver", "dhcp", "x"], "only default"),
        (["network", "create", "--ipv4=false", "x"], "every network has IPv4"),
        (["volume", "create", "--secret", "a=b"], "cluster"),
        (["run", "--volume-driver", "nfs", "x"], "only local"),
        (["buildx", "create"], "one builder"),
        (["build", "--allow", "x", "."], "no more rights"),
        (["login"], "config.json"),
        (["swarm", "init"], "no cluster"),
        (["volume", "update", "x"], "cluster"),
        (["compose", "up"], "hutch serve --docker"),
    ],
)
def test_what_docker_has_and_hutch_has_not_is_refused_with_a_reason(
    argv: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(argv) in (1, 125)
    said = capsys.readouterr().err
    assert why in said
    assert "unknown" not in said


@pytest.mark.parametrize(
    ("template", "shown"),
    [("{{.Version}}", "VERSION"), ("{{.Server.Version}}", "VERSION"), ("json", '"VERSION"')],
)
def test_the_version_is_shown_by_a_template(
    template: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["version", "-f", template]) == 0
    assert shown.replace("VERSION", __version__) in capsys.readouterr().out
