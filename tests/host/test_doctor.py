"""The examination of the host: it agrees with the tests' own probes and changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from hutch.engine.examination import examine_host
from hutch.host.doctor import _reclaim, examine, render_table
from hutch.host.findings import Finding, Report, State
from hutch.host.machines import examine_machines
from tests.requires import missing, requires


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return examine_host(tmp_path_factory.mktemp("root"))


pytestmark = requires("root")


def test_a_host_that_runs_this_suite_can_run_containers(report: Report) -> None:
    assert report.usable, render_table(report)


@pytest.mark.parametrize(
    ("finding", "need"),
    [
        ("overlay", "overlayfs"),
        ("user namespaces", "userns"),
        ("net namespace", "netns"),
        ("nat", "nftables"),
        ("mmdebstrap", "mmdebstrap"),
        ("slirp4netns", "slirp4netns"),
    ],
)
def test_a_finding_agrees_with_the_probe_of_the_tests(
    report: Report, finding: str, need: str
) -> None:
    assert (report.get(finding).state is State.OK) == (missing(need) is None)


@requires("qemu", "mkfs.erofs", "mke2fs")
def test_a_host_with_qemu_can_run_machines_and_says_on_what(report: Report) -> None:
    assert report.runs_machines, render_table(report)
    accelerator = report.get("accelerator")
    assert accelerator.detail.startswith("kvm" if report.get("kvm").state is State.OK else "tcg")
    assert report.get("sandbox").detail == "namespaces and a user of its own for QEMU"


@requires("root", "qemu")
def test_the_sandbox_of_machines_is_tried_before_there_is_a_root(tmp_path: Path) -> None:
    root = tmp_path / "not-yet"
    found = {finding.name: finding for finding in examine_machines(root)}
    assert found["sandbox"].detail == "namespaces and a user of its own for QEMU"
    assert not root.exists()


def test_a_qemu_that_is_not_there_is_told_with_the_way_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUTCH_QEMU", "/nowhere/bin/qemu-system-x86_64")
    found = {finding.name: finding for finding in examine_machines(tmp_path)}
    assert found["qemu"].state is State.MISSING and "/nowhere" in found["qemu"].detail
    assert found["qemu"].cure == "name another in HUTCH_QEMU, or leave it out"


def test_what_reclaim_goes_by_is_told(report: Report, tmp_path: Path) -> None:
    names = ("memory pressure", "page merging", "loop devices")
    assert report.get("loop devices").state is State.OK
    found = {finding.name: finding for finding in _reclaim(tmp_path, tmp_path, tmp_path)}
    assert tuple(found) == names
    assert {finding.state for finding in found.values()} == {State.DEGRADED}


def test_what_is_missing_comes_with_its_cure(report: Report) -> None:
    lacking = [f for f in report.findings if f.state is State.MISSING]
    assert all(f.cure for f in lacking)


def test_the_examination_leaves_the_namespaces_of_the_caller_alone(tmp_path: Path) -> None:
    def own() -> list[str]:
        names = sorted(os.listdir("/proc/self/ns"))
        return [os.readlink(f"/proc/self/ns/{n}") for n in names if "for_children" not in n]

    # Descriptors of earlier tests may be closed meanwhile, and others mount beside us.
    before, open_before = own(), set(os.listdir("/proc/self/fd"))
    examine(tmp_path)
    assert own() == before
    assert set(os.listdir("/proc/self/fd")) - open_before == set()
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def test_a_report_survives_json(report: Report) -> None:
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report


def test_the_table_shows_each_finding_and_the_cure_of_what_lacks() -> None:
    report = Report(
        findings=(
            Finding(area="kernel", name="pidfd", state=State.OK, detail="there"),
            Finding(
                area="storage",
                name="overlay",
                state=State.MISSING,
                detail="no such device",
                cure="modprobe overlay",
                needed=True,
            ),
        )
    )
    table = render_table(report)
    assert "pidfd" in table
    assert "MISSING   no such device" in table
    assert "cure: modprobe overlay" in table
    assert "cannot run containers" in table and "cannot run virtual machines" in table
