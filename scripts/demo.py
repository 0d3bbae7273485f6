"""Show hutch at work: make real images from this host's packages, run them, leave nothing.

Runs the command line as a person would, on a root of its own that is removed at the end.
Needs root and the host's package mirror; busybox alone is used where the mirror is away.
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

PYTHON = """
import hutch
with hutch.Engine() as engine:
    done = engine.run("IMAGE", ["sh", "-c", "cat /etc/os-release | head -1"])
    print("library:", done.exit_code, done.text.strip())
    with engine.start("IMAGE", ["sleep", "1000"], memory="64M", network="none") as box:
        box.files.write("/tmp/note", b"written from Python\\n")
        print("exec:   ", box.exec(["cat", "/tmp/note"]).text.strip())
"""


def say(text: str) -> None:
    print(f"\n\033[1m# {text}\033[0m" if sys.stdout.isatty() else f"\n# {text}", flush=True)


def hutch(*arguments: str, check: bool = True) -> int:
    """Show a command and run it."""
    print("$ hutch", shlex.join(arguments), flush=True)
    began = time.perf_counter()
    status = subprocess.run([str(HUTCH), *arguments]).returncode
    ended = f"exit code {status}, " if status else ""
    print(f"  ({ended}{(time.perf_counter() - began) * 1000:.0f} ms)", flush=True)
    if check and status != 0:
        raise SystemExit(f"demo: hutch {arguments[0]} ended with {status}")
    return status


def show() -> None:
    say("a real image from static busybox, and a container")
    hutch("image", "bootstrap", "busybox")
    hutch("run", "--rm", "busybox", "uname", "-a")
    image = "busybox"
    say("Debian from the packages of this host's mirror (15 seconds or so)")
    if hutch("image", "bootstrap", "debian:bookworm", check=False) == 0:
        image = "debian:bookworm"
        hutch("run", "--rm", image, "sh", "-c", ". /etc/os-release; echo $PRETTY_NAME; id")
    hutch("images")
    say("limits, a network with names, logs, exec, statistics")
    hutch("network", "create", "demo")
    hutch(
        *("run", "-d", "--name", "web", "--network", "demo", "--memory", "64M", "--pids-limit"),
        *("50", "busybox", "sh", "-c", "echo hello > index.html; httpd -f -v -p 80"),
    )
    hutch("run", "--rm", "--network", "demo", "busybox", "wget", "-q", "-O", "-", "http://web/")
    hutch("exec", "web", "ps")
    hutch("stats", "--no-stream", "web")
    hutch("logs", "web")
    hutch("diff", "web")
    hutch("rm", "-f", "web")
    hutch("network", "rm", "demo")
    say("exit codes travel")
    hutch("run", "--rm", "busybox", "sh", "-c", "exit 42", check=False)
    say("the same from Python")
    print(PYTHON.strip().replace("IMAGE", image), flush=True)
    print("---", flush=True)
    subprocess.run([sys.executable, "-c", PYTHON.replace("IMAGE", image)], check=True)


def take_networks_off_the_host(root: Path) -> None:
    """Remove the bridges and rules, which otherwise stay for the next container."""
    from hutch.engine.context import Context

    context = Context(root)
    context.networks.teardown()
    context.close()


def main() -> None:
    if os.geteuid() != 0:
        raise SystemExit("demo: run as root: it shows bridges and published ports too")
    root = tempfile.mkdtemp(prefix="hutch-demo-")
    os.environ["HUTCH_ROOT"] = root
    try:
        show()
    finally:
        left = subprocess.run(
            [str(HUTCH), "ps", "-aq"], capture_output=True, text=True
        ).stdout.split()
        if left:
            subprocess.run([str(HUTCH), "rm", "-f", *left], stdout=subprocess.DEVNULL)
        take_networks_off_the_host(Path(root))
        shutil.rmtree(root, ignore_errors=True)
    say("done; nothing is left")


if __name__ == "__main__":
    main()
