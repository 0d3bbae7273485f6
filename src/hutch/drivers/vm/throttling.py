"""Rates of a machine's disks: limits that QEMU keeps, set at the start and while it runs.

`disk` is the machine's own. With an image that is two to QEMU, the image's and the writable
one, which the program sees as one file system: they share their limits. `disk1`, … are the
attached ones. Rates of the host's block devices are its control group's (`hutch.drivers.limits`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from hutch.drivers.vm.boot import QMP_SOCKET
from hutch.errors import InvalidArgument
from hutch.plan.machine.disks import node_name
from hutch.spec.limits import RATES, machine_disks
from hutch.spec.model import InstanceSpec, Resources

if TYPE_CHECKING:
    from hutch.qmp import Monitor

__all__ = ["check_rates", "set_rates", "start_rates"]


class _Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes and operations per second, in the order of `RATES`; 0 is no limit."""

    read_bytes: int = 0
    write_bytes: int = 0
    reads: int = 0
    writes: int = 0


def check_rates(spec: InstanceSpec) -> None:
    """Raise for a rate of a disk that the machine does not have."""
    known = {"disk"}
    if spec.machine.from_disk is not None:
        known |= {f"disk{index + 1}" for index in range(len(spec.machine.from_disk.disks))}
    for name, field in machine_disks(spec.resources):
        if name not in known:
            raise InvalidArgument(
                f"the machine has no {name!r}",
                field=field,
                hint=f"its disks: {', '.join(sorted(known))}",
            )


def start_rates(directory: str, resources: Resources, *, image: bool) -> None:
    """Tell the QEMU of an instance's directory, before the machine runs, the rates it has."""
    if not _wanted(resources):
        return
    from hutch.qmp import conversation

    with conversation(f"{directory}/run/{QMP_SOCKET}") as monitor:
        set_rates(monitor, resources, image=image)


def set_rates(
    monitor: Monitor, resources: Resources, *, image: bool, running: bool = False
) -> None:
    """Tell QEMU the rates of the machine's disks.

    `image` says that its own disk is that of an image and a writable one. With `running`
    limits that it had may have gone; a new machine has none.
    """
    from hutch.qmp.blocks import query_blockstats, set_io_throttle

    wanted = _wanted(resources)
    present = {entry.device for entry in query_blockstats(monitor)}
    for name in sorted(f"disk{number}" if number else "disk" for number in range(len(present))):
        devices = [device for device in _devices(name, image) if device in present]
        rates = wanted.get(name, _Rates())
        if not devices or (not running and rates == _Rates()):
            continue
        set_io_throttle(
            monitor,
            devices,
            f"{name}-rates",
            read_bytes_per_s=rates.read_bytes,
            write_bytes_per_s=rates.write_bytes,
            reads_per_s=rates.reads,
            writes_per_s=rates.writes,
        )


def _wanted(resources: Resources) -> dict[str, _Rates]:
    found: dict[str, dict[str, int]] = {}
    for field, rate in zip(RATES, _Rates.__struct_fields__, strict=True):
        for throttle in getattr(resources, field):
            if not throttle.path.startswith("/"):
                found.setdefault(throttle.path, {})[rate] = throttle.rate
    return {name: _Rates(**rates) for name, rates in found.items()}


def _devices(name: str, image: bool) -> tuple[str, ...]:
    """Return the ids of the devices behind a name, as `hutch.plan.machine.disks` gives them."""
    number = int(name.removeprefix("disk") or 0)
    if not image:
        return (f"{node_name(number)}-dev",)
    numbers = (0, 1) if number == 0 else (number + 1,)
    return tuple(f"{node_name(n)}-dev" for n in numbers)
