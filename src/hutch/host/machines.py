"""What this host can do for virtual machines: QEMU, accelerator, disks, shares, sandbox."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hutch.errors import HutchError
from hutch.host.findings import Finding, State, finding_of
from hutch.host.programs import find_program
from hutch.host.qemu import QemuFacts, choose_accelerator, load_qemu

__all__ = ["examine_machines"]

_QEMU = "apt-get install --no-install-recommends qemu-system-x86"
_SANDBOXES = {
    "own": "namespaces and a user of its own for QEMU",
    "user": "a user namespace for QEMU, as this user",
    "none": "no namespaces: QEMU runs as this user, by its own filter",
}


def examine_machines(root: Path) -> Iterator[Finding]:
    """Yield the findings of the area `vm`; the first time up to 25 s, while KVM is tried."""
    cache = root / "cache" if os.access(root, os.W_OK) else None
    qemu: QemuFacts | None = None
    failure: str | None = None
    try:
        qemu = load_qemu(cache)
    except HutchError as exc:
        failure = exc.message
    named = " (HUTCH_QEMU)" if os.environ.get("HUTCH_QEMU") else ""
    yield _needed(
        "qemu",
        failure,
        good=f"{qemu.version}, {qemu.path}{named}" if qemu else "",
        cure="name another in HUTCH_QEMU, or leave it out" if named else _QEMU,
    )
    yield _kvm(cache)
    if qemu is not None:
        yield _accelerator(cache, qemu)
    for name, program, package in (
        ("root disks", "mkfs.erofs", "erofs-utils"),
        ("writable disks", "mke2fs", "e2fsprogs"),
    ):
        path = find_program(program)
        missing = None if path else f"{program} is not installed"
        yield _needed(name, missing, good=path or "", cure=f"apt-get install {package}")
    yield _kernel(root)
    yield _shares()
    yield _sandbox(root, cache)
    yield _network()


def _needed(name: str, failure: str | None, *, good: str, cure: str) -> Finding:
    """What a machine cannot do without; containers can, so the host is not unable for it."""
    return finding_of("vm", name, failure, good=good, cure=cure)


def _kvm(cache: Path | None) -> Finding:
    from hutch.host.kvm import kvm_boots

    try:
        return kvm_boots(cache)
    except HutchError as exc:
        return finding_of("vm", "kvm", exc.message, worst=State.DEGRADED)


def _accelerator(cache: Path | None, qemu: QemuFacts) -> Finding:
    """Say what `--accel auto` takes. The guests' kernel is tried besides, at the first start."""
    try:
        chosen = choose_accelerator(cache, qemu)
    except HutchError as exc:
        return finding_of("vm", "accelerator", exc.message, cure=_QEMU)
    return finding_of(
        "vm",
        "accelerator",
        None if chosen.accelerator == "kvm" else f"tcg, software emulation: {chosen.reason}",
        good=f"kvm: {chosen.reason}",
        worst=State.DEGRADED,
    )


def _kernel(root: Path) -> Finding:
    kept = len(list((root / "kernels").glob("*/vmlinux")))
    apt = find_program("apt-get")
    return finding_of(
        "vm",
        "guest kernels",
        None if kept or apt else "none, and no apt to fetch one",
        good=f"{kept} kept" if kept else "none yet; Debian's is fetched with the first machine",
        cure="hutch vm kernel add --file VMLINUZ --modules /lib/modules/VERSION",
    )


def _shares() -> Finding:
    from hutch.host.virtiofsd import find_virtiofsd

    try:
        good, failure = find_virtiofsd().path, None
    except HutchError as exc:
        good, failure = "", f"not installed: {exc.message}"
    return finding_of(
        "vm",
        "virtiofsd",
        failure,
        good=good,
        cure="apt-get install virtiofsd (Debian bookworm: qemu-system-common)",
        worst=State.DEGRADED,
    )


def _sandbox(root: Path, cache: Path | None) -> Finding:
    from hutch.host.isolation import load_isolation

    if cache is None:
        # Before its first use a root is not there, nor is another user's writable.
        with tempfile.TemporaryDirectory(prefix="hutch-doctor-") as scratch:
            found = load_isolation(Path(scratch))
    else:
        found = load_isolation(root)
    text = _SANDBOXES[found.namespaces]
    reason = f" ({found.reason})" if found.reason else ""
    return finding_of(
        "vm",
        "sandbox",
        f"{text}{reason}" if found.namespaces == "none" else None,
        good=text,
        cure="let this user make namespaces, or run as root",
        worst=State.DEGRADED,
    )


def _network() -> Finding:
    from hutch.host.isolation import is_privileged

    if not is_privileged():
        return finding_of("vm", "network", None, good="QEMU's own: no bridges, ports published")
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
        failure = None
    except OSError as exc:
        failure = f"/dev/net/tun: {(exc.strerror or '').lower()}"
    return finding_of(
        "vm",
        "network",
        failure,
        good="taps on the networks of containers",
        cure="modprobe tun; until then --network none",
        worst=State.DEGRADED,
    )
