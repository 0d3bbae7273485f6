"""What the guest's agent is to do before the program runs: disks, network, files, identity."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from hutch.drivers.base import Launch
from hutch.drivers.vm.volumes import volume_setup
from hutch.network.model import Endpoint
from hutch.plan import guest
from hutch.plan.vm import GUEST_CGROUP, GUEST_FILES, GUEST_ROOT

__all__ = ["ROOT_SERIAL", "WRITABLE_LINK", "WRITABLE_PATH", "WRITABLE_SERIAL", "bare_setup"]
__all__ += ["default_routes", "interface_setup", "interfaces", "late_setup", "load_network"]
__all__ += ["image_setup", "machine_setup", "parked_setup", "renewal", "setup_request"]

ROOT_SERIAL = "root"
WRITABLE_SERIAL = "writable"
WRITABLE_LINK = "/dev/disk-writable"
WRITABLE_PATH = "/hutch/rw"
_MODULES = "/lib/modules"
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOATIME = 1, 2, 4, 1024
_ROOT_NODE = "/dev/disk-root"
_ENTROPY = 64
_NETWORK = "virtio_net"
# What nearly every program of an image begins with: where it is looked for, its dynamic linker
# and C library, and a shell. Those of the common distributions.
_WARM = (
    *("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"),
    "/lib64/ld-linux-x86-64.so.2",
    "/lib/x86_64-linux-gnu/libc.so.6",
    "/lib64/libc.so.6",
    "/lib/ld-musl-x86_64.so.1",
    "/bin/sh",
)


def late_setup(modules: Sequence[str], *, nics: int, passed: bool = False) -> list[guest.SetupOp]:
    """Return what every guest of a kernel and a shape has before it becomes an instance's,
    and a template has done already: drivers, mount points, the control group.

    The drivers find their devices here. An instance's disks and cards are others behind the
    same devices, which the drivers notice no more than a changed disk: so what a device
    offers must be the same in a template and in its clones (see `placeholders`). With `passed`
    it has devices of the host, which may be network cards.
    """
    made = [_insmod(name) for name in modules if nics or passed or name != _NETWORK]
    for number in range(nics):
        name = f"eth{number}"  # as the kernel calls them
        made.append(guest.Interface(index=number, name=name))
        made.append(_ipv6(name, on=False))
    made += [
        guest.Disk(serial=ROOT_SERIAL, link=_ROOT_NODE),
        guest.Disk(serial=WRITABLE_SERIAL, link=WRITABLE_LINK),
    ]
    made += [
        guest.Mkdir(path=path, mode=0o755)
        for path in ("/hutch/image", WRITABLE_PATH, GUEST_ROOT, GUEST_FILES)
    ]
    made.append(guest.Cgroup(path=GUEST_CGROUP, lines=""))
    made.append(guest.LinkUp(interface="lo"))
    return made


def _insmod(name: str) -> guest.SetupOp:
    return guest.Insmod(path=f"{_MODULES}/{name}.ko", params="")


def _ipv6(interface: str, *, on: bool) -> guest.SetupOp:
    """As with Docker an interface without an address of IPv6 does not speak it: its
    link-local address alone is a third of what it takes to bring a card up."""
    return guest.Sysctl(key=f"net/ipv6/conf/{interface}/disable_ipv6", value="0" if on else "1")


def renewal() -> list[guest.SetupOp]:
    """Return what makes a clone another machine than its template: entropy and clock."""
    now = time.time_ns()
    return [
        guest.Entropy(data=os.urandom(_ENTROPY)),
        guest.Clock(seconds=now // 10**9, nanoseconds=now % 10**9),
    ]


def machine_setup(
    launch: Launch,
    *,
    modules: Sequence[str],
    resumed: bool,
    files: Sequence[tuple[str, bytes]],
    shares: Sequence[tuple[str, str]] = (),
) -> list[guest.SetupOp]:
    """Return the operations in order. `files` are names beneath `GUEST_FILES` with their
    contents, `shares` tags of shared directories with their mount points."""
    made: list[guest.SetupOp] = renewal()
    if not resumed:
        passed = bool(launch.host_devices)
        made += late_setup(modules, nics=len(launch.endpoints), passed=passed)
    made += _disks(volatile=launch.volatile)
    made += volume_setup(launch)
    made += _limits(launch)
    made.append(guest.Hostname(name=launch.spec.hostname or launch.name))
    made += [
        guest.WriteFile(path=f"{GUEST_FILES}/{name}", mode=0o644, content=content)
        for name, content in files
    ]
    made += [
        guest.Mount(source=tag, target=path, fstype="virtiofs", flags=0, data="")
        for tag, path in shares
    ]
    return made + interfaces(launch.endpoints)


def bare_setup(launch: Launch, *, modules: Sequence[str], resumed: bool) -> list[guest.SetupOp]:
    """Return what shows the agent's helper for files the root that a program would have."""
    made: list[guest.SetupOp] = renewal()
    if not resumed:
        made += late_setup(modules, nics=0)
    return made + _disks(volatile=launch.volatile)


