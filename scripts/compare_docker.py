"""Compare what Debian's dockerd and hutch answer to one scenario: `make compare-docker`; with
`ARGS=--newer` the dockerd of Debian's sid.

Both get the same image and the same requests, over HTTP and by the docker command, in network
and mount namespaces of their own. Each difference is either named in `scripts.docker_differences`
with its reason, which docs/reference/docker-api.md tells, or it fails; so does a name that
nothing goes by any more.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import hutch
from bench.docker_api import served
from bench.peers import dockerd, install_peers
from hutch.errors import HutchError
from scripts.docker_answers import Side, compare, is_named, unnamed
from scripts.docker_differences import NAMED
from scripts.docker_newer_differences import NEWER
from scripts.docker_scenario import image_archive, scenario
from scripts.newer_dockerd import newer_dockerd

_INSIDE = "HUTCH_COMPARE_INSIDE"
_PROGRAM = "/usr/bin/docker"
# The newest versions of the API that they speak.
_API, _NEWER_API = "v1.41", "v1.51"


def main() -> int:
    if os.geteuid() != 0:
        print("this needs root: dockerd does", file=sys.stderr)
        return 1
    if os.environ.get(_INSIDE) != "1":
        if "docker.io" in install_peers():
            print("Debian's docker.io could not be installed: nothing to compare with")
            return 1
        if "--newer" in sys.argv[1:] and newer_dockerd() is None:
            return 1
        os.environ[_INSIDE] = "1"
        command = ["unshare", "--net", "--mount", "--propagation", "private", sys.executable]
        os.execvp("unshare", [*command, "-m", "scripts.compare_docker", *sys.argv[1:]])
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    newer = "--newer" in sys.argv[1:]
    # Of what differs from 20.10, newer Docker has much as hutch has it: those names may be idle.
    own = NEWER if newer else NAMED
    names = (*NAMED, *NEWER) if newer else NAMED
    with _workspace() as directory:
        sides = _played(directory, newer_dockerd() if newer else None)
    found = compare(sides["docker"], sides["hutch"])
    wrong = unnamed(found, names)
    idle = [name for name in own if not any(is_named(one, name) for one in found)]
    for one in wrong:
        print(f"DIFFERS {one}")
    for name in idle:
        print(f"NO MORE {name.step} {name.path}: {name.why}")
    print(
        f"{len(sides['hutch'])} steps; {len(found)} differences, {len(wrong)} of them unnamed; "
        f"{len(names)} names, {len(idle)} of them for nothing"
    )
    return 1 if wrong or idle else 0


def _played(directory: Path, tree: Path | None) -> dict[str, dict[str, object]]:
    """Play the scenario to each, one after the other; return the answers."""
    archive = image_archive(directory)
    played: dict[str, dict[str, object]] = {}
    ways: dict[str, Callable[[ExitStack], Path]] = {
        "docker": lambda stack: stack.enter_context(dockerd(directory / "docker", tree)).socket,
        "hutch": lambda stack: _hutch(stack, directory / "hutch"),
    }
    for name, start in ways.items():
        with ExitStack() as stack:
            side = Side(start(stack), _PROGRAM, _NEWER_API if tree else _API)
            scenario(side, archive)
            played[name] = side.steps
    return played


def _hutch(stack: ExitStack, directory: Path) -> Path:
    directory.mkdir()
    engine = stack.enter_context(hutch.Engine(directory / "root"))
    stack.callback(_empty, engine)
    return stack.enter_context(served(engine, directory)).socket


def _empty(engine: hutch.Engine) -> None:
    for info in engine.list(all=True):
        with suppress(HutchError):
            engine.get(info.id).remove(force=True, volumes=True)


@contextmanager
def _workspace() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="hutch-compare-"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        with open("/proc/self/mountinfo") as table:
            points = [line.split()[4] for line in table if str(directory) in line.split()[4]]
        for point in reversed(points):
            subprocess.run(["umount", "-l", point], stderr=subprocess.DEVNULL)
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
