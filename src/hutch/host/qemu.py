"""What QEMU on this host can do, and whether machines run on hardware or under emulation.

QEMU is asked once; the answers are kept in a cache directory until the program, or for the
accelerator the running kernel, changes. Processes that need an answer at the same time wait
for the one that is finding it out.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from hutch.decoding import decode_json
from hutch.errors import InvalidArgument, Unsupported
from hutch.host.facts import replace_file
from hutch.host.findings import State
from hutch.host.programs import find_program
from hutch.linux.boot import boot_id
from hutch.plan.machine.version import QemuVersion, parse_version

__all__ = [
    "AcceleratorWish",
    "Acceleration",
    "QemuFacts",
    "choose_accelerator",
    "find_qemu",
    "load_qemu",
    "load_tsc_khz",
]

AcceleratorWish = Literal["auto", "kvm", "tcg"]
FORMAT = 1
T = TypeVar("T")
_ASK_S = 30.0
_NAME = re.compile(r'^name "([^"]+)"', re.MULTILINE)


class QemuFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A QEMU: where it is, which version, what it was built with.

    `stamp` tells one build from another without running it.
    """

    format: int = FORMAT
    path: str
    stamp: str
    version: QemuVersion
    accelerators: tuple[str, ...]
    machines: tuple[str, ...]
    devices: tuple[str, ...]

    def require_machine(self, name: str) -> None:
        """Raise `Unsupported` where this QEMU has no machine type of that name."""
        if name.split(",")[0] not in self.machines:
            raise Unsupported(
                f"machine type {name}: not known to QEMU {self.version}",
                hint=f"one of: {', '.join(m for m in self.machines if 'q35' in m)}, microvm",
            )

    def require_device(self, name: str) -> None:
        """Raise `Unsupported` where this QEMU was built without the device."""
        if name not in self.devices:
            raise Unsupported(
                f"device {name}: not in QEMU {self.version}",
                hint="some devices are in packages of their own, such as qemu-system-gui",
            )


class Acceleration(msgspec.Struct, frozen=True, kw_only=True):
    """What runs a machine's processors, and why, as text for people."""

    accelerator: Literal["kvm", "tcg"]
    reason: str


def find_qemu() -> str | None:
    """Return the path of the QEMU to be used: HUTCH_QEMU, else the one on PATH.

    One that is not the system's is shown to its sandbox with the tree it was installed in,
    so its program must be in the `bin` directory of such a tree.
    """
    named = os.environ.get("HUTCH_QEMU")
    if not named:
        return find_program(f"qemu-system-{os.uname().machine}")
    path = os.path.realpath(named)
    if not (os.path.isabs(named) and os.path.isfile(path) and os.access(path, os.X_OK)):
        raise InvalidArgument(f"not the path of a program: {named}", field="HUTCH_QEMU")
    tree, directory = os.path.split(os.path.dirname(path))
    if directory != "bin":
        raise InvalidArgument(
            f"{named} is not in a directory named bin",
            field="HUTCH_QEMU",
            hint=f"install it as {tree}/…/bin/{os.path.basename(path)}, its data beside that",
        )
    return path


def load_qemu(cache: Path | None, *, program: str | None = None) -> QemuFacts:
    """Return the facts of the host's QEMU (see `find_qemu`), or of `program` (a path).

    `cache` is a directory such as `<root>/cache`. The first time QEMU is run four times
    (0.2 s), later it is not run at all. Raise `Unsupported` where there is none.
    """
    path = program or find_qemu()
    if path is None:
        raise Unsupported(
            f"qemu-system-{os.uname().machine} is not installed",
            hint="apt-get install --no-install-recommends qemu-system-x86",
        )
    stamp = stamp_of(path)
    file = cache / "qemu.json" if cache else None
    known = _read(file, QemuFacts)
    if known is not None and (known.format, known.path, known.stamp) == (FORMAT, path, stamp):
        return known
    facts = _ask(path, stamp)
    _write(file, facts)
    return facts


