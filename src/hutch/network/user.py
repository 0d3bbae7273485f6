"""User-mode networking for instances without root: slirp4netns beside a network namespace.

A virtual machine has the same from its QEMU, and needs no program besides.

The program is found again by its socket in the instance's directory, and the process to end
by asking the kernel who listens on it (SO_PEERCRED), so no process id is ever trusted.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hutch.decoding import decode_json
from hutch.errors import Busy, InternalError, Unsupported
from hutch.network.model import Endpoint, EndpointAddress, PublishedPort
from hutch.network.ports import candidates, check_port_free, choose_port
from hutch.spec.model import PortMapping

if TYPE_CHECKING:
    import socket

__all__ = ["ADDRESS", "NAMESERVER", "machine_endpoint", "start", "stop", "unavailable"]
__all__ += ["load_endpoints", "save_endpoint", "user_endpoint"]

ADDRESS = "10.0.2.100"
MACHINE_ADDRESS = "10.0.2.15"
GATEWAY = "10.0.2.2"
NAMESERVER = "10.0.2.3"
_INTERFACE = "eth0"
_MTU = 65520
_SOCKET = "slirp.sock"
_RECORD = "endpoint.json"
_LOG = "slirp.log"
_TIMEOUT_S = 10.0
_ANSWER_MAX = 1 << 16


def unavailable() -> tuple[str, str] | None:
    """Return what user-mode networking lacks on this host and the cure, or None."""
    import shutil

    if shutil.which("slirp4netns") is None:
        return "slirp4netns is not installed", "install the package slirp4netns"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return (
            f"/dev/net/tun cannot be opened: {error.strerror}",
            "load the module tun, and let users open it: chmod 0666 /dev/net/tun",
        )
    return None


def user_endpoint(instance_id: str) -> Endpoint:
    """Return what /etc/hosts and inspection need to know of a user-mode instance."""
    return _endpoint(instance_id, ADDRESS)


def machine_endpoint(instance_id: str, ports: Sequence[PortMapping]) -> Endpoint:
    """Return the place of a virtual machine in the network that its QEMU makes for it.

    Ports of the host are checked, and chosen where they are 0; QEMU opens them.
    """
    published = tuple(
        _published(mapping, f"ports[{number}]") for number, mapping in enumerate(ports)
    )
    return _endpoint(instance_id, MACHINE_ADDRESS, published)


def _endpoint(instance_id: str, address: str, ports: tuple[PublishedPort, ...] = ()) -> Endpoint:
    return Endpoint(
        id=instance_id,
        network="user",
        network_id="",
        instance_id=instance_id,
        bridge="",
        interface=_INTERFACE,
        ifindex=0,
        host_interface="",
        mac="",
        addresses=(EndpointAddress(address=address, prefix=24, gateway=GATEWAY),),
        ports=ports,
        default_route=True,
    )


def save_endpoint(directory: Path, endpoint: Endpoint) -> None:
    """Note in an instance's run directory what it was given, for inspection."""
    import msgspec

    (directory / _RECORD).write_bytes(msgspec.json.encode(endpoint))


def load_endpoints(directory: Path) -> tuple[Endpoint, ...]:
    """Return what `save_endpoint` noted; empty where it did not."""
    import msgspec

    try:
        return (decode_json((directory / _RECORD).read_bytes(), Endpoint),)
    except (FileNotFoundError, msgspec.DecodeError):
        return ()


def start(
    pid: int, directory: Path, ports: Sequence[PortMapping] = (), *, host_loopback: bool = False
) -> tuple[PublishedPort, ...]:
    """Give the network namespace of `pid` an interface, configured, and publish its ports.

    The namespace's user namespace must be one the caller may join. The program outlives
    the caller; `stop` ends it. On failure nothing is left running. Raises `Unsupported`
    with the cure where the host cannot do it, `Busy` for a port that is taken.
    """
    missing = unavailable()
    if missing is not None:
        raise Unsupported(f"user-mode networking: {missing[0]}", hint=missing[1])
    stop(directory)
    try:
        _launch(pid, directory, host_loopback)
        return tuple(
            _publish(directory, mapping, f"ports[{number}]") for number, mapping in enumerate(ports)
        )
    except BaseException:
        stop(directory)
        raise


