"""Run virtual machines on KVM, check what they do, and put their times beside bare QEMU's.

For a host whose KVM works: `python -m bench.nested` runs where `scripts/nested_kvm.py` has
made one, a machine of hutch's own with AMD's extensions emulated. All there is emulated, so
the times mean nothing but their ratios do.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import hutch
from bench.nested_host import ROOT, add_kernel, make_host, row, say, timed
from bench.vm_bare import Guest, clone_once, cold_boot, greetings, template

ROUNDS = 3
EXECS = 5
MEMORY_MIB = 256
ENDS = "trap 'exit 7' TERM; while :; do sleep 0.2; done"
KVM = {"isolation": "vm", "accel": "kvm", "network": "none", "memory": f"{MEMORY_MIB}M"}


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


def use(engine: hutch.Engine, guest: Guest) -> None:
    """Make a template, then look into a running machine: is it KVM's, and does all that touches
    its processor and memory work there too."""
    row("run that makes a template", [timed(lambda: run(engine))])
    say("a running machine")
    with engine.start("busybox", ["sh", "-c", ENDS], **KVM) as box:  # type: ignore[arg-type]
        argv = Path(f"/proc/{_qemu()}/cmdline").read_text().split("\0")
        expect("QEMU's accelerator", argv[argv.index("-accel") + 1], "kvm")
        clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
        say(f"  the guest's clock: {said(box, f'cat {clock}')}")
        box.files.write("/tmp/note", b"through KVM\n")
        expect("a file", said(box, "cat /tmp/note"), "through KVM")
        expect("an exit code", box.exec(["sh", "-c", "exit 42"]).exit_code, 42)
        row("exec", [timed(lambda: box.exec(["true"])) for _ in range(EXECS)], greetings(guest))
        keep(engine, box)
        change(box)
        row("stop", [timed(lambda: box.stop(timeout=60))])
        expect("it was asked to end, and did", box.wait(), 7)


def change(box: hutch.Instance) -> None:
    """Stop and continue its processors, give it more of everything, and take it back."""
    box.pause()
    box.unpause()
    box.update(cpus=2, memory="384M")
    expect("processors after an update", said(box, "nproc"), "2")
    total = int(said(box, "awk '/MemTotal/ {print $2}' /proc/meminfo"))
    expect("more memory than it began with", total > MEMORY_MIB << 10, True)
    box.update(cpus=1, memory=f"{MEMORY_MIB}M")
    expect("processors after another", said(box, "nproc"), "1")


def keep(engine: hutch.Engine, box: hutch.Instance) -> None:
    """Fork it, keep it in a snapshot, go back to that, suspend and resume it."""
    said(box, "echo in memory >/dev/shm/note")
    twins: list[hutch.Instance] = []

    def fork() -> None:
        twin = box.fork(name="twin")
        assert isinstance(twin, hutch.Instance)
        twins.append(twin)
        twin.exec(["true"])

    row("fork, to the twin's answer", [timed(fork)])
    with twins[0] as twin:
        expect("the twin's memory", said(twin, "cat /dev/shm/note"), "in memory")
        expect("the twin's name", said(twin, "hostname") == said(box, "hostname"), False)
    row("snapshot of it running", [timed(lambda: box.snapshot("kept"))])
    with engine.snapshots.restore(f"{box.name}/kept", name="restored") as restored:
        expect("a restored one's memory", said(restored, "cat /dev/shm/note"), "in memory")
    row("suspend", [timed(box.suspend)])
    row("resume", [timed(box.resume)])
    expect("its memory after that", said(box, "cat /dev/shm/note"), "in memory")
    expect("its clock is right", abs(int(said(box, "date +%s")) - time.time()) < 60, True)


def said(box: hutch.Instance, script: str) -> str:
    """Return what a script in the machine says."""
    return box.exec(["sh", "-c", script], check=True).text.strip()


def expect(what: str, found: object, wanted: object) -> None:
    """End with what was found in the place of what was wanted."""
    if found != wanted:
        raise SystemExit(f"nested: {what}: {found!r}, not {wanted!r}")
    say(f"  {what}: {found}")


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
        use(engine, guest)
        compare(engine, guest)
    say("nested KVM: all of it worked")


if __name__ == "__main__":
    sys.exit(main())
