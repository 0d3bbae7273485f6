"""The launcher under test: as it is shipped, and built with ASan and UBSan."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.plan import ops
from hutch.process import Launcher
from tests.native.boxes import Runner
from tests.native.guests import Peer, serving
from tests.native.machines import Machines

APPLETS = """
cat chmod env false grep head hostname id ip kill ls mkdir printf ps pwd readlink rm setsid sh
sleep sort stat stty tail touch tr true tty wc yes
"""
NATIVE = Path(__file__).parents[2] / "native"


def _built(target: str, binary: str) -> str:
    """Build one at a time: several test workers may want to."""
    with open(NATIVE / "Makefile") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(
            ["make", "-s", "-C", str(NATIVE), target], check=True, stdout=subprocess.DEVNULL
        )
    return str(NATIVE / "build" / binary)


@pytest.fixture(scope="session")
def static_launcher() -> Iterator[Launcher]:
    with Launcher(_built("build/hutch-launcher", "hutch-launcher")) as launcher:
        yield launcher


@pytest.fixture(scope="session")
def checked_launcher() -> Iterator[Launcher]:
    with Launcher(_built("build/hutch-launcher-asan", "hutch-launcher-asan")) as launcher:
        yield launcher


@pytest.fixture(scope="session")
def old_launcher() -> Iterator[Launcher]:
    """The launcher as it works where the kernel's overlay is older than 6.8; also checked."""
    with Launcher(_built("build/hutch-launcher-old", "hutch-launcher-old")) as launcher:
        yield launcher


def _runner(request: pytest.FixtureRequest, findings: Path) -> Iterator[Runner]:
    launcher = request.getfixturevalue(f"{request.param}_launcher")
    env = {"ASAN_OPTIONS": f"log_path={findings}/asan:detect_leaks=0:handle_segv=0"}
    env["UBSAN_OPTIONS"] = f"log_path={findings}/ubsan:print_stacktrace=1"
    yield Runner(launcher, {} if request.param == "static" else env)
    found = [path.read_text() for path in findings.iterdir()]
    assert not found, found[0]


@pytest.fixture(params=["static", "checked"])
def runner(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runner]:
    """Starts with the shipped and with the checked launcher; a finding fails the test."""
    yield from _runner(request, tmp_path_factory.mktemp("findings"))


@pytest.fixture(params=["static", "checked", "old"])
def overlay_runner(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runner]:
    """The same, with the way of older kernels to make an overlay."""
    yield from _runner(request, tmp_path_factory.mktemp("findings"))


@pytest.fixture(scope="session")
def busybox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One copy of static busybox, for root file systems to link to."""
    found = shutil.which("busybox")
    assert found is not None
    return Path(shutil.copy2(found, tmp_path_factory.mktemp("busybox") / "busybox"))


@pytest.fixture
def rootfs(tmp_path: Path, busybox: Path) -> Path:
    """A root file system with the applets of these tests: quick to make, there are many."""
    root = tmp_path / "rootfs"
    for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp"):
        (root / name).mkdir(parents=True)
    os.link(busybox, root / "bin/busybox")
    for applet in APPLETS.split():
        (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    return root


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture
def held(run_dir: Path) -> ops.Supervision:
    """Supervision with a run directory and a log."""
    return ops.Supervision(directory=str(run_dir), log_path=str(run_dir / "log"))


@pytest.fixture(scope="session")
def static_vmm() -> str:
    return _built("build/hutch-vmm", "hutch-vmm")


@pytest.fixture(scope="session")
def checked_vmm() -> str:
    return _built("build/hutch-vmm-asan", "hutch-vmm-asan")


@pytest.fixture(params=["static", "checked"])
def machines(
    request: pytest.FixtureRequest,
    static_launcher: Launcher,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Machines]:
    """Runs the shipped monitor and the checked one; a finding fails the test."""
    findings = tmp_path_factory.mktemp("findings")
    vmm = request.getfixturevalue(f"{request.param}_vmm")
    env = (
        f"ASAN_OPTIONS=log_path={findings}/asan:detect_leaks=0:handle_segv=0",
        f"UBSAN_OPTIONS=log_path={findings}/ubsan:print_stacktrace=1",
    )
    directory = tmp_path_factory.mktemp("machine")
    yield Machines(static_launcher, vmm, env, directory)
    found = [path.read_text() for path in findings.iterdir()]
    assert not found, found[0]


@pytest.fixture(scope="session")
def static_agent() -> str:
    return _built("build/hutch-agent", "hutch-agent")


@pytest.fixture(scope="session")
def static_launcher_path() -> str:
    return _built("build/hutch-launcher", "hutch-launcher")


@pytest.fixture(scope="session")
def agent_programs() -> tuple[str, str]:
    """The guest's agent and its launcher, checked; for a test to serve over a socket."""
    return (
        _built("build/hutch-agent-asan", "hutch-agent-asan"),
        _built("build/hutch-launcher-asan", "hutch-launcher-asan"),
    )


@pytest.fixture
def peer(
    agent_programs: tuple[str, str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Peer]:
    """The host's end of a channel to an agent, after HELLO. Its files are in tmp_path/root."""
    agent, launcher = agent_programs
    root = tmp_path / "root"
    root.mkdir()
    findings = tmp_path_factory.mktemp("findings")
    with serving(agent, launcher=launcher, root=root, findings=findings) as peer:
        peer.hello()
        yield peer