def stamp_of(path: str) -> str:
    """Return what changes when a program is replaced."""
    try:
        status = os.stat(path)
    except OSError as exc:
        raise Unsupported(f"{path}: {(exc.strerror or '').lower()}") from exc
    return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"


def _ask(path: str, stamp: str) -> QemuFacts:
    accelerators = _output(path, "-accel", "help").splitlines()[1:]
    machines = _output(path, "-machine", "help").splitlines()[1:]
    return QemuFacts(
        path=path,
        stamp=stamp,
        version=parse_version(_output(path, "--version")),
        accelerators=tuple(line.strip() for line in accelerators if line.strip()),
        machines=tuple(line.split()[0] for line in machines if line.strip()),
        devices=tuple(sorted(set(_NAME.findall(_output(path, "-device", "help"))))),
    )


def _output(path: str, *arguments: str) -> str:
    from hutch.process.run import run_command

    try:
        done = run_command([path, *arguments], timeout_s=_ASK_S)
    except OSError as exc:
        raise Unsupported(f"{path}: {(exc.strerror or '').lower()}") from exc
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise Unsupported(f"{path} {arguments[0]}: {' '.join(words) or 'failed'}"[:500])
    return done.stdout.decode(errors="replace")


def choose_accelerator(
    cache: Path | None,
    qemu: QemuFacts,
    wanted: AcceleratorWish = "auto",
    *,
    kernel: Path | None = None,
) -> Acceleration:
    """Decide between KVM and emulation. `kernel` is what proves KVM, best the guests' own.

    `auto` takes KVM only where a kernel was seen to boot under it, which is tried once per
    start of the host, QEMU and kernel: one to three seconds where KVM works or a guest of a
    few instructions hangs, up to 25 where only a kernel hangs. Raise `Unsupported` where
    what is wanted cannot be; KVM that was asked for by name need not be proven.
    """
    if wanted == "tcg":
        return _emulation(qemu, "asked for")
    if "kvm" not in qemu.accelerators:
        if wanted == "kvm":
            raise Unsupported(f"KVM: {qemu.path} is built without it", hint="use --accel tcg")
        return _emulation(qemu, f"{qemu.path} is built without KVM")
    from hutch.host.kvm import kvm_boots

    finding = kvm_boots(cache, qemu=qemu.path, kernel=kernel)
    if finding.state is State.OK or (wanted == "kvm" and finding.state is State.DEGRADED):
        return Acceleration(accelerator="kvm", reason=finding.detail)
    if wanted == "kvm":
        raise Unsupported(f"KVM: {finding.detail}", hint="use --accel auto or --accel tcg")
    return _emulation(qemu, finding.detail)


def _emulation(qemu: QemuFacts, reason: str) -> Acceleration:
    if "tcg" not in qemu.accelerators:
        raise Unsupported(
            f"no KVM ({reason}), and {qemu.path} is built without emulation",
            hint="install a QEMU with TCG, such as Debian's qemu-system-x86",
        )
    return Acceleration(accelerator="tcg", reason=reason)


class _Tsc(msgspec.Struct, frozen=True, kw_only=True):
    boot_id: str
    khz: int


def load_tsc_khz(cache: Path | None) -> int:
    """Return the speed of the host's time stamp counter in kHz, 0 where it is not known.

    An emulated guest's counter is the host's. Measured once per start of the host (0.1 s).
    """
    from hutch.linux.tsc import measure_tsc_khz

    file = cache / "tsc.json" if cache else None
    known = _read(file, _Tsc)
    if known is not None and known.boot_id == boot_id():
        return known.khz
    measured = _Tsc(boot_id=boot_id(), khz=measure_tsc_khz() or 0)
    _write(file, measured)
    return measured.khz


def _read(file: Path | None, kind: type[T]) -> T | None:
    if file is None:
        return None
    try:
        return decode_json(file.read_bytes(), kind)
    except (OSError, msgspec.DecodeError):
        return None


def _write(file: Path | None, value: msgspec.Struct) -> None:
    if file is not None:
        replace_file(file, msgspec.json.encode(value))
