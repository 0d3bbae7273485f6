"""Find out whether KVM really runs a guest, by running one.

A `/dev/kvm` that opens proves little: under some nested hypervisors the calls work, small
guests run, and a kernel that was started by its firmware hangs. So the probe starts QEMU
twice: with a guest of our own made of 30 bytes of code, and with an installed Linux kernel,
which has succeeded when it says on its console that it found no root file system. Without a
kernel to try, the answer is `degraded`: not proven.

How long to wait for the tiny guest is measured: its twin runs under emulation first, which
no working KVM is slower than. Seen on a nested host whose KVM opens and hangs in the
firmware: the twin took 0.3 s, KVM nothing in 10 s, a kernel nothing in 20 s.
"""

from __future__ import annotations

import os
import re
import struct
from contextlib import ExitStack
from pathlib import Path

import msgspec

from hutch.decoding import decode_json
from hutch.host.findings import Finding, State

__all__ = ["installed_kernel", "kvm_boots", "kvm_opens", "tiny_guest"]

KVM_GET_API_VERSION = 0xAE00
KVM_API = 12
EXIT_PORT = 0xF4
EXIT_VALUE = 0x2A
TINY_TIMEOUT_S = 10.0
_TINY_LEAST_S = 2.0
_TINY_MOST_S = 60.0
_TINY_TIMES = 6  # as long as its twin took: somebody else may use the processors just now
KERNEL_TIMEOUT_S = 20.0
_KERNEL_TIMES = 60
_KERNEL_MOST_S = 180.0
_LOAD_ADDRESS = 0x100000
# What a kernel prints last when it ran to the point of mounting a root that is not there.
_KERNEL_RAN = re.compile(rb"Unable to mount root fs|No working init found|Kernel panic")


