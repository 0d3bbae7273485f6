"""The files of a stopped machine: its disks in a machine of their own, where no program runs.

The host never mounts a guest's file system: what is on that disk is the guest's word. A machine
is started on it instead, from the same template, with the agent and nothing else; it has no
network, is as confined as any other, and ends with whoever asked for it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from hutch.drivers import failures
from hutch.drivers.base import Launch
from hutch.drivers.vm.launching import MachineLauncher
from hutch.drivers.vm.limits import disk_in_memory, group_limits, memory_of
from hutch.errors import HutchError, NotFound
from hutch.linux.cgroup import Hierarchy
from hutch.plan import guest as protocol
from hutch.process.guest import Guest
from hutch.process.supervisor import Supervisor

__all__ = ["maintained"]

_BRING_UP_S = 150.0
_SHUTDOWN_S = 60.0
_END_S = 30.0


@contextmanager
def maintained(machines: MachineLauncher, hierarchy: Hierarchy, launch: Launch) -> Iterator[Guest]:
    """Hold the guest of a stopped machine. The caller has the instance's lock.

    What was written is on the disk when the block has ended without an error.
    """
    directory = f"{launch.directory}/maintenance"
    with ExitStack() as undo, failures.translated(f"files of {launch.name}"):
        # Its starter may have been killed: the machine has ended with it, its group is left.
        with suppress(NotFound):
            stale = hierarchy.load(launch.id)
            stale.kill_all()
            stale.remove()
        shutil.rmtree(directory, ignore_errors=True)
        undo.callback(shutil.rmtree, directory, ignore_errors=True)
        group = hierarchy.create(
            launch.id,
            group_limits(
                launch.spec.resources,
                memory_of(launch.spec),
                disk=disk_in_memory(launch.directory),
            ),
        )
        undo.callback(group.remove)
        undo.callback(group.kill_all)
        with ExitStack() as held:
            booted, template = machines.start_bare(launch, directory, group, held)
            undo.callback(booted.supervisor.close)
            held.callback(booted.monitor.close)
            undo.callback(_end, booted.supervisor)
            with failures.launching(booted.plan, "start"):
                booted.supervisor.wait_started()
            with failures.machine_failures(f"files of {launch.name}", directory):
                booted.monitor.wait_qemu()
                if template is not None:
                    machines.resume(directory, template, booted.monitor)
                    booted.monitor.go()
                booted.monitor.wait_ready(_BRING_UP_S)
        guest = Guest(directory)
        yield guest
        guest.call(protocol.Call.SHUTDOWN, bytes(4), timeout_s=_SHUTDOWN_S)


def _end(supervisor: Supervisor) -> None:
    """End what is written out, or what nobody wants any more."""
    with suppress(HutchError, OSError):
        supervisor.shutdown()
        supervisor.wait(_END_S)
