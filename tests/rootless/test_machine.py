"""Virtual machines of an ordinary user, also where the host refuses namespaces."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.requires import requires
from tests.rootless.conftest import UID, Hutch, installed

pytestmark = [
    requires("root", "userns", "qemu", "mkfs.erofs", "mke2fs", "busybox", "apt-mirror"),
    pytest.mark.integration,
]

PRUNE = """
from hutch.engine.context import Context
context = Context(None)
context.machines.prune_templates()
context.close()
"""


@pytest.fixture(scope="module")
def machines() -> Iterator[Hutch]:
    """Run `hutch` as a user who has busybox and a kernel; all tests share his template."""
    with installed(UID, [], timeout_s=240, user=UID, group=UID, extra_groups=[]) as python:

        def run(*arguments: str, refusing: bool = False) -> subprocess.CompletedProcess[str]:
            return python("-m", "hutch", *arguments, refusing=refusing)

        for arguments in (("image", "bootstrap", "busybox"), ("vm", "kernel", "add", "-q")):
            done = run(*arguments)
            assert done.returncode == 0, done.stderr
        try:
            yield run
            assert run("ps", "-aq").stdout == ""
        finally:
            python("-c", PRUNE)


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _qemu_of(machines: Hutch, name: str) -> Path:
    """Return the directory in /proc of a machine's QEMU: the child of its monitor."""
    monitor = json.loads(ok(machines("inspect", name)))[0]["State"]["Pid"]
    children = Path(f"/proc/{monitor}/task/{monitor}/children").read_text().split()
    return Path(f"/proc/{children[0]}")


def _get(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as link:
        link.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return b"".join(iter(lambda: link.recv(4096), b""))


def test_a_users_machine_is_sandboxed_and_its_port_is_published(machines: Hutch) -> None:
    port = _free_port()
    script = "echo hello > index.html; httpd -p 80; echo up; exec sleep 1000"
    ok(machines("run", "-d", "--name", "web", "--vm", "-p",
                f"127.0.0.1:{port}:80", "busybox", "sh", "-c", script))  # fmt: skip
    try:
        ok(machines("exec", "web", "sh", "-c", "until wget -q -O - 127.0.0.1; do :; done"))
        assert _get(port).endswith(b"hello\n")
        assert str(port) in ok(machines("port", "web"))
        assert "10.0.2.15" in ok(machines("exec", "web", "cat", "/etc/hosts"))
        qemu = _qemu_of(machines, "web")
        status = dict(line.split(":\t", 1) for line in (qemu / "status").read_text().splitlines())
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd")} == {0}
        for kind in ("user", "mnt", "pid", "ipc", "uts"):
            assert os.readlink(qemu / "ns" / kind) != os.readlink(f"/proc/self/ns/{kind}")
        assert not (qemu / "root" / "home").exists()
    finally:
        ok(machines("rm", "-f", "web"))


def test_where_namespaces_are_refused_a_container_names_the_way_out(machines: Hutch) -> None:
    done = machines("run", "--rm", "--network", "none", "busybox", "true", refusing=True)
    assert done.returncode == 125
    assert "this host refuses containers" in done.stderr and "--vm" in done.stderr


@requires("mmdebstrap")
def test_where_namespaces_are_refused_packages_are_not_for_a_user(machines: Hutch) -> None:
    done = machines("image", "bootstrap", "-q", "debian:bookworm", refusing=True)
    assert done.returncode == 1
    assert "lets this user make no namespaces" in done.stderr and "busybox" in done.stderr


def test_where_namespaces_are_refused_auto_takes_a_machine_and_says_why(
    machines: Hutch,
) -> None:
    done = machines("run", "--name", "auto", "--isolation", "auto", "busybox", "uname", "-r",
                    refusing=True)  # fmt: skip
    try:
        assert ok(done) != os.uname().release
        assert "virtual machine: this host refuses containers" in done.stderr
        told = json.loads(ok(machines("inspect", "auto", refusing=True)))[0]
        assert (told["Isolation"], "refuses" in told["IsolationReason"]) == ("vm", True)
    finally:
        ok(machines("rm", "-f", "auto"))


def test_where_namespaces_are_refused_qemu_has_its_filter_and_ends_with_its_monitor(
    machines: Hutch,
) -> None:
    ok(machines("run", "-d", "--name", "plain", "--vm", "--network", "none", "busybox",
                "sleep", "1000", refusing=True))  # fmt: skip
    try:
        qemu = _qemu_of(machines, "plain")
        status = (qemu / "status").read_text()
        assert "NoNewPrivs:\t1" in status and "Seccomp:\t2" in status
        assert os.readlink(qemu / "ns/user") != os.readlink("/proc/self/ns/user")
        handle = os.pidfd_open(int(qemu.name))
        try:
            ok(machines("kill", "plain", refusing=True))
            assert select.select([handle], [], [], 60)[0]
        finally:
            os.close(handle)
    finally:
        ok(machines("rm", "-f", "plain"))


def test_where_namespaces_work_auto_takes_a_container(machines: Hutch) -> None:
    done = machines("run", "--rm", "--isolation", "auto", "--accel", "tcg", "--network", "none",
                    "busybox", "uname", "-r")  # fmt: skip
    assert ok(done) == os.uname().release
    assert done.stderr == ""
