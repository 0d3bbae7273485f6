"""Show hutch at work: one image, run as a container and as a virtual machine, with the times.

Runs the command line as a person would, on a root of its own that is removed at the end.
Images and the guests' kernel come from the host's package mirror; busybox alone is used
where Debian cannot be had. Where this host lets this user make no container, the machine is
shown alone; what needs root is left out for others.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HUTCH = Path(sys.executable).parent / "hutch"
TELL = (
    "[ ! -r /etc/os-release ] || . /etc/os-release;"
    "echo ${PRETTY_NAME:-busybox} on Linux $(uname -r)"
)

PYTHON = """
import hutch
with hutch.Engine() as engine:
    for isolation in KINDS:
        with engine.start("IMAGE", ["sleep", "1000"], isolation=isolation) as box:
            box.files.write("/tmp/note", b"written from Python\\n")
            print(f"{isolation}:", box.exec(["sh", "-c", "cat /tmp/note; uname -r"]).text.split())
"""

times: list[tuple[str, float]] = []


def say(text: str) -> None:
    print(f"\n\033[1m# {text}\033[0m" if sys.stdout.isatty() else f"\n# {text}", flush=True)


def hutch(*arguments: str, check: bool = True, name: str = "") -> int:
    """Show a command and run it; with a name its time is in the table at the end."""
    print("$ hutch", shlex.join(arguments), flush=True)
    began = time.perf_counter()
    status = subprocess.run([str(HUTCH), *arguments]).returncode
    took = time.perf_counter() - began
    ended = f"exit code {status}, " if status else ""
    print(f"  ({ended}{took * 1000:.0f} ms)", flush=True)
    if check and status != 0:
        raise SystemExit(f"demo: hutch {arguments[0]} ended with {status}")
    if name:
        times.append((name, took))
    return status


def what_this_host_allows() -> list[str]:
    """Return the kinds of instances that can be shown here, and say why not all."""
    from hutch.host.isolation import load_isolation
    from hutch.host.qemu import find_qemu

    kinds = []
    found = load_isolation(Path(os.environ["HUTCH_ROOT"]))
    if found.containers:
        kinds.append("container")
    else:
        print(f"no containers: this host refuses them ({found.reason})")
    if find_qemu() is not None:
        kinds.append("vm")
    else:
        print("no virtual machines: QEMU is not installed")
    if not kinds:
        raise SystemExit("demo: neither containers nor virtual machines work here: hutch doctor")
    return kinds


def make_images() -> str:
    say("images from static busybox, and from this host's mirror (15 seconds or so)")
    hutch("image", "bootstrap", "-q", "busybox")
    if hutch("image", "bootstrap", "-q", "debian:bookworm", check=False) == 0:
        return "debian:bookworm"
    return "busybox"


def show_container(image: str) -> None:
    say("the image as a container")
    hutch("run", "--rm", "--network", "none", image, "sh", "-c", TELL, name="container")


def show_machine(image: str) -> None:
    say("the same image as a virtual machine: its first start fetches a kernel, makes a disk")
    vm = ("run", "--rm", "--vm")
    hutch(*vm, "--no-template", image, "sh", "-c", TELL, name="machine, the very first")
    hutch(*vm, "--no-template", image, "sh", "-c", TELL, name="machine, booted")
    say("from a template: a booted guest that waits, kept in memory; the first start makes it")
    hutch(*vm, image, "sh", "-c", TELL, name="machine, with its template made")
    hutch(*vm, image, "sh", "-c", TELL, name="machine, from the template")
    say("a machine that goes on: exec, statistics")
    hutch("run", "-d", "--name", "box", "--vm", image, "sleep", "1000")
    hutch("exec", "box", "uname", "-a", name="exec in a machine")
    hutch("stats", "--no-stream", "box")
    hutch("rm", "-f", "box")


def show_networks() -> None:
    say("a container and a machine on one network talk by name")
    hutch("network", "create", "--subnet", "10.213.77.0/24", "demo")
    serve = "echo hello > index.html; httpd -f -p 80"
    hutch("run", "-d", "--name", "web", "--network", "demo", "busybox", "sh", "-c", serve)
    fetch = ("busybox", "wget", "-q", "-O", "-", "http://web/")
    hutch("run", "--rm", "--vm", "--network", "demo", *fetch)
    hutch("rm", "-f", "web")
    hutch("network", "rm", "demo")


def show_python(image: str, kinds: list[str]) -> None:
    say("the same from Python")
    program = PYTHON.replace("IMAGE", image).replace("KINDS", repr(kinds))
    print(program.strip(), "\n---", flush=True)
    subprocess.run([sys.executable, "-c", program], check=True)


def show() -> None:
    kinds = what_this_host_allows()
    image = make_images()
    if "container" in kinds:
        show_container(image)
    if "vm" in kinds:
        show_machine(image)
    if len(kinds) == 2 and os.geteuid() == 0:
        show_networks()
    show_python(image, kinds)
    say("times, from the command to its end")
    for name, took in times:
        print(f"  {name:34} {took * 1000:8.0f} ms")


def leave_nothing(root: Path) -> None:
    """Remove what runs, templates, and the bridges that otherwise stay for the next one."""
    from hutch.engine.context import Context

    done = subprocess.run([str(HUTCH), "ps", "-aq"], capture_output=True, text=True)
    left = done.stdout.split()
    if left:
        subprocess.run([str(HUTCH), "rm", "-f", *left], stdout=subprocess.DEVNULL)
    context = Context(root)
    context.machines.prune_templates()
    if os.geteuid() == 0:
        context.networks.teardown()
    context.close()
    shutil.rmtree(root, ignore_errors=True)


def main() -> None:
    root = tempfile.mkdtemp(prefix="hutch-demo-")
    os.environ["HUTCH_ROOT"] = root
    try:
        show()
    finally:
        leave_nothing(Path(root))
    say("done; nothing is left")


if __name__ == "__main__":
    main()
