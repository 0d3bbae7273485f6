"""Directories and files of the host in a machine: one virtiofsd for each machine that has any.

The server is started before QEMU, with a socket to which we have connected already: nobody
else can, and when the last holder of the other end has gone, QEMU in the end, the server
ends as well, whoever was killed and how. It is in the instance's control group.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from hutch.drivers import failures
from hutch.drivers.base import Launch, LaunchMount
from hutch.drivers.vm.sandbox import host_binds, make_skeleton
from hutch.drivers.vm.volumes import guest_path, volumes
from hutch.errors import Unsupported
from hutch.host.isolation import is_privileged
from hutch.host.virtiofsd import find_virtiofsd
from hutch.linux.cgroup import Group
from hutch.plan import flags
from hutch.plan.ops import Plan
from hutch.plan.shares import ServerAssets, SharedPath, compile_server
from hutch.plan.vm import GUEST_SHARES, GuestBind
from hutch.process.launcher import Launcher
from hutch.process.supervisor import Supervisor
from hutch.qmp.monitor import Monitor
from hutch.spec.model import InstanceSpec, Mount, TmpfsMount, VolumeMount

__all__ = ["TAG", "ShareServer", "check_mounts", "copy_memory", "fill_memory", "guest_binds"]
__all__ += ["plug", "serve", "shared"]

TAG = "hutch"
DEVICE = "shares"
# The first of the ports for hot-plug: network cards take the others.
PORT = "rp0"
QUEUE = 1024
_PROPAGATION = {"private": flags.MS_PRIVATE, "slave": flags.MS_SLAVE}


class ShareServer(msgspec.Struct, frozen=True, kw_only=True):
    """A server under way: the connected socket for QEMU and the link, the caller's to close.
    `moves`: what the guest has open can go on at another server."""

    socket: int
    moves: bool
    supervisor: Supervisor
    plan: Plan

    def wait_started(self) -> None:
        """Wait until it runs; raise what failed."""
        with failures.launching(self.plan, "mounts"):
            self.supervisor.wait_started()


def check_mounts(spec: InstanceSpec) -> None:
    """Raise `Unsupported` where this host cannot give a machine its directories."""
    if not spec.volumes_from and not any(_is_served(mount) for mount in spec.mounts):
        return
    if not is_privileged():
        raise Unsupported(
            "mounts: directories of the host in a virtual machine need root",
            hint="leave them out and use `hutch cp`, or run it as a container",
        )
    find_virtiofsd()


def _is_served(mount: Mount) -> bool:
    disk = isinstance(mount, VolumeMount) and mount.disk
    return not disk and not isinstance(mount, TmpfsMount)


def shared(launch: Launch) -> list[LaunchMount]:
    """Return the mounts that are served: all but the small files of ours, and disks."""
    return [mount for mount in launch.mounts if not mount.ours and not mount.disk]


def guest_binds(launch: Launch) -> tuple[GuestBind, ...]:
    """Return where the guest finds the mounts, and where the program does: parents first."""
    served = (
        GuestBind(
            path=f"{GUEST_SHARES}/{index}",
            target=mount.target,
            read_only=mount.read_only,
            is_dir=_is_dir(mount),
        )
        for index, mount in enumerate(shared(launch))
    )
    disks = (
        GuestBind(path=guest_path(number), target=mount.target, read_only=mount.read_only)
        for number, mount in enumerate(volumes(launch))
    )
    order = [mount.target for mount in launch.mounts]
    return tuple(sorted((*served, *disks), key=lambda bind: order.index(bind.target)))


def _is_dir(mount: LaunchMount) -> bool:
    status = os.fstat(mount.fd) if mount.fd >= 0 else os.stat(mount.source)
    return stat.S_ISDIR(status.st_mode)


def serve(
    launcher: Launcher, root: Path, launch: Launch, group: Group, undo: ExitStack
) -> ShareServer | None:
    """Start the server of a launch's mounts; None where it has none.

    Returns before it runs: `wait_started` tells. `undo` closes what is returned.
    """
    mounts = shared(launch)
    if not mounts:
        return None
    program = find_virtiofsd()
    with ExitStack() as held:
        listener, connected = _connected()
        held.callback(os.close, listener)
        undo.callback(os.close, connected)
        slots = [listener]
        paths = [_path(mount, slots) for mount in mounts]
        cgroup_slot = -1
        directory = group.open_dir()
        if directory is not None:
            held.callback(os.close, directory)
            slots.append(directory)
            cgroup_slot = len(slots) - 1
        plan = compile_server(
            ServerAssets(
                program=program.path,
                flavor=program.flavor,
                skeleton=str(make_skeleton(root / "cache" / "machine-root")),
                log_path=f"{launch.directory}/shares.log",
                binds=host_binds(program.path),
                paths=tuple(paths),
                cgroup_files=group.join_files(),
                cgroup_slot=cgroup_slot,
                slots=len(slots),
            )
        )
        supervisor = launcher.start(plan, slots)
        undo.callback(supervisor.close)
        return ShareServer(socket=connected, moves=program.moves, supervisor=supervisor, plan=plan)


def _path(mount: LaunchMount, slots: list[int]) -> SharedPath:
    slot = -1
    if mount.fd >= 0:
        slots.append(mount.fd)
        slot = len(slots) - 1
    return SharedPath(
        path=mount.source,
        slot=slot,
        is_dir=_is_dir(mount),
        read_only=mount.read_only,
        recursive=mount.recursive,
        propagation=_PROPAGATION[mount.propagation.removeprefix("r")],
    )


def _connected() -> tuple[int, int]:
    """Return a listening socket without a name that lasts, and one connected to it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("")  # the kernel picks an abstract name that nobody has; see unix(7)
        listener.listen(1)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(listener.getsockname())
            return listener.detach(), client.detach()


def copy_memory(template: int, size: int) -> int:
    """Return a memory file with what a template's has: the server must share the memory,
    which a private mapping of the template's cannot."""
    memory = os.memfd_create("hutch-memory", os.MFD_CLOEXEC)
    try:
        fill_memory(memory, template, size)
    except BaseException:
        os.close(memory)
        raise
    return memory


def fill_memory(memory: int, template: int, size: int) -> None:
    """Give an empty memory file the size and content of a template's."""
    os.ftruncate(memory, size)
    for start, end in _extents(template, size):
        _copy(template, memory, start, end)


def _extents(fd: int, size: int) -> Sequence[tuple[int, int]]:
    found = []
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: there is no more
            break
        end = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, end))
    return found


def _copy(source: int, target: int, start: int, end: int) -> None:
    os.lseek(target, start, os.SEEK_SET)
    while start < end:
        copied = os.sendfile(target, source, start, end - start)
        if not copied:
            raise OSError(f"a template's memory ends at {start}")
        start += copied


def plug(monitor: Monitor, server: ShareServer, *, shared_port: bool = False) -> None:
    """Plug the device into a machine that was resumed from a template; `shared_port`: others
    are at its port, so that the guest looks for them too.

    It cannot be there before: QEMU does not load the state of a machine with such a device.
    """
    from hutch.qmp.descriptors import send_fd
    from hutch.qmp.devices import chardev_add, device_add

    with send_fd(monitor, server.socket) as name:
        chardev_add(monitor, DEVICE, name)
    device_add(
        monitor,
        "vhost-user-fs-pci",
        id=f"{DEVICE}-dev",
        bus=PORT,
        multifunction=shared_port,
        chardev=DEVICE,
        tag=TAG,
        queue_size=QUEUE,
    )
