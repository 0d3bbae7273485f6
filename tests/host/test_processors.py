"""Whose processors a machine's memory may go on with, and who may have userfaultfd."""

from __future__ import annotations

from pathlib import Path

import pytest

from hutch.host import processors
from hutch.host.processors import host_processor, missing_features, userfaultfd_obstacle
from hutch.host.qemu import load_qemu
from tests.requires import requires


def test_a_processor_is_read_as_linux_tells_it(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu vme sse2\n\nx: y\n")
    found = host_processor(file)
    assert (found.vendor, found.flags) == ("AuthenticAMD", ("fpu", "vme", "sse2"))


@pytest.mark.integration
@requires("qemu")
def test_qemu_tells_what_of_a_model_it_cannot_give() -> None:
    qemu = load_qemu(None).path
    lacking = missing_features(qemu, "tcg", "Skylake-Server")
    assert lacking is not None
    assert "avx512f" in lacking
    assert missing_features(qemu, "tcg", "qemu64") == ()
    assert missing_features(qemu, "tcg", "no-such-model") is None


def test_userfaultfd_takes_the_device_and_root(monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1":
        assert userfaultfd_obstacle() == ""
        return
    monkeypatch.setattr(processors, "misc_minor", lambda _: -1)
    assert "no /dev/userfaultfd" in userfaultfd_obstacle()
    monkeypatch.setattr(processors, "misc_minor", lambda _: 257)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "takes root" in userfaultfd_obstacle()
