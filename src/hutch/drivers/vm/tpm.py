"""The TPM of a machine: a swtpm beside its QEMU, in a confinement of the same kind.

They share one connected socket, so nobody else can ask it anything, and it ends when QEMU
does, whoever was killed and how. Its state is in the instance's directory: all it can write to.
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path

import msgspec

from hutch.drivers import failures
from hutch.drivers.base import Launch
from hutch.drivers.vm.sandbox import (
    Descriptors,
    Sandbox,
    host_binds,
    make_skeleton,
    sandbox_user,
)
from hutch.errors import Unsupported
from hutch.host.programs import find_program
from hutch.linux.cgroup import Group
from hutch.plan.assets import ResolvedUser
from hutch.plan.machine.model import MICROVM, Descriptor, Tpm
from hutch.plan.ops import Plan, Supervision
from hutch.plan.vm import GuestBind, SandboxAssets, compile_sandbox
from hutch.process.launcher import Launcher
from hutch.process.supervisor import Supervisor
from hutch.process.vmm import vmm_path
from hutch.spec.model import InstanceSpec

__all__ = ["STATE_DIRECTORY", "TpmServer", "check_tpm", "guest_devices", "serve_tpm"]

STATE_DIRECTORY = "tpm"
_INSIDE = "/run"
_LOG_BYTES = 1 << 20
_CONTROL = 3  # the first of what `Inherit` gives


class TpmServer(msgspec.Struct, frozen=True, kw_only=True):
    """A TPM under way: QEMU's end of the socket and the link, both closed after the launch."""

    socket: int
    supervisor: Supervisor
    plan: Plan

    def device(self, descriptors: Descriptors) -> Tpm:
        """Return the device, with QEMU's end of the socket."""
        return Tpm(socket=Descriptor(descriptors.add(os.dup(self.socket))))

    def wait_started(self) -> None:
        """Wait until it runs; raise what failed."""
        with failures.launching(self.plan, "tpm"):
            self.supervisor.wait_started()


def check_tpm(machine: str) -> None:
    """Raise `Unsupported` where a machine of that type, or this host, has no TPM."""
    if machine == MICROVM:
        raise Unsupported("tpm: a machine of type microvm has none", hint="use --machine q35")
    _find_swtpm()


def guest_devices(spec: InstanceSpec) -> tuple[GuestBind, ...]:
    """Return the devices by which the program of an image's machine speaks to its TPM: the
    guest's own nodes, as the kernel chooses the number of the second."""
    if not spec.machine.tpm:
        return ()
    return tuple(
        GuestBind(path=path, target=path, is_dir=False) for path in ("/dev/tpm0", "/dev/tpmrm0")
    )


def _find_swtpm() -> str:
    """Return the host's swtpm; raise `Unsupported` with the cure where there is none."""
    program = find_program("swtpm")
    if program is None:
        raise Unsupported("tpm: swtpm is not installed", hint="apt-get install swtpm")
    return program


def serve_tpm(
    launcher: Launcher, sandbox: Sandbox, root: Path, launch: Launch, group: Group, undo: ExitStack
) -> TpmServer:
    """Start the TPM of a launch. Returns before it runs: `wait_started` tells. `undo` closes
    what is returned."""
    program = _find_swtpm()
    state = _state_directory(launch, sandbox)
    ours, theirs = socket.socketpair()
    undo.callback(ours.close)
    with ExitStack() as held:
        held.callback(theirs.close)
        slots = [theirs.fileno()]
        cgroup_slot = -1
        directory = group.open_dir()
        if directory is not None:
            held.callback(os.close, directory)
            slots.append(directory)
            cgroup_slot = len(slots) - 1
        inside = state if sandbox.namespaces == "none" else _INSIDE
        plan = compile_sandbox(
            SandboxAssets(
                supervision=Supervision(
                    log_path=f"{launch.directory}/tpm.log",
                    log_max_bytes=_LOG_BYTES,
                    name="hutch-tpm",
                ),
                skeleton=str(make_skeleton(root / "cache" / "machine-root")),
                vmm=vmm_path(),
                argv=_command(program, inside),
                binds=host_binds(),
                shared=((state, _INSIDE),),
                user=_user(launch, sandbox),
                namespaces=sandbox.namespaces,
                cgroup_files=group.join_files(),
                cgroup_slot=cgroup_slot,
                inherit=(0,),
                slots=len(slots),
            )
        )
        supervisor = launcher.start(plan, slots)
        undo.callback(supervisor.close)
        if sandbox.namespaces == "user":
            from hutch.drivers.vm.boot import map_ids

            map_ids(supervisor)
        return TpmServer(socket=ours.fileno(), supervisor=supervisor, plan=plan)


def _command(program: str, state: str) -> tuple[str, ...]:
    return (
        *(program, "socket", "--tpm2", "--terminate", "--tpmstate", f"dir={state},mode=0600"),
        *("--ctrl", f"type=unixio,clientfd={_CONTROL}"),
    )


def _user(launch: Launch, sandbox: Sandbox) -> ResolvedUser | None:
    """Return who it runs as: QEMU's user, but who sees the host's files needs a way to them."""
    return None if sandbox.namespaces == "none" else sandbox_user(sandbox, launch.id)


def _state_directory(launch: Launch, sandbox: Sandbox) -> str:
    """Return where the TPM's state is, made where this is the machine's first start."""
    path = f"{launch.directory}/{STATE_DIRECTORY}"
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    user = _user(launch, sandbox)
    if user is not None and sandbox.namespaces != "user":
        for name in (path, *(entry.path for entry in os.scandir(path))):
            os.chown(name, user.uid, user.gid, follow_symlinks=False)
    return path