def _launch(pid: int, directory: Path, host_loopback: bool) -> None:
    """Start the program in a session of its own and wait until the interface is ready."""
    import select

    from hutch.process.run import spawn

    ready, done = os.pipe2(os.O_CLOEXEC)
    try:
        argv = ["setsid", "--fork", "slirp4netns", "--configure", f"--mtu={_MTU}"]
        argv += ["--enable-sandbox", "--enable-seccomp", f"--ready-fd={done}"]
        argv += [] if host_loopback else ["--disable-host-loopback"]
        # Relative to the working directory: a socket's path may have 107 bytes only.
        argv += [f"--api-socket={_SOCKET}", str(pid), _INTERFACE]
        with (
            open(directory / _LOG, "wb") as log,
            spawn(argv, stdout=log, stderr=log, cwd=str(directory), pass_fds=[done]) as process,
        ):
            process.wait(_TIMEOUT_S)
        os.close(done)
        done = -1
        if not select.select([ready], [], [], _TIMEOUT_S)[0] or os.read(ready, 1) != b"1":
            raise Unsupported(
                f"slirp4netns did not start: {_last_words(directory)}",
                hint=f"see {directory / _LOG}",
            )
    finally:
        os.close(ready)
        if done >= 0:
            os.close(done)


def _last_words(directory: Path) -> str:
    try:
        lines = (directory / _LOG).read_text(errors="replace").strip().splitlines()
    except OSError:
        return "it said nothing"
    return lines[-1] if lines else "it said nothing"


def _published(mapping: PortMapping, field: str) -> PublishedPort:
    """Return the port of the host that is to be opened, which nobody has now."""
    if mapping.protocol not in ("tcp", "udp"):
        raise Unsupported(f"{field}.protocol: {mapping.protocol!r} cannot be published")
    if ":" in mapping.host_ip:
        raise Unsupported(f"{field}.host_ip: user-mode networking publishes on IPv4 only")
    port = PublishedPort(
        container_port=mapping.container_port,
        host_port=mapping.host_port,
        host_ip=mapping.host_ip,
        protocol=mapping.protocol,
    )
    if port.host_port and not mapping.host_port_end:
        check_port_free(port, field=field)
        return port
    return choose_port(port, candidates(mapping))


def _publish(directory: Path, mapping: PortMapping, field: str) -> PublishedPort:
    port = _published(mapping, field)
    arguments = {
        "proto": port.protocol,
        "host_addr": port.host_ip or "0.0.0.0",
        "host_port": port.host_port,
        "guest_addr": ADDRESS,
        "guest_port": port.container_port,
    }
    answer = _ask(directory, {"execute": "add_hostfwd", "arguments": arguments})
    if "error" in answer:
        raise Busy(f"{field}: port {port.host_port} cannot be published: {answer['error']}")
    return port


def _connect(directory: Path) -> socket.socket:
    """Connect to the program's socket, reached through the directory's descriptor."""
    import socket

    handle = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_TIMEOUT_S)
        connection.connect(f"/proc/self/fd/{handle}/{_SOCKET}")
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(handle)
    return connection


def _ask(directory: Path, request: dict[str, object]) -> dict[str, object]:
    import socket

    import msgspec

    with _connect(directory) as connection:
        connection.sendall(msgspec.json.encode(request))
        connection.shutdown(socket.SHUT_WR)
        data = b""
        while len(data) < _ANSWER_MAX and (piece := connection.recv(4096)):
            data += piece
    try:
        return decode_json(data, dict[str, object])
    except msgspec.DecodeError as error:
        raise InternalError(f"slirp4netns answered {data[:80]!r}") from error


def stop(directory: Path) -> None:
    """End the program that serves from this directory, and wait for its end; none is fine."""
    import select
    import socket
    import struct

    try:
        with _connect(directory) as connection:
            raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            handle = os.pidfd_open(struct.unpack("=iII", raw)[0])
            try:
                # An open connection: the descriptor is of the process that listens.
                if not _is_hung_up(connection):
                    signal.pidfd_send_signal(handle, signal.SIGTERM)
                    if not select.select([handle], [], [], _TIMEOUT_S)[0]:
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                        select.select([handle], [], [], _TIMEOUT_S)
            finally:
                os.close(handle)
    except (FileNotFoundError, ConnectionRefusedError, ProcessLookupError):
        pass
    _forget(directory)


def _is_hung_up(connection: socket.socket) -> bool:
    import select

    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(0))


def _forget(directory: Path) -> None:
    for name in (_SOCKET, _LOG):
        (directory / name).unlink(missing_ok=True)
