"""`-o json`: what is made, changed and removed is told to programs, and so are errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.requires import requires


def test_what_commands_make_and_change_is_one_object(cli: Any, name: str) -> None:
    def tell(*args: str) -> Any:
        return json.loads(cli.out("-o", "json", *args))

    made = tell("create", "--name", name, "--network", "none", "busybox", "true")
    assert made == {"Id": made["Id"], "Name": name}
    assert tell("start", name) == [{"Name": name}]
    assert tell("wait", name) == [{"Name": name, "ExitCode": 0}]
    assert tell("update", "--memory", "64m", name, made["Id"]) == [
        {"Name": name},
        {"Name": made["Id"]},
    ]
    image = tell("commit", name, f"{name}:1")
    assert list(image) == ["Id", "Names"] and image["Names"][0].endswith(f"{name}:1")
    assert len(tell("tag", f"{name}:1", f"{name}:2")["Names"]) == 2
    assert tell("rename", name, f"{name}-new") == {"Id": made["Id"], "Name": f"{name}-new"}
    assert tell("rm", f"{name}-new") == [{"Name": f"{name}-new"}]
    first, second = tell("rmi", f"{name}:1", f"{name}:2")
    assert first["Untagged"] and not first["Deleted"]
    assert second["Deleted"][0] == image["Id"]


def test_what_goes_in_and_out_is_told(cli: Any, name: str, tmp_path: Path) -> None:
    def tell(*args: str) -> Any:
        return json.loads(cli.out("-o", "json", *args))

    archive, file = str(tmp_path / "archive"), str(tmp_path / "file")
    (tmp_path / "file").write_text("here")
    cli.out("create", "--name", name, "--network", "none", "busybox", "true")
    try:
        told = {"Name": name, "Source": file, "Target": "/there"}
        assert tell("cp", file, f"{name}:/there") == told
        told = {"Name": name, "Source": "/there", "Target": f"{file}2"}
        assert tell("cp", f"{name}:/there", f"{file}2") == told
        assert tell("export", "-o", archive, name) == {"Name": name, "File": archive}
        assert tell("save", "-o", archive, "busybox") == {"Names": ["busybox"], "File": archive}
        cli.out("volume", "create", name)
        told = {"Name": name, "File": archive}
        assert tell("volume", "export", "-o", archive, name) == told
        assert tell("volume", "import", name, archive) == {"Name": name}
    finally:
        cli.out("rm", name)
        cli.out("volume", "rm", "-f", name)


def test_a_look_at_a_dockerfile_is_told(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("from busybox\nRUN true\n")
    done = cli("-o", "json", "build", "--check", str(tmp_path))
    told = json.loads(done.stdout)
    assert done.returncode == 1 and told["Dockerfile"] == "Dockerfile"
    assert told["Warnings"] and told["Warnings"][0].keys() == {"Line", "Rule", "Message"}
    (tmp_path / "Dockerfile").write_text("FROM busybox\nRUN true\n")
    told = json.loads(cli.out("-o", "json", "build", "--check", str(tmp_path)))
    assert told == {"Dockerfile": "Dockerfile", "Warnings": []}


@pytest.mark.parametrize("kind", ["volume", "queue", "pool"])
def test_made_and_removed_objects_have_their_names(cli: Any, name: str, kind: str) -> None:
    assert json.loads(cli.out(kind, "create", name, "--output", "json")) == {"Name": name}
    done = cli(kind, "rm", name, f"{name}-no", "--output", "json")
    assert done.returncode == 1
    assert json.loads(done.stdout) == [{"Name": name}]
    assert json.loads(done.stderr)["Error"]["Kind"] == "NotFound"


@requires("nftables", "netns")
def test_a_network_is_made_and_removed(cli: Any, name: str) -> None:
    made = json.loads(cli.out("network", "create", name, "--output", "json"))
    assert made == {"Id": made["Id"], "Name": name}
    cli.out("create", "--name", f"{name}-joins", "busybox", "true")
    try:
        joined = json.loads(cli.out("-o", "json", "network", "connect", name, f"{name}-joins"))
        assert joined == {"Network": name, "Name": f"{name}-joins"}
        left = json.loads(cli.out("-o", "json", "network", "disconnect", name, f"{name}-joins"))
        assert left == joined
    finally:
        cli.out("rm", f"{name}-joins")
    assert json.loads(cli.out("network", "rm", name, "-o", "json")) == [{"Name": name}]


@pytest.mark.parametrize(
    "args",
    [
        ["-o", "json", "create", "--bogus", "busybox"],
        ["ps", "--bogus", "-o", "json"],
        ["-o", "json", "no-such-command"],
        ["inspect", "no-such-thing", "-o", "json"],
        ["-o", "json", "run", "--memory", "x", "busybox"],
    ],
)
def test_an_error_is_one_line_of_json(cli: Any, args: list[str]) -> None:
    done = cli(*args)
    (line,) = done.stderr.splitlines()
    error = json.loads(line)["Error"]
    assert error["Message"] and error["Kind"]
    assert error["ExitCode"] == done.returncode


def test_what_there_is_no_room_for_tells_the_decision(cli: Any, name: str) -> None:
    room = ("--name", name, "--network", "none", "--memory", "900t")
    cli.out("system", "configure", "reserved.memory=1m")
    try:
        done = cli("-o", "json", "create", *room, "busybox")
    finally:
        cli.out("system", "configure", "reserved.memory=none")
    assert done.returncode and not done.stdout
    assert json.loads(done.stderr)["Error"]["Admission"]["shortages"]
