"""What changes while a machine runs: network cards on its ports for hot-plug, its disk.

A card from the start sits on the root bus and stays there: one that loses its network is
taken down in the guest and put aside.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from hutch.drivers.vm.setup import WRITABLE_LINK, WRITABLE_PATH, interface_setup
from hutch.errors import Exhausted, HutchError, Unsupported
from hutch.network.model import Endpoint
from hutch.network.taps import add_tap, remove_tap
from hutch.plan import guest as protocol
from hutch.plan.machine.disks import node_name
from hutch.process.guest import Guest
from hutch.qmp.blocks import resize_block, top_node
from hutch.qmp.devices import device_add, device_del, list_devices, netdev_add, netdev_del
from hutch.qmp.monitor import Monitor

__all__ = ["CARD_PORTS", "grow_disk", "plug_card", "unplug_card"]

# The first port is that of the shared directories.
CARD_PORTS = (1, 2, 3)
# Above the numbers of the cards from the start, whose taps stay.
_NUMBER = 100
_ANSWER_S = 60.0
# The guest writes the tables of inodes of what is new.
_RESIZE_S = 600.0
# In the order of the machine's disks, after that of the image.
_WRITABLE = 1


def plug_card(
    monitor: Monitor,
    guest: Guest,
    pid: int,
    endpoint: Endpoint,
    join: Callable[[int, int], None],
    *,
    modules: Sequence[protocol.SetupOp],
) -> None:
    """Plug a card for an endpoint and set it up in the guest; undone where that fails.

    `modules` load the driver in a guest that had no card so far.
    """
    from hutch.qmp.descriptors import send_fd

    devices = list_devices(monitor)
    port = _free_port(devices)
    number = _NUMBER + port
    device, backend = f"card{port}-{endpoint.interface}", f"plugged{port}"
    with ExitStack() as undo:
        made = add_tap(pid, number)
        undo.callback(remove_tap, pid, number)
        try:
            join(made.indexes[0], number)
            with send_fd(monitor, made.taps[0]) as name:
                netdev_add(monitor, "tap", id=backend, fd=name, vhost=False)
        finally:
            for fd in (made.namespace, *made.taps):
                os.close(fd)
        undo.callback(netdev_del, monitor, backend)
        device_add(
            monitor,
            "virtio-net-pci",
            id=device,
            bus=f"rp{port}",
            netdev=backend,
            mac=endpoint.mac,
            romfile="",
        )
        undo.callback(_gone, monitor, device)
        setup = [*modules, *interface_setup(_place(devices, port), endpoint)]
        guest.call(protocol.Call.SETUP, protocol.encode_setup(setup), timeout_s=_ANSWER_S)
        undo.pop_all()


def unplug_card(
    monitor: Monitor,
    guest: Guest,
    pid: int,
    endpoint: Endpoint,
    setup: Sequence[protocol.SetupOp],
) -> None:
    """Take an endpoint's card away, then do `setup` in the guest."""
    plugged = [name for name in list_devices(monitor) if name.endswith(f"-{endpoint.interface}")]
    operations = list(setup)
    if plugged:
        port = int(plugged[0].removeprefix("card").partition("-")[0])
        device_del(monitor, plugged[0])
        netdev_del(monitor, f"plugged{port}")
        remove_tap(pid, _NUMBER + port)
    else:
        # Names are not used twice: the interface's index is nobody else's.
        aside = f"gone{os.urandom(4).hex()}"
        operations.insert(0, protocol.Retire(interface=endpoint.interface, aside=aside))
    if operations:
        guest.call(protocol.Call.SETUP, protocol.encode_setup(operations), timeout_s=_ANSWER_S)


def grow_disk(monitor: Monitor, guest: Guest, size: int) -> None:
    """Let the writable disk, and the file system on it, grow to `size` bytes."""
    node = top_node(monitor, f"{node_name(_WRITABLE)}-dev")
    resize_block(monitor, node.name, size)
    operation = protocol.Resize(device=WRITABLE_LINK, path=WRITABLE_PATH, size=size)
    guest.call(protocol.Call.SETUP, protocol.encode_setup([operation]), timeout_s=_RESIZE_S)


def _free_port(devices: Sequence[str]) -> int:
    if "rp0" not in devices:
        raise Unsupported(
            "network: a machine of this type has no hot-plug",
            hint="stop it, connect, and start it again, or use --machine q35",
        )
    taken = {name.removeprefix("card").partition("-")[0] for name in devices}
    for port in CARD_PORTS:
        if str(port) not in taken:
            return port
    raise Exhausted(
        f"network: a running machine has room for {len(CARD_PORTS)} further cards",
        hint="stop it, connect, and start it again",
    )


def _place(devices: Sequence[str], port: int) -> int:
    """Return how many cards the guest finds before the one at a port, in PCI order."""
    first = sum(1 for name in devices if name.startswith("nic"))
    before = (name for name in devices if name.startswith("card"))
    return first + sum(1 for n in before if int(n.removeprefix("card").partition("-")[0]) < port)


def _gone(monitor: Monitor, device: str) -> None:
    # What failed before is what matters; a guest that is gone lets nothing go.
    with suppress(HutchError):
        device_del(monitor, device)
