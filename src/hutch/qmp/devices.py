"""Plug and unplug devices, network back ends and memory; plug processors; the balloon."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from hutch.errors import OperationTimeout, WrongState
from hutch.qmp.errors import CommandFailed
from hutch.qmp.monitor import Monitor

__all__ = [
    "UNPLUG_S",
    "CpuSlot",
    "chardev_add",
    "cpu_add",
    "device_add",
    "device_del",
    "list_devices",
    "netdev_add",
    "netdev_del",
    "object_add",
    "object_del",
    "qom_get",
    "qom_set",
    "query_balloon",
    "query_cpu_slots",
    "query_plugged",
    "set_balloon",
    "set_link",
]

UNPLUG_S = 15.0


class _Balloon(msgspec.Struct, frozen=True):
    actual: int


def device_add(monitor: Monitor, driver: str, *, id: str, **properties: Any) -> None:
    """Plug a device, e.g. `virtio-blk-pci` with `bus="rp0"`; underscores stand for dashes."""
    values = {name.replace("_", "-"): value for name, value in properties.items()}
    monitor.execute("device_add", {"driver": driver, "id": id, **values})


def device_del(monitor: Monitor, id: str, *, timeout_s: float = UNPLUG_S) -> None:
    """Ask the guest to let a device go and wait until it has.

    Raise `WrongState` where the guest refuses and `OperationTimeout` where it does not
    answer, as one that is stopped or still boots; the device may yet go later.
    """
    monitor.forget_events(["DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR"])
    deadline = time.monotonic() + timeout_s
    try:
        monitor.execute("device_del", {"id": id})
    except CommandFailed as exc:
        # An unplug that was asked for before and is under way: wait for its end.
        if "already in the process of unplug" not in exc.description:
            raise
    try:
        event = monitor.wait_event(
            ["DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR"],
            timeout_s=max(0.0, deadline - time.monotonic()),
            match=lambda event: event.data.get("device") == id,
        )
    except OperationTimeout:
        raise OperationTimeout(
            f"qemu: the guest has not let the device {id} go", hint="is the guest running?"
        ) from None
    if event.name == "DEVICE_UNPLUG_GUEST_ERROR":
        raise WrongState(f"qemu: the guest refuses to let the device {id} go")


class CpuSlot(msgspec.Struct, frozen=True, kw_only=True):
    """A place for processors: by which properties it is named, of which type they are, and
    the object of the one that is there ("": none)."""

    properties: dict[str, int] = msgspec.field(name="props")
    driver: str = msgspec.field(name="type")
    path: str = msgspec.field(name="qom-path", default="")

    def place(self) -> tuple[int, ...]:
        """Return where it is: socket, die, core, thread."""
        names = ("socket-id", "die-id", "core-id", "thread-id")
        return tuple(self.properties.get(name, 0) for name in names)


def query_cpu_slots(monitor: Monitor) -> list[CpuSlot]:
    """Return the places for processors, as QEMU numbers the processors."""
    slots: list[CpuSlot] = monitor.ask("query-hotpluggable-cpus", kind=list[CpuSlot])
    return sorted(slots, key=CpuSlot.place)


def cpu_add(monitor: Monitor, slot: CpuSlot, *, id: str) -> None:
    """Plug a processor; the guest then still has to bring it into use."""
    device_add(monitor, slot.driver, id=id, **slot.properties)


class _Property(msgspec.Struct, frozen=True):
    name: str
    type: str


def list_devices(monitor: Monitor) -> list[str]:
    """Return the ids of the devices that are there, those still being let go included."""
    found: list[_Property] = monitor.ask(
        "qom-list", {"path": "/machine/peripheral"}, kind=list[_Property]
    )
    return [entry.name for entry in found if entry.type.startswith("child<")]


def chardev_add(monitor: Monitor, id: str, fdname: str) -> None:
    """Add a character device at a connected socket that was handed over (`send_fd`)."""
    address = {"type": "fd", "data": {"str": fdname}}
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    monitor.execute("chardev-add", {"id": id, "backend": backend})


def netdev_add(monitor: Monitor, kind: str, *, id: str, **properties: Any) -> None:
    """Add a network back end (`tap` with `fd` as a name or a number, `user`, …)."""
    values = {name.replace("_", "-"): value for name, value in properties.items()}
    monitor.execute("netdev_add", {"type": kind, "id": id, **values})


def netdev_del(monitor: Monitor, id: str) -> None:
    """Remove a network back end whose device has gone."""
    monitor.execute("netdev_del", {"id": id})


def object_add(monitor: Monitor, kind: str, *, id: str, **properties: Any) -> None:
    """Make an object (memory backend, throttle group, secret, …)."""
    values = {name.replace("_", "-"): value for name, value in properties.items()}
    monitor.execute("object-add", {"qom-type": kind, "id": id, **values})


def object_del(monitor: Monitor, id: str) -> None:
    """Remove an object that nothing uses."""
    monitor.execute("object-del", {"id": id})


def qom_get(monitor: Monitor, path: str, property: str) -> Any:
    """Return a property of an object; a device of ours is at `/machine/peripheral/<id>`."""
    return monitor.execute("qom-get", {"path": path, "property": property})


def qom_set(monitor: Monitor, path: str, property: str, value: Any) -> None:
    """Set a property of an object."""
    monitor.execute("qom-set", {"path": path, "property": property, "value": value})


def set_link(monitor: Monitor, card: str, *, up: bool) -> None:
    """Plug a network card's cable in, or pull it; the guest sees its carrier come or go."""
    monitor.execute("set_link", {"name": card, "up": up})


def set_balloon(monitor: Monitor, memory: int) -> None:
    """Ask the guest to make do with this many bytes; it gets there in its own time."""
    monitor.execute("balloon", {"value": memory})


class _MemoryDevice(msgspec.Struct, frozen=True):
    type: str
    data: dict[str, Any]


def query_plugged(monitor: Monitor) -> int:
    """Return the bytes that the guest has taken of memory that came while it runs; they are
    not the balloon's."""
    found: list[_MemoryDevice] = monitor.ask("query-memory-devices", kind=list[_MemoryDevice])
    return sum(int(device.data["size"]) for device in found)


def query_balloon(monitor: Monitor) -> int:
    """Return the bytes that the guest has now; `CommandFailed` where there is no balloon."""
    balloon: _Balloon = monitor.ask("query-balloon", kind=_Balloon)
    return balloon.actual
