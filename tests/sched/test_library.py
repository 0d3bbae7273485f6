"""`hutch.sched` as a library of its own: what it offers, and policies of other packages."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

import hutch.sched
from hutch.errors import Unsupported
from hutch.sched import POLICIES, Capacity, compare, create, describe
from tests.sched.traces import jobs

OWN = """
from hutch.sched.policies.ordered import Ordered
from hutch.sched import Parameter

class LongestFirst(Ordered):
    name = "longest"
    summary = "longest job first"
    parameters = {"most": Parameter("seconds", 100, "longer ones count as this")}

    def __init__(self, capacity, most=100):
        super().__init__(capacity)
        self._key = lambda job: -min(job.estimate, most)
"""


@pytest.fixture
def other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "their_policies.py").write_text(OWN)
    info = tmp_path / "their_policies-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-policies\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[hutch.policies]\nlongest = their_policies:LongestFirst\nbroken = their_policies:No\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_another_packages_policy_is_found_by_its_entry_point(other_package: Path) -> None:
    trace = jobs((0, 1), (0, 5), (0, 3))
    (summary,) = compare(trace, ["longest:most=50"], Capacity())
    assert summary.waiting.mean == (0 + 5 + 8) / 3
    assert describe("longest")[0] == "longest job first"
    with pytest.raises(Unsupported, match="policy broken: their_policies:No cannot be loaded"):
        create("broken", Capacity())


def test_every_name_that_is_offered_is_there() -> None:
    assert all(hasattr(hutch.sched, name) for name in hutch.sched.__all__)
    with pytest.raises(AttributeError):
        _ = hutch.sched.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_describes_itself(name: str) -> None:
    summary, parameters = describe(name)
    assert summary and all(parameter.summary for parameter in parameters.values())
    defaults = ",".join(f"{key}={value.default}" for key, value in parameters.items())
    assert create(f"{name}:{defaults}" if defaults else name, Capacity()).name == name


def test_a_pool_of_processes_gives_the_same_figures() -> None:
    trace = jobs((0, 9), (0, 3), (2, 1))
    plain = compare(trace, ["fcfs", "srtf"], Capacity())
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        pooled = compare(trace, ["fcfs", "srtf"], Capacity(), map=pool.map)
    assert [s.as_dict() for s in plain] == [s.as_dict() for s in pooled]


def test_a_dispatcher_loads_neither_the_simulator_nor_anything_with_effects() -> None:
    code = (
        "import sys, hutch.sched as s; s.create('fair', s.Capacity());"
        "bad = {'hutch.sched.simulator', 'hutch.engine', 'subprocess', 'socket', 'sqlite3',"
        " 'asyncio', 'ctypes'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
