"""What holds for QEMU of every machine, however it came to run: the kernel is asked."""

from __future__ import annotations

import os
from pathlib import Path

from hutch.engine import Engine, Instance
from hutch.linux.cgroup import detect
from tests.vm.machines import processes

__all__ = ["assert_confined"]

_KINDS = ("mnt", "pid", "net", "ipc", "uts")
_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def assert_confined(engine: Engine, box: Instance) -> None:
    """See that a machine's processes are a user's that nobody else is, without capabilities and
    held to a filter, in namespaces, a root directory and a control group of their own."""
    found = processes(engine, box)
    assert set(found) == {"qemu", "vmm"}
    assert set(found.values()) <= set(detect().load(box.id).pids())
    for name, pid in found.items():
        process = Path(f"/proc/{pid}")
        lines = (process / "status").read_text().splitlines()
        status = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
        assert all(int(number) >= 1 << 30 for number in status["Uid"].split()), name
        assert all(int(number) >= 1 << 30 for number in status["Gid"].split()), name
        assert status["Groups"] == "", name
        assert {kind: int(status[kind], 16) for kind in _SETS} == dict.fromkeys(_SETS, 0), name
        assert status["NoNewPrivs"] == "1", name
        if name == "qemu":
            assert status["Seccomp"] == "2"
            assert "-sandbox" in (process / "cmdline").read_text().split("\0")
        for kind in _KINDS:
            assert os.readlink(process / "ns" / kind) != os.readlink(f"/proc/self/ns/{kind}"), kind
        root = process / "root"
        for directory in ("etc", "home", "var", "sys", str(engine.root).lstrip("/")):
            assert not (root / directory).exists(), directory
