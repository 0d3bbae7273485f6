"""What is known of QEMU, and the choice between hardware and emulation."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hutch.drivers.vm.sandbox import host_binds
from hutch.errors import InvalidArgument, Unsupported
from hutch.host import kvm, qemu
from hutch.host.findings import Finding, State
from hutch.host.qemu import (
    Acceleration,
    QemuFacts,
    choose_accelerator,
    find_qemu,
    load_qemu,
    load_tsc_khz,
)
from hutch.linux.tsc import measure_tsc_khz
from hutch.plan.machine.model import Q35
from hutch.plan.machine.version import QemuVersion
from tests.requires import requires


def facts(*accelerators: str) -> QemuFacts:
    return QemuFacts(
        path="/usr/bin/qemu",
        stamp="",
        version=QemuVersion(7, 2),
        accelerators=accelerators,
        machines=("pc-q35-7.2", "microvm"),
        devices=("virtio-blk-pci",),
    )


@requires("qemu")
def test_qemu_says_what_it_can(tmp_path: Path) -> None:
    found = load_qemu(tmp_path)
    assert "tcg" in found.accelerators
    found.require_machine(Q35)
    found.require_device("virtio-blk-pci")
    with pytest.raises(Unsupported, match="machine type pc-q35-99"):
        found.require_machine("pc-q35-99.0")
    with pytest.raises(Unsupported, match="device teapot"):
        found.require_device("teapot")


@requires("qemu")
def test_qemu_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_qemu(tmp_path)

    def refuse(path: str, stamp: str) -> QemuFacts:
        raise AssertionError("asked again")

    monkeypatch.setattr(qemu, "_ask", refuse)
    assert load_qemu(tmp_path) == first


def _program(path: Path, version: str) -> None:
    """A program that says what QEMU says."""
    path.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) echo "QEMU emulator version {version}";;\n'
        "-accel) printf 'Accelerators supported in QEMU binary:\\ntcg\\n';;\n"
        "-machine) printf 'Supported machines are:\\npc-q35-7.2 Standard PC\\n';;\n"
        "-device) printf 'Storage devices:\\nname \"virtio-blk-pci\", bus PCI\\n';; esac\n"
    )
    path.chmod(0o755)


def test_a_replaced_qemu_is_asked_anew(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    for number, version in enumerate(("7.2.1", "10.0.2")):
        _program(program, version)
        os.utime(program, ns=(number, number))
        found = load_qemu(tmp_path, program=str(program))
        assert str(found.version) == version
    assert found.machines == ("pc-q35-7.2",)
    assert found.devices == ("virtio-blk-pci",)


def test_a_damaged_cache_is_no_obstacle(tmp_path: Path) -> None:
    _program(tmp_path / "qemu", "7.2.1")
    (tmp_path / "qemu.json").write_bytes(b"{")
    assert load_qemu(tmp_path, program=str(tmp_path / "qemu")).accelerators == ("tcg",)


def test_a_program_that_fails_is_told(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    program.chmod(0o755)
    with pytest.raises(Unsupported, match="broken"):
        load_qemu(None, program=str(program))


def test_no_qemu_is_told_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "find_program", lambda name: None)
    with pytest.raises(Unsupported, match="is not installed") as caught:
        load_qemu(None)
    assert "apt-get install" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("state", "wanted", "chosen"),
    [
        (State.OK, "auto", "kvm"),
        (State.OK, "kvm", "kvm"),
        (State.DEGRADED, "auto", "tcg"),
        (State.DEGRADED, "kvm", "kvm"),
        (State.MISSING, "auto", "tcg"),
    ],
)
def test_kvm_is_taken_where_it_is_proven_or_wanted(
    monkeypatch: pytest.MonkeyPatch, state: State, wanted: qemu.AcceleratorWish, chosen: str
) -> None:
    finding = Finding(area="vm", name="kvm", state=state, detail="as seen")
    monkeypatch.setattr(kvm, "kvm_boots", lambda *_, **__: finding)
    choice = choose_accelerator(None, facts("tcg", "kvm"), wanted)
    assert (choice.accelerator, choice.reason) == (chosen, "as seen")


def test_kvm_that_hangs_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = Finding(area="vm", name="kvm", state=State.MISSING, detail="it hangs")
    monkeypatch.setattr(kvm, "kvm_boots", lambda *_, **__: finding)
    with pytest.raises(Unsupported, match="KVM: it hangs"):
        choose_accelerator(None, facts("tcg", "kvm"), "kvm")
    with pytest.raises(Unsupported, match=r"no KVM \(it hangs\)"):
        choose_accelerator(None, facts("kvm"))


def test_a_qemu_without_kvm_emulates() -> None:
    assert choose_accelerator(None, facts("tcg")).accelerator == "tcg"
    with pytest.raises(Unsupported, match="built without"):
        choose_accelerator(None, facts("tcg"), "kvm")


def test_emulation_by_wish_probes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm, "kvm_boots", lambda *_, **__: pytest.fail("probed"))
    assert choose_accelerator(None, facts("tcg", "kvm"), "tcg") == Acceleration(
        accelerator="tcg", reason="asked for"
    )


def test_the_counter_counts_at_one_speed() -> None:
    first, second = measure_tsc_khz(0.02), measure_tsc_khz(0.02)
    if os.uname().machine != "x86_64":
        assert first is None
        return
    assert first is not None and second is not None
    assert abs(first - second) < first // 1000


def test_the_counter_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = iter([1000, 2000])
    monkeypatch.setattr("hutch.linux.tsc.measure_tsc_khz", lambda: next(speeds))
    assert [load_tsc_khz(tmp_path), load_tsc_khz(tmp_path)] == [1000, 1000]


def test_another_qemu_is_named_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "qemu/bin/qemu-system-x86_64"
    path.parent.mkdir(parents=True)
    _program(path, "9.9.9")
    path.chmod(0o755)
    monkeypatch.setenv("HUTCH_QEMU", str(path))
    found = load_qemu(None)
    assert (found.path, str(found.version)) == (str(path), "9.9.9")
    shown = dict(host_binds(found.path))
    assert shown[str(tmp_path / "qemu")] == str(tmp_path / "qemu")


@pytest.mark.parametrize("named", ["qemu-system-x86_64", "/nowhere/bin/qemu", "/etc/passwd"])
def test_what_cannot_be_a_qemu_is_refused_by_the_variables_name(
    named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUTCH_QEMU", named)
    with pytest.raises(InvalidArgument, match="HUTCH_QEMU"):
        find_qemu()


def test_a_qemu_outside_a_tree_of_its_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _program(tmp_path / "qemu", "9.9.9")
    (tmp_path / "qemu").chmod(0o755)
    monkeypatch.setenv("HUTCH_QEMU", str(tmp_path / "qemu"))
    with pytest.raises(InvalidArgument, match="directory named bin"):
        find_qemu()
