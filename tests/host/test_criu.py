"""What is said of a CRIU that is missing, too old, or does not work; and of one that does."""

from __future__ import annotations

from pathlib import Path

import pytest

from hutch.errors import Unsupported
from hutch.host.criu import examine_criu, load_criu
from hutch.host.findings import State
from tests.requires import requires

pytestmark = requires("root")

FAKES = {
    "old": ("echo Version: 3.17.1", "older than 4.0"),
    "broken": ("echo nonsense; exit 1", "does not run"),
    "refused": (
        'case $1 in check) echo "Error (criu/x.c:1): no such feature"; exit 1;; esac;'
        " echo Version: 4.2.1",
        "no such feature",
    ),
    "lonely": (
        'case $1 in check) echo "Error (criu/x.c:1): Network is unreachable"; exit 1;; esac;'
        " echo Version: 4.2.1",
        "ip link set lo up",
    ),
}


@pytest.fixture
def fake(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    script, _ = FAKES[request.param]
    program = tmp_path / "criu"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("fake", "told"), [(name, told) for name, (_, told) in FAKES.items()], indirect=["fake"]
)
def test_a_criu_that_does_not_work_is_told_with_its_cure(
    fake: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unsupported, match=told) as failed:
        load_criu(None, program=fake)
    assert "HUTCH_CRIU" in (failed.value.hint or "")
    monkeypatch.setenv("HUTCH_CRIU", fake)
    (finding,) = examine_criu(None)
    assert finding.state == State.DEGRADED
    assert told in finding.detail


def test_a_criu_is_asked_once_until_it_changes(tmp_path: Path) -> None:
    program, asked = tmp_path / "criu", tmp_path / "asked"
    script = f"#!/bin/sh\necho . >>{asked}\necho Version: 4.2.1\n"
    program.write_text(script)
    program.chmod(0o755)
    assert load_criu(tmp_path, program=str(program)).version == "4.2.1"
    before = asked.read_text()
    assert load_criu(tmp_path, program=str(program)).version == "4.2.1"
    assert asked.read_text() == before
    program.write_text(script.replace("4.2.1", "4.3"))
    assert load_criu(tmp_path, program=str(program)).version == "4.3"
