"""Start a disk as clouds have them, with cloud-init, and see that it becomes what it was told.

All of it by the command line, as its users do. The disk is made of Debian's packages, once, and
kept in build/ (a minute); the rest takes some minutes, as all of systemd and cloud-init is
emulated where KVM does not work. Needs root, ssh and the host's package mirror.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.vm.clouddisk import cloud_disk

NAME, NETWORK = "cloud-image", "cloud-image-net"
BOOT_S = 1800.0
USER_DATA = """#cloud-config
users:
  - name: me
    shell: /bin/bash
    ssh_authorized_keys: ["KEY"]
write_files:
  - path: /etc/told
    content: by user data
runcmd:
  - [sh, -c, "echo once >>/var/lib/ran"]
final_message: "cloud-init has ended at boot of $datasource"
"""
ENDED = "cloud-init has ended"


class Failed(Exception):
    """What did not come as it should."""


class Host:
    """The command line on a root of its own, and what it is given."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self._argv = [sys.executable, "-m", "hutch", "--root", str(work / "root")]

    def hutch(self, *arguments: str | Path) -> str:
        """Run a command to its end; return what it wrote."""
        done = subprocess.run(
            [*self._argv, *map(str, arguments)], capture_output=True, text=True, timeout=BOOT_S
        )
        if done.returncode:
            raise Failed(f"hutch {arguments[0]} ended with {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def until(self, condition: Callable[[], bool], what: str) -> float:
        """Wait for a condition; return the seconds. A machine that has ended is not waited for."""
        began = time.monotonic()
        while not condition():
            state = self.hutch("inspect", "-f", "{{.State.Status}}", NAME)
            if time.monotonic() - began > BOOT_S or state != "running":
                say(self.hutch("logs", "--tail", "60", NAME))
                raise Failed(f"{what} did not come; the machine is {state}")
            time.sleep(1)
        return time.monotonic() - began

    def ended(self) -> int:
        """Return how often cloud-init has said on the console that it has ended."""
        return self.hutch("logs", NAME).count(ENDED)

    def ssh(self, script: str) -> str:
        """Run a script in the machine, by its published port, as the user cloud-init made."""
        where, port = self.hutch("port", NAME, "22").splitlines()[0].rsplit(":", 1)
        options = ("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null")
        done = subprocess.run(
            ["ssh", "-q", "-i", self.work / "key", *options, "-p", port, f"me@{where}", script],
            capture_output=True,
            text=True,
            timeout=BOOT_S,
        )
        if done.returncode:
            raise Failed(f"ssh ended with {done.returncode}: {done.stderr}")
        return done.stdout.strip()


def say(text: str) -> None:
    """Print a line, at once."""
    print(text, flush=True)


def expect(what: str, found: object, wanted: object) -> None:
    """Say what was found, or fail with what was found in the place of what was wanted."""
    if found != wanted:
        raise Failed(f"{what}: {found!r}, not {wanted!r}")
    say(f"  {what}: {found}")


def prepare(host: Host, disk: Path) -> None:
    """Make what a user has: a qcow2, a key, a file of user data, an image, a network."""
    host.hutch("vm", "disk", "convert", "-q", disk, host.work / "cloud.qcow2")
    key = host.work / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    public = Path(f"{key}.pub").read_text().strip()
    (host.work / "user.yaml").write_text(USER_DATA.replace("KEY", public))
    host.hutch("image", "bootstrap", "busybox")
    host.hutch("network", "create", NETWORK)


def first_boot(host: Host) -> None:
    """It has user, files, name, addresses and the size of its disk, and is found by name."""
    host.hutch(
        *("vm", "run", "-d", "--name", NAME, "--hostname", NAME, "--memory", "512M"),
        *("--disk", "2G", "--network", NETWORK, "-p", "127.0.0.1::22"),
        *("--cloud-init", host.work / "user.yaml", host.work / "cloud.qcow2"),
    )
    say(f"  cloud-init has ended after {host.until(host.ended, 'the end of cloud-init'):.0f} s")
    told = host.ssh("whoami; hostname; cat /etc/told; echo; cat /var/lib/ran").split("\n")
    expect("user, name, file, command", told, ["me", NAME, "by user data", "once"])
    address = host.hutch(
        "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", NAME
    )
    shown = host.ssh("ip -4 -o addr show scope global | awk '{print $4}'").split("/")[0]
    expect("its address is the network's", shown, address)
    size = int(host.ssh("df -B1 --output=size / | tail -1"))
    expect("its file system has grown with the disk", size > 1800 << 20, True)
    banner = host.hutch(
        *("run", "--rm", "--network", NETWORK, "busybox"),
        *("sh", "-c", f"echo | nc -w 60 {NAME} 22 | head -c 4"),
    )
    expect("a container finds it by name", banner, "SSH-")
    host.ssh("echo kept >mine; sync")


def second_boot(host: Host) -> None:
    """The power button ends it; started again it is the same machine, told nothing twice."""
    began = time.monotonic()
    host.hutch("stop", "-t", "600", NAME)
    code = host.hutch("inspect", "-f", "{{.State.ExitCode}}", NAME)
    expect("by the power button it ends with", code, "0")
    say(f"  that took {time.monotonic() - began:.0f} s")
    before = host.ended()
    host.hutch("start", NAME)
    took = host.until(lambda: host.ended() > before, "the second boot")
    say(f"  up again after {took:.0f} s")
    kept = host.ssh("cat mine; cat /var/lib/ran; hostname").split("\n")
    expect("file, command, name", kept, ["kept", "once", NAME])


def check(host: Host, disk: Path) -> None:
    """Do all of it, and leave nothing."""
    try:
        prepare(host, disk)
        say("its first boot")
        first_boot(host)
        say("its second boot")
        second_boot(host)
    finally:
        if host.hutch("ps", "-aq"):
            host.hutch("rm", "-f", NAME)
        if NETWORK in host.hutch("network", "ls", "--format", "{{.Name}}").split():
            host.hutch("network", "rm", NETWORK)


def main() -> int:
    """Make the disk, start it twice; return 1 with what did not come."""
    if os.geteuid() != 0:
        print("cloud-image: run as root", file=sys.stderr)
        return 2
    say("the disk (a minute where it is to be made)")
    disk = cloud_disk()
    with tempfile.TemporaryDirectory(prefix="hutch-cloud-") as work:
        try:
            check(Host(Path(work)), disk)
        except Failed as exc:
            print(f"cloud-image: {exc}", file=sys.stderr)
            return 1
    say("cloud image: all of it worked")
    return 0


if __name__ == "__main__":
    sys.exit(main())
