"""The host's side of a machine: what QEMU may see and hold, and starting `hutch-vmm` in it."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path

import msgspec

from hutch.host.facts import has_capability
from hutch.host.isolation import Namespaces, is_privileged, load_isolation
from hutch.plan.assets import ResolvedUser
from hutch.process.vmm import FIRST_QEMU_FD, vmm_path

__all__ = ["Descriptors", "Sandbox", "choose_sandbox", "host_binds", "listen_at"]
__all__ += ["make_skeleton", "sandbox_user"]

# Above the ranges that systemd gives to dynamic users and to containers (UID-GIDS.md), so no
# account of the host has such an id, and hardly ever two machines the same.
_FIRST_UID = 1_879_048_192
_UIDS = 1 << 24
_DIRECTORIES = ("dev", "proc", "run", "tmp")
# What changing to another user takes: CAP_SETGID, CAP_SETUID, CAP_SETPCAP.
_CHANGE_USER = (6, 7, 8)
_SYSTEM = ("usr", "bin", "lib", "lib32", "lib64", "libx32", "sbin")


class Descriptors:
    """The descriptors that QEMU gets: `add` tells the number under which QEMU has one."""

    def __init__(self, held: ExitStack) -> None:
        self._held = held
        self.fds: list[int] = []

    def add(self, fd: int) -> int:
        """Hand over a descriptor, which is closed here after the launch."""
        self._held.callback(os.close, fd)
        self.fds.append(fd)
        return FIRST_QEMU_FD + len(self.fds) - 1


class Sandbox(msgspec.Struct, frozen=True, kw_only=True):
    """How QEMU is kept apart from the host: who makes its namespaces, or why there are none."""

    namespaces: Namespaces
    reason: str = ""


def choose_sandbox(root: Path) -> Sandbox:
    """Return the best sandbox that this process can make. QEMU's own filter, no new
    privileges and its being no root hold in each of them."""
    if is_privileged():
        return Sandbox(namespaces="own")
    found = load_isolation(root)
    return Sandbox(namespaces=found.namespaces, reason=found.reason)


def sandbox_user(sandbox: Sandbox, identifier: str) -> ResolvedUser | None:
    """Return the user that QEMU runs as: one that exists nowhere else on the host.

    Who may not change users stays the same one: root of its user namespace, or None.
    """
    if sandbox.namespaces == "user":
        return ResolvedUser(uid=0, gid=0)
    if sandbox.namespaces == "none" and not _may_change_user():
        return None
    number = _FIRST_UID + int(identifier[:12], 16) % _UIDS
    return ResolvedUser(uid=number, gid=number)


def _may_change_user() -> bool:
    """Tell whether we may, and whether the other user can then reach our program."""
    if not all(map(has_capability, _CHANGE_USER)):
        return False
    parents = Path(vmm_path()).resolve().parents
    return all(os.stat(directory).st_mode & 0o001 for directory in parents)


def make_skeleton(directory: Path) -> Path:
    """Make (once) the root directory of the sandbox: mount points, and links as the host has."""
    if (directory / "hutch-vmm").exists():
        return directory
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    for name in _DIRECTORIES:
        (directory / name).mkdir(mode=0o755, exist_ok=True)
    for name in _SYSTEM:
        host = Path("/") / name
        if host.is_symlink():
            _link(os.readlink(host).lstrip("/"), directory / name)
        elif host.is_dir():
            (directory / name).mkdir(mode=0o755, exist_ok=True)
    # Last: it says that the rest is there.
    (directory / "hutch-vmm").touch(mode=0o755)
    return directory


def _link(target: str, path: Path) -> None:
    try:
        path.symlink_to(target)
    except FileExistsError:
        pass


def host_binds(qemu: str = "") -> tuple[tuple[str, str], ...]:
    """Return the directories of the host with programs and libraries, (path, inside): the
    system's, and the tree of a QEMU that is not the system's."""
    names = [f"/{name}" for name in _SYSTEM]
    binds = [name for name in names if os.path.isdir(name) and not os.path.islink(name)]
    tree = os.path.dirname(os.path.dirname(os.path.realpath(qemu))) if qemu else "/"
    if tree not in binds and tree != "/":
        binds.append(tree)
    return tuple((name, name) for name in binds)


def listen_at(directory: str, name: str) -> int:
    """Return a listening Unix socket at `directory/name`, for this user only.

    What an earlier machine left there is replaced.
    """
    handle = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            os.unlink(name, dir_fd=handle)
        except FileNotFoundError:
            pass
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            # By descriptor: a socket's path has room for 107 bytes only.
            path = f"/proc/self/fd/{handle}/{name}"
            listener.bind(path)
            os.chmod(path, 0o600)
            listener.listen(64)
            return listener.detach()
    finally:
        os.close(handle)