class _Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The cached outcome of a probe, and what it holds for."""

    boot_id: str
    qemu: str
    kernel: str
    state: State
    detail: str


def kvm_opens(device: Path = Path("/dev/kvm")) -> str | None:
    """Return None where the device opens and speaks the expected version, else the reason."""
    import fcntl

    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        return f"{device}: {exc.strerror}"
    try:
        version = fcntl.ioctl(fd, KVM_GET_API_VERSION, 0)
    except OSError as exc:
        return f"{device}: {exc.strerror}"
    finally:
        os.close(fd)
    return None if version == KVM_API else f"{device}: API version {version}, not {KVM_API}"


def tiny_guest() -> bytes:
    """Return a 32-bit ELF with a PVH entry that counts, writes 42 to the exit port, and halts.

    QEMU starts such an image in protected mode without firmware from its `-kernel` option.
    """
    code = bytes(
        [
            *(0xB9, 0x00, 0x00, 0x10, 0x00),  # mov ecx, 0x100000
            *(0xE2, 0xFE),  # loop .
            *(0xB0, EXIT_VALUE),  # mov al, 42
            *(0xE6, EXIT_PORT),  # out 0xf4, al
            *(0xF4, 0xEB, 0xFD),  # hlt; jmp to it
        ]
    )
    header_size, segment_size = 52, 32
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", _LOAD_ADDRESS)  # XEN_ELFNOTE_PHYS32_ENTRY
    note_offset = header_size + 2 * segment_size
    code_offset = 0x1000
    elf = struct.pack(
        "<4sBBBB8xHHIIIIIHHHHHH",
        *(b"\x7fELF", 1, 1, 1, 0),
        *(2, 3, 1, _LOAD_ADDRESS, header_size, 0, 0),
        *(header_size, segment_size, 2, 0, 0, 0),
    )
    load = struct.pack(
        "<8I", 1, code_offset, _LOAD_ADDRESS, _LOAD_ADDRESS, len(code), 4096, 7, 4096
    )
    notes = struct.pack("<8I", 4, note_offset, 0, 0, len(note), len(note), 4, 4)
    return (elf + load + notes + note).ljust(code_offset, b"\0") + code


def installed_kernel(boot: Path = Path("/boot")) -> Path | None:
    """Return the newest readable kernel of the host, or None."""
    kernels = [p for p in boot.glob("vmlinu[xz]-*") if os.access(p, os.R_OK)]
    return max(kernels, key=lambda p: p.stat().st_mtime, default=None)


def _run_qemu(
    qemu: str, accelerator: str, arguments: list[str], timeout_s: float
) -> tuple[int, bytes]:
    """Run a guest; return QEMU's exit status and what came over its serial line.

    A guest that hangs is killed with its QEMU and has the status -1.
    """
    from hutch.errors import OperationTimeout
    from hutch.process.run import run_command

    command = [
        *(qemu, "-accel", accelerator, "-nodefaults", "-no-user-config", "-display", "none"),
        *("-m", "128", "-no-reboot", "-serial", "stdio", *arguments),
    ]
    try:
        done = run_command(command, timeout_s=timeout_s)
    except OperationTimeout:
        return -1, b""
    return done.returncode, done.stdout


def _tiny_guest_runs(qemu: str, accelerator: str, timeout_s: float) -> bool:
    """Tell whether the guest of our own left through the exit port: (42 << 1) | 1."""
    fd = os.memfd_create("hutch-probe", 0)
    try:
        os.write(fd, tiny_guest())
        status, _ = _run_qemu(
            qemu,
            accelerator,
            [
                *("-M", "q35", "-device", f"isa-debug-exit,iobase={EXIT_PORT:#x},iosize=1"),
                *("-kernel", f"/proc/{os.getpid()}/fd/{fd}"),
            ],
            timeout_s,
        )
    finally:
        os.close(fd)
    return status == EXIT_VALUE << 1 | 1


def _patience(qemu: str, accelerator: str) -> tuple[float, float]:
    """Return how long the tiny guest and a kernel may take, by how long the tiny guest's twin
    takes under emulation: a host may be emulated itself."""
    import time

    if accelerator == "tcg":
        return TINY_TIMEOUT_S, KERNEL_TIMEOUT_S
    began = time.monotonic()
    if not _tiny_guest_runs(qemu, "tcg", _TINY_MOST_S):
        return TINY_TIMEOUT_S, KERNEL_TIMEOUT_S  # this QEMU has no emulation to compare with
    took = time.monotonic() - began
    return (
        min(max(_TINY_TIMES * took, _TINY_LEAST_S), _TINY_MOST_S),
        min(max(_KERNEL_TIMES * took, KERNEL_TIMEOUT_S), _KERNEL_MOST_S),
    )


def _kernel_runs(qemu: str, accelerator: str, kernel: Path, timeout_s: float) -> bool:
    _, output = _run_qemu(
        qemu,
        accelerator,
        [
            *("-M", "q35", "-m", "256", "-kernel", str(kernel)),
            *("-append", "console=ttyS0 panic=-1 quiet root=/dev/none rootwait=0"),
        ],
        timeout_s,
    )
    return _KERNEL_RAN.search(output) is not None


def _try(qemu: str, accelerator: str, kernel: Path | None) -> tuple[State, str]:
    tiny_s, kernel_s = _patience(qemu, accelerator)
    if not _tiny_guest_runs(qemu, accelerator, tiny_s):
        return State.MISSING, f"{accelerator} opens but a guest of a few instructions does not run"
    if kernel is None:
        return State.DEGRADED, "a tiny guest runs; not proven with a kernel, none is in /boot"
    if not _kernel_runs(qemu, accelerator, kernel, kernel_s):
        return State.MISSING, f"a tiny guest runs, but {kernel.name} does not get to its end"
    return State.OK, f"boots {kernel.name}"


def kvm_boots(
    cache: Path | None = None,
    *,
    accelerator: str = "kvm",
    qemu: str | None = None,
    kernel: Path | None = None,
) -> Finding:
    """Return whether a guest boots under KVM; up to 25 s the first time where it hangs, more
    on a host that is slow itself.

    With `cache`, a directory, the verdict is kept until the machine, QEMU or the kernel
    under test changes, and one process finds it out while others wait for it. `qemu` and
    `kernel` are the host's where not given. Another `accelerator` is for testing the probe.
    """
    closed = kvm_opens() if accelerator == "kvm" else None
    if qemu is None:
        from hutch.host.qemu import find_qemu

        qemu = find_qemu()
    cure = "virtual machines use software emulation (slower) until the host offers nested KVM"
    if closed is not None and os.path.exists("/dev/kvm") and not os.access("/dev/kvm", os.R_OK):
        cure = "let this user open it: usermod -aG kvm NAME; until then software emulation is used"
    if closed is not None:
        return _finding(State.MISSING, closed, cure)
    if qemu is None:
        return _finding(
            State.DEGRADED,
            "/dev/kvm opens; not proven, since QEMU is not installed",
            "apt-get install --no-install-recommends qemu-system-x86",
        )
    kernel = kernel or installed_kernel()
    verdict = _cached_or_tried(cache, qemu, accelerator, kernel)
    return _finding(verdict.state, verdict.detail, None if verdict.state is State.OK else cure)


def _finding(state: State, detail: str, cure: str | None) -> Finding:
    return Finding(area="vm", name="kvm", state=state, detail=detail, cure=cure)


def _cached_or_tried(
    cache: Path | None, qemu: str, accelerator: str, kernel: Path | None
) -> _Verdict:
    from hutch.host.facts import replace_file
    from hutch.linux.boot import boot_id
    from hutch.linux.locks import lock_file

    key = (boot_id(), f"{accelerator} {_stamp(qemu)}", _stamp(str(kernel)) if kernel else "")
    if cache is None:
        return _verdict(key, qemu, accelerator, kernel)
    path = cache / f"{accelerator}.json"
    known = _cached(path, key)
    if known is not None:
        return known
    with ExitStack() as stack:
        try:
            cache.mkdir(mode=0o755, parents=True, exist_ok=True)
            stack.enter_context(lock_file(cache / f"{accelerator}.lock"))
        except OSError:
            pass  # a cache that cannot be written costs time, never an error
        known = _cached(path, key)
        if known is None:
            known = _verdict(key, qemu, accelerator, kernel)
            replace_file(path, msgspec.json.encode(known))
    return known


def _stamp(path: str) -> str:
    """Return what changes when a file is replaced, with its path."""
    try:
        status = os.stat(path)
    except OSError:
        return path
    return f"{path} {status.st_ino} {status.st_size} {status.st_mtime_ns}"


def _cached(path: Path, key: tuple[str, str, str]) -> _Verdict | None:
    try:
        known = decode_json(path.read_bytes(), _Verdict)
    except (OSError, msgspec.DecodeError):
        return None
    return known if (known.boot_id, known.qemu, known.kernel) == key else None


def _verdict(
    key: tuple[str, str, str], qemu: str, accelerator: str, kernel: Path | None
) -> _Verdict:
    state, detail = _try(qemu, accelerator, kernel)
    return _Verdict(boot_id=key[0], qemu=key[1], kernel=key[2], state=state, detail=detail)
