"""Docker's daemon as the other side: what one pushes, saves or builds, the other runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.requires import requires

SCRIPT = Path(__file__).with_name("docker_exchange.sh")


@requires("root", "docker", "dockerd", "docker-registry", "overlayfs", "netns")
@pytest.mark.timeout(240)
def test_docker_and_hutch_run_each_others_images(tmp_path: Path) -> None:
    hutch = f"{sys.executable} -m hutch"
    # Docker's daemon changes addresses and rules of its network namespace: give it one.
    done = subprocess.run(
        ["unshare", "-n", "-m", "--propagation", "private", "sh", str(SCRIPT), tmp_path, hutch],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "docker runs what hutch pushed",
        "hutch runs what docker built and pushed",
        "docker loads what hutch saved",
        "the identifier is the same on both sides",
    ]