def image_setup(*, volatile: bool, files: Sequence[str], nics: int) -> list[guest.SetupOp]:
    """Return what a template of an image has: its disks mounted, and in the place of the
    files of ours empty ones, which the launch mounts where the program looks for them."""
    return [
        *renewal(),
        *_disks(volatile=volatile),
        guest.Hostname(name="hutch"),  # how the agent gets back from a name space is known then
        *(guest.Warm(path=path) for path in _WARM),
        # A line, so that they have the page that their content will be in.
        *(
            guest.WriteFile(path=f"{GUEST_FILES}/{name}", mode=0o644, content=b"\n")
            for name in files
        ),
        # Looked up once more, now that no device is about to come; and up, which a card can be
        # while it gets another MAC. It has no address yet, so nothing is sent from this one.
        *(guest.Interface(index=number, name=f"eth{number}") for number in range(nics)),
        *(guest.LinkUp(interface=f"eth{number}") for number in range(nics)),
    ]


def parked_setup(
    launch: Launch, files: Sequence[tuple[str, bytes]], *, hostname: str = ""
) -> list[guest.SetupOp]:
    """Return what makes a clone of such a template the instance's machine. Without `hostname`
    the rest of the launch sets it: nobody else sees one."""
    return [
        *renewal(),
        *_limits(launch),
        *([guest.Hostname(name=hostname)] if hostname else []),
        *(guest.Rewrite(path=f"{GUEST_FILES}/{name}", content=content) for name, content in files),
        *interfaces(launch.endpoints),
    ]


def _limits(launch: Launch) -> list[guest.SetupOp]:
    if not launch.spec.resources.pids:
        return []
    return [guest.Cgroup(path=GUEST_CGROUP, lines=f"pids.max={launch.spec.resources.pids}")]


def _disks(*, volatile: bool) -> list[guest.SetupOp]:
    # A new disk is a file of zeros: there is nothing to initialize behind the guest's back, and
    # what its threads read would be read in every start.
    # What a program removes goes back to the host: it cannot trim, as its root is an overlay.
    options = "noinit_itable,no_prefetch_block_bitmaps,discard"
    if volatile:
        options += ",nobarrier"
    overlay = ["lowerdir=/hutch/image", "upperdir=/hutch/rw/upper", "workdir=/hutch/rw/work"]
    if volatile:
        overlay.append("volatile")
    return [
        guest.Mount(
            source=_ROOT_NODE,
            target="/hutch/image",
            fstype="erofs",
            flags=_MS_RDONLY | _MS_NODEV,
            data="",
        ),
        guest.Mount(
            source=WRITABLE_LINK,
            target=WRITABLE_PATH,
            fstype="ext4",
            flags=_MS_NODEV | _MS_NOATIME,
            data=options,
        ),
        # Here and not by the launcher, which on kernels before 6.8 needs a process and a
        # mount namespace of their own for it.
        guest.Mount(
            source="overlay", target=GUEST_ROOT, fstype="overlay", flags=0, data=",".join(overlay)
        ),
    ]


def interfaces(endpoints: Sequence[Endpoint]) -> list[guest.SetupOp]:
    """Return what gives the cards, in order, their names, addresses and routes."""
    made: list[guest.SetupOp] = []
    for number, endpoint in enumerate(endpoints):
        made += interface_setup(number, endpoint)
    return made


def load_network(modules: Sequence[str]) -> list[guest.SetupOp]:
    """Return what loads the driver of network cards, where it is a module."""
    return [_insmod(name) for name in modules if name == _NETWORK]


def interface_setup(number: int, endpoint: Endpoint) -> list[guest.SetupOp]:
    """Return what names, addresses and routes the guest's network card of that number."""
    from hutch.network.addresses import parse_address, parse_mac

    name = endpoint.interface
    mac = parse_mac(endpoint.mac, field="mac") if endpoint.mac else b""
    made: list[guest.SetupOp] = [
        guest.Interface(index=number, name=name, mac=mac, mtu=endpoint.mtu)
    ]
    if any(":" in entry.address for entry in endpoint.addresses):
        made.append(_ipv6(name, on=True))
    for entry in endpoint.addresses:
        address = parse_address(entry.address, field="address")
        made.append(guest.Address(interface=name, address=address, prefix=entry.prefix))
    made.append(guest.LinkUp(interface=name))
    if endpoint.default_route:
        made += default_routes(endpoint)
    return made


def default_routes(endpoint: Endpoint) -> list[guest.SetupOp]:
    """Return what makes the endpoint's gateways the default ones."""
    from hutch.network.addresses import parse_address

    gateways = [parse_address(entry.gateway, field="gateway") for entry in endpoint.addresses]
    first = {len(gateway): gateway for gateway in reversed(gateways)}
    return [
        guest.Route(interface=endpoint.interface, gateway=gateway) for gateway in first.values()
    ]


def setup_request(operations: Sequence[guest.SetupOp]) -> bytes:
    """Return the whole call that carries the operations out."""
    return guest.encode_call(guest.Call.SETUP, guest.encode_setup(operations))
