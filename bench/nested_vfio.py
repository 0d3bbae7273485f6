"""Give PCI devices to virtual machines, and see that the host has them back afterwards.

For a host with an IOMMU and two virtio devices to spare, as `scripts/nested.py` makes one:
a network card and a source of entropy.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hutch
from bench.nested_host import ROOT, add_kernel, make_host, row, say, timed
from hutch.errors import HutchError

PCI = Path("/sys/bus/pci/devices")
CARD, SOURCE = "0000:00:05.0", "0000:00:07.0"
DEADLINE_S = 600.0
VM: dict[str, Any] = {"isolation": "vm", "accel": "kvm", "network": "none"}


def expect(what: str, found: object, wanted: object) -> None:
    """End with what was found in the place of what was wanted."""
    if found != wanted:
        raise SystemExit(f"nested-vfio: {what}: {found!r}, not {wanted!r}")
    say(f"  {what}: {found}")


def driver(address: str) -> str:
    """Return the driver that has a device."""
    link = PCI / address / "driver"
    return os.path.basename(os.readlink(link)) if link.is_symlink() else ""


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"nested-vfio: {what}")
        time.sleep(0.1)


def refused(what: str, action: Callable[[], object], text: str) -> None:
    """Expect an error that says so."""
    try:
        action()
    except HutchError as exc:
        if text not in exc.message:
            raise SystemExit(f"nested-vfio: {what}: {exc.message}") from exc
        say(f"  {what} is refused: {exc.message}")
    else:
        raise SystemExit(f"nested-vfio: {what} was not refused")


def qemu_of(box: hutch.Instance) -> int:
    """Return the process of a machine's QEMU."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            argv = (directory / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "qemu-system" in argv[0] and any(box.id[:12] in word for word in argv):
            return int(directory.name)
    raise SystemExit("nested-vfio: no QEMU runs")


def look(engine: hutch.Engine) -> None:
    """Have a machine with the network card, and look at both sides of it."""
    say("a machine with a network card of the host")
    devices = [f"vfio={CARD}"]
    box: list[hutch.Instance] = []

    def start() -> None:
        box.append(engine.start("busybox", ["sleep", "100000"], devices=devices, **VM))

    row("start", [timed(start)])
    with box[0] as one:
        expect("the card's driver on the host", driver(CARD), "vfio-pci")
        script = "for n in /sys/class/net/*; do cat $n/address; done"
        found = one.exec(["sh", "-c", script]).text.split()
        expect("the guest has the card", "52:54:00:5a:5a:5a" in found, True)
        script = (
            "n=$(grep -l 5a:5a:5a /sys/class/net/*/address); n=$(basename $(dirname $n));"
            "ip link set $n up && udhcpc -n -q -t 20 -i $n -s /bin/true 2>&1 | tail -1"
        )
        answer = one.exec(["sh", "-c", script], privileged=True)
        lease = [word for word in answer.text.split() if word.startswith("10.0.2.")]
        expect("DHCP through it", lease[:1] or (answer.text, answer.stderr), ["10.0.2.15"])
        status = Path(f"/proc/{qemu_of(one)}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        expect("QEMU's user is not root", int(fields["Uid"].split()[0]) > 0, True)
        expect("its capability is CAP_IPC_LOCK", fields["CapEff"].strip(), f"{1 << 14:016x}")
        nodes = sorted(os.listdir(f"/proc/{qemu_of(one)}/root/dev/vfio"))
        group = os.path.basename(os.readlink(PCI / CARD / "iommu_group"))
        expect("its root has the nodes", nodes, sorted(["vfio", group]))
        refused(
            "a second machine with it",
            lambda: engine.create("busybox", ["true"], devices=devices, **VM),
            "held by",
        )
        refused("a fork", one.fork, "devices of the host")
        refused("a snapshot of it running", lambda: one.snapshot("s"), "devices of the host")
        one.stop(timeout=0)
        until(lambda: driver(CARD) == "virtio-pci", "the card did not come back after a stop")
        expect("after the stop the host has it", driver(CARD), "virtio-pci")
        one.remove()


def both(engine: hutch.Engine) -> None:
    """Give two devices; have QEMU killed, then the whole of hutch."""
    say("two devices, and kill -9")
    devices = [f"vfio={CARD}", f"vfio={SOURCE}"]
    with engine.start("busybox", ["sleep", "100000"], devices=devices, **VM) as box:
        found = box.exec(["sh", "-c", "ls /sys/bus/virtio/drivers/virtio_rng | grep -c virtio"])
        expect("entropy sources in the guest", found.text.strip(), "2")
        os.kill(qemu_of(box), signal.SIGKILL)
        until(lambda: engine.get(box.id).info().state != "running", "the machine did not end")
        until(lambda: driver(SOURCE) == "virtio-pci", "it did not come back after kill -9 of QEMU")
        expect("after kill -9 of QEMU", [driver(CARD), driver(SOURCE)], ["virtio-pci"] * 2)
        box.remove(force=True)


def killed_starter(engine: hutch.Engine) -> None:
    """Kill a starter when it has taken the device; `reconcile` gives it back."""
    command = ["run", "--vm", "--accel", "kvm", "--name", "cut", "--network", "none"]
    command += ["--device", f"vfio={CARD}", "busybox", "true"]
    starter = subprocess.Popen([sys.executable, "-m", "hutch", "--root", str(ROOT), *command])
    until(lambda: driver(CARD) == "vfio-pci", "the card was not taken")
    starter.kill()
    starter.wait()
    until(lambda: settled(engine), "the card did not come back")
    expect("after kill -9 of the starter", driver(CARD), "virtio-pci")
    engine.get("cut").remove(force=True)


def settled(engine: hutch.Engine) -> bool:
    """Put right what was cut short; tell whether the card is back."""
    engine.reconcile()
    return driver(CARD) == "virtio-pci"


def in_use() -> None:
    """The host's own use of a card is respected."""
    (name,) = os.listdir(next((PCI / CARD).glob("virtio*/net")))
    subprocess.run(["busybox", "ip", "link", "set", name, "up"], check=True)
    with hutch.Engine(ROOT) as engine:
        refused(
            "a card that is up",
            lambda: engine.create("busybox", ["true"], devices=[f"vfio={CARD}"], **VM),
            "which is up",
        )
    subprocess.run(["busybox", "ip", "link", "set", name, "down"], check=True)


def main() -> None:
    """Do all of it; the exit code tells whether it worked."""
    make_host("kvm_amd", "virtio_net", "virtio_rng")
    until(lambda: driver(CARD) == driver(SOURCE) == "virtio-pci", "the devices have no driver")
    with hutch.Engine(ROOT) as engine:
        engine.images.bootstrap("busybox")
        add_kernel(engine)
        look(engine)
        both(engine)
        killed_starter(engine)
    in_use()
    say("nested VFIO: all of it worked")


if __name__ == "__main__":
    sys.exit(main())
