"""Run virtual machines on KVM, check what they do, and put their times beside bare QEMU's.

For a host whose KVM works: `python -m bench.nested` runs where `scripts/nested_kvm.py` has
made one, a machine of hutch's own with AMD's extensions emulated. All there is emulated, so
the times mean nothing but their ratios do.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import hutch
from bench.nested_host import ROOT, add_kernel, make_host, row, say, timed
from bench.vm_bare import Guest, clone_once, cold_boot, template

ROUNDS = 3
EXECS = 5
MEMORY_MIB = 512
KVM = {"isolation": "vm", "accel": "kvm", "network": "none"}


def run(engine: hutch.Engine, **options: object) -> None:
    done = engine.run("busybox", ["uname", "-r"], **{**KVM, **options})  # type: ignore[arg-type]
    if done.exit_code or not done.text.strip().endswith("-cloud-amd64"):
        raise SystemExit(f"nested: the guest said {done.text!r} and ended with {done.exit_code}")


def prepare(engine: hutch.Engine) -> Guest:
    """Return what bare QEMU starts: the same kernel and initramfs."""
    engine.images.bootstrap("busybox")
    kernel = add_kernel(engine)
    say("the first machine: KVM is proven, the image's disk made")
    row("run", [timed(lambda: run(engine, template=False))])
    (initramfs,) = kernel.glob("initramfs-*.cpio")
    return Guest(
        kernel=kernel / "vmlinux", initrd=initramfs, memory_mib=MEMORY_MIB, accelerator="kvm"
    )


def compare(engine: hutch.Engine, guest: Guest) -> None:
    say("cold: from the call to the exit of a short program; bare: to the agent's answer")
    ours = [timed(lambda: run(engine, template=False)) for _ in range(ROUNDS)]
    row("run without a template", ours, [cold_boot(guest) for _ in range(ROUNDS)])
    say("from a template")
    ours = [timed(lambda: run(engine)) for _ in range(ROUNDS)]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm, template(guest, Path(shm)) as made:
        row("run that resumes it", ours, [clone_once(made) for _ in range(ROUNDS)])


def use(engine: hutch.Engine) -> None:
    """Make a template, then look into a running machine: is it KVM's, do exec, files and
    exit codes work."""
    row("run that makes a template", [timed(lambda: run(engine))])
    say("a running machine")
    with engine.start("busybox", ["sleep", "1000"], **KVM) as box:  # type: ignore[arg-type]
        argv = Path(f"/proc/{_qemu()}/cmdline").read_text().split("\0")
        if "kvm" not in argv[argv.index("-accel") + 1]:
            raise SystemExit(f"nested: QEMU was started without KVM: {argv}")
        box.files.write("/tmp/note", b"through KVM\n")
        if box.exec(["cat", "/tmp/note"]).text != "through KVM\n":
            raise SystemExit("nested: a file did not come back")
        if box.exec(["sh", "-c", "exit 42"]).exit_code != 42:
            raise SystemExit("nested: an exit code did not come back")
        row("exec", [timed(lambda: box.exec(["true"])) for _ in range(EXECS)])


def _qemu() -> str:
    for directory in Path("/proc").glob("[0-9]*"):
        if (directory / "comm").read_text().startswith("qemu-system"):
            return directory.name
    raise SystemExit("nested: no QEMU runs")


def main() -> None:
    """Do all of it; the exit code tells whether it worked."""
    make_host("kvm_amd")
    with hutch.Engine(ROOT) as engine:
        guest = prepare(engine)
        use(engine)
        compare(engine, guest)
    say("nested KVM: all of it worked")


if __name__ == "__main__":
    sys.exit(main())
