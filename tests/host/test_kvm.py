"""The KVM probe: it believes a guest that ran, and nothing less."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
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


@requires("qemu")
def test_the_probe_is_run_once_by_all_who_ask_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []

    def slow(qemu: str, accelerator: str, kernel: Path | None) -> tuple[State, str]:
        tries.append(accelerator)
        asked.wait(60)
        return State.OK, "boots"

    asked = threading.Event()
    monkeypatch.setattr(kvm, "_try", slow)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(kvm.kvm_boots, tmp_path, accelerator="tcg") for _ in range(4)]
        asked.set()
        assert {answer.result().detail for answer in answers} == {"boots"}
    assert tries == ["tcg"]


@requires("qemu")
def test_another_kernel_is_another_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvm, "_try", lambda qemu, accelerator, kernel: (State.OK, str(kernel)))
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(b"")
        finding = kvm.kvm_boots(tmp_path / "cache", accelerator="tcg", kernel=tmp_path / name)
        assert finding.detail.endswith(name)


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvm, "_try", lambda qemu, accelerator, kernel: (State.OK, "boots"))
    (tmp_path / "file").write_bytes(b"")
    finding = kvm.kvm_boots(tmp_path / "file/cache", accelerator="tcg", qemu="/bin/true")
    assert finding.detail == "boots"


@pytest.mark.parametrize(("took", "patience"), [(0.01, 2.0), (0.5, 3.0), (3.0, 18.0), (40.0, 60.0)])
def test_kvm_gets_several_times_what_emulation_took(
    monkeypatch: pytest.MonkeyPatch, took: float, patience: float
) -> None:
    clock = iter([0.0, took])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr(kvm, "_tiny_guest_runs", lambda qemu, accelerator, timeout_s: True)
    assert kvm._patience("qemu", "kvm")[0] == patience


@pytest.mark.parametrize(("took", "patience"), [(0.3, 20.0), (1.5, 90.0), (9.0, 180.0)])
def test_a_kernel_gets_more_where_the_host_is_emulated_itself(
    monkeypatch: pytest.MonkeyPatch, took: float, patience: float
) -> None:
    clock = iter([0.0, took])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr(kvm, "_tiny_guest_runs", lambda qemu, accelerator, timeout_s: True)
    assert kvm._patience("qemu", "kvm")[1] == patience


def test_without_emulation_to_compare_with_kvm_gets_all_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kvm, "_tiny_guest_runs", lambda qemu, accelerator, timeout_s: False)
    assert kvm._patience("qemu", "kvm") == (kvm.TINY_TIMEOUT_S, kvm.KERNEL_TIMEOUT_S)
