"""The KVM probe: it believes a guest that ran, and nothing less."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hutch.host import kvm
from hutch.host.findings import State
from tests.requires import requires


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "none: No such file" in (kvm.kvm_opens(tmp_path / "none") or "")


def test_a_file_that_is_not_kvm_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kvm").write_bytes(b"")
    assert kvm.kvm_opens(tmp_path / "kvm") is not None


def test_the_newest_kernel_is_the_one_to_try(tmp_path: Path) -> None:
    for age, name in enumerate(("vmlinuz-2", "vmlinuz-1")):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (age, age))
    assert kvm.installed_kernel(tmp_path) == tmp_path / "vmlinuz-1"


def test_no_kernel_is_no_error(tmp_path: Path) -> None:
    assert kvm.installed_kernel(tmp_path) is None


@requires("qemu")
def test_the_tiny_guest_runs_under_emulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Which kernel the machine has must not decide the outcome.
    monkeypatch.setattr(kvm, "installed_kernel", lambda: None)
    finding = kvm.kvm_boots(tmp_path, accelerator="tcg")
    assert finding.state is State.DEGRADED
    assert finding.detail.startswith("a tiny guest runs")
    assert (tmp_path / "tcg.json").exists()


@requires("qemu")
def test_a_guest_that_does_not_run_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    halts = kvm.tiny_guest().replace(bytes([0xE6, kvm.EXIT_PORT]), bytes([0x90, 0x90]))
    monkeypatch.setattr(kvm, "tiny_guest", lambda: halts)
    monkeypatch.setattr(kvm, "TINY_TIMEOUT_S", 1.0)
    finding = kvm.kvm_boots(accelerator="tcg")
    assert finding.state is State.MISSING
