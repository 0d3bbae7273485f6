"""The peers: installed where absent, started by the bench alone, stopped and removed at its end.

Each has its own state directory. Docker's daemon listens on a socket of its own; the whole
bench runs in a network and mount namespace that `bench.run` made, so that its rules and
bridges are never the machine's.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bench.worker import Worker

__all__ = ["Docker", "Podman", "bundle", "crun_worker", "dockerd", "install_peers", "run"]

PACKAGES = {
    "runc": "runc",
    "crun": "crun",
    "bwrap": "bubblewrap",
    "dockerd": "docker.io",
    "podman": "podman",
    "iptables": "iptables",
    "conmon": "conmon",
    "/usr/lib/podman/netavark": "netavark",
    "docker-registry": "docker-registry",
    "skopeo": "skopeo",
}
CLEAN_ENV = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}


def run(argv: list[str]) -> None:
    """Run a command to its end, output thrown away; raise with its last words on failure."""
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=CLEAN_ENV,
    )
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"{' '.join(argv[:3])} … ended with {done.returncode}: {words}")


def _is_there(program: str) -> bool:
    return shutil.which(program, path=f"{CLEAN_ENV['PATH']}:/usr/local/bin") is not None


def install_peers() -> list[str]:
    """Install the absent peers with apt-get; return those that could not be had."""
    absent = [package for program, package in PACKAGES.items() if not _is_there(program)]
    if absent:
        print(f"installing {' '.join(absent)}", file=sys.stderr)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        command = ["apt-get", "install", "-q", "-y", "--no-install-recommends", *absent]
        for argv in (["apt-get", "update", "-q"], command):
            subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=sys.stderr, env=environment)
    return [package for program, package in PACKAGES.items() if not _is_there(program)]


def bundle(directory: Path, rootfs: Path, argv: list[str]) -> Path:
    """Make an OCI bundle as `runc spec` writes it, without a terminal, for this command."""
    directory.mkdir(parents=True)
    (directory / "rootfs").symlink_to(rootfs)
    subprocess.run(["runc", "spec"], cwd=directory, check=True)
    config = msgspec.json.decode((directory / "config.json").read_bytes(), type=dict)
    config["process"]["terminal"] = False
    config["process"]["args"] = argv
    config["root"] = {"path": str(rootfs), "readonly": False}
    (directory / "config.json").write_bytes(msgspec.json.encode(config))
    return directory


@contextmanager
def crun_worker() -> Iterator[Worker]:
    """A worker in a mount namespace without the unified cgroup hierarchy."""
    unified = "/sys/fs/cgroup/unified"
    drop = f"if mountpoint -q {unified}; then umount {unified}; fi"
    with Worker(drop) as worker:
        yield worker


class Docker:
    """The docker command against the bench's own daemon."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._base = ["/usr/bin/docker", "--host", f"unix://{socket}"]

    def __call__(self, *arguments: str) -> None:
        run([*self._base, *arguments])

    def output(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._base, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=CLEAN_ENV,
            check=True,
        )
        return done.stdout.strip()


@contextmanager
def dockerd(state: Path, tree: Path | None = None) -> Iterator[Docker]:
    """A Docker daemon with its state under `state`, Debian's own or one of another release that
    was unpacked into `tree`; stopped by its process id at the end."""
    state.mkdir(parents=True, exist_ok=True)
    socket = state / "docker.sock"
    log = state / "dockerd.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [
                *(_entered(tree, state) if tree else ()),
                "/usr/sbin/dockerd",
                "--host",
                f"unix://{socket}",
                "--data-root",
                str(state / "data"),
                "--exec-root",
                str(state / "exec"),
                "--pidfile",
                str(state / "dockerd.pid"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=CLEAN_ENV,
        )
    docker = Docker(socket)
    try:
        deadline = time.monotonic() + 60
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"dockerd ended: {log.read_text()[-600:]}")
            try:
                docker("version")
                break
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield docker
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _entered(tree: Path, state: Path) -> list[str]:
    """Return the words that run a program with `tree` as its root, where this machine's kernel
    and its state directory are: what comes after them becomes that program by exec."""
    script = """
set -e
# Its root has to be a mount: dockerd mounts that anew where it unpacks.
mount --bind "$0" "$0"
for name in proc sys dev; do mount --rbind /$name "$0/$name"; done
mount -t tmpfs -o mode=755 tmpfs "$0/run"
mkdir -p "$0/$1"
mount --bind "$1" "$0/$1"
root=$0
shift
exec chroot "$root" "$@"
"""
    return [
        *("unshare", "--mount", "--propagation", "private"),
        *("sh", "-c", script, str(tree), str(state)),
    ]


class Podman:
    """Podman with a store of its own; runc does the running, since crun refuses hybrid mode."""

    def __init__(self, state: Path) -> None:
        self._base = [
            "podman",
            "--root",
            str(state / "root"),
            "--runroot",
            str(state / "run"),
            "--tmpdir",
            str(state / "tmp"),
            "--runtime",
            "runc",
            "--cgroup-manager",
            "cgroupfs",
            "--network-config-dir",
            str(state / "networks"),
            "--events-backend",
            "file",
        ]
        (state / "networks").mkdir(parents=True, exist_ok=True)

    def __call__(self, *arguments: str) -> None:
        run([*self._base, *arguments])
