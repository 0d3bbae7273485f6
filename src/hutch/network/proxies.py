"""Hold published ports for as long as their instance lives, and relay what the kernel cannot.

One `hutch-proxy` per endpoint with ports listens on them, so that no process of the host takes
one meanwhile. IPv4 is redirected before it gets there; what gets there is IPv6 for `[::1]`,
or for an instance without an IPv6 address. It ends with the instance's process; the record
lock that it has on its file tells who it is, so no stored process id is ever trusted.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

from hutch.errors import Busy, InternalError, Unsupported
from hutch.ids import short_id
from hutch.network.model import Endpoint, PublishedPort

__all__ = ["PortProxies", "bindings", "proxy_path"]

_TAKEN = 3
_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5.0
_PREFIX = "proxy-"
_DNS_PORT = 53


def proxy_path() -> str:
    """Return where the package keeps the proxy's binary."""
    return os.path.join(os.path.dirname(os.path.dirname(__file__)), "_native", "hutch-proxy")


def bindings(port: PublishedPort) -> tuple[str, ...]:
    """Return the addresses of this host on which a published port is held.

    Port 53 of every address is not: the name servers of the networks, and often one of the
    host's, have it on addresses of their own.
    """
    if port.host_port == _DNS_PORT and port.host_ip in ("", "0.0.0.0", "::"):
        return ()
    if port.host_ip:
        return (port.host_ip,)
    return ("0.0.0.0", "::") if os.path.exists("/proc/net/if_inet6") else ("0.0.0.0",)


def _mappings(endpoint: Endpoint) -> Iterator[str]:
    """Yield the arguments of the proxy (the format is in native/proxy/main.c)."""
    for port in endpoint.ports:
        for address in bindings(port):
            same, other = endpoint.ipv4, endpoint.ipv6
            if ":" in address:
                same, other = other, same
            host = f"{port.protocol},{address},{port.host_port}"
            yield f"{host},{same or other},{port.container_port}"


class PortProxies:
    """The proxies of one root; each belongs to one endpoint."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def start(self, endpoint: Endpoint, pid: int) -> None:
        """Hold the endpoint's ports until process `pid` ends; `Busy` where one is taken."""
        mappings = list(_mappings(endpoint))
        if not mappings:
            return
        from hutch.process.run import run_command

        program = proxy_path()
        if not os.path.exists(program):
            raise Unsupported(
                f"the port proxy is missing: {program}",
                hint="build it with `make -C native install`, or install the package",
            )
        owner = os.pidfd_open(pid)
        try:
            argv = [program, "-l", str(self._path(endpoint.id)), "-o", str(owner), *mappings]
            done = run_command(argv, timeout_s=_START_TIMEOUT_S, pass_fds=[owner])
        finally:
            os.close(owner)
        if done.returncode == 0:
            return
        self._path(endpoint.id).unlink(missing_ok=True)
        text = done.stderr.decode(errors="replace").strip() or f"status {done.returncode}"
        raise _refused(done.returncode, text, endpoint)

    def stop(self, endpoint_id: str) -> None:
        """Give an endpoint's ports back; those that are not held are fine."""
        path = self._path(endpoint_id)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return
        try:
            _end_holder(fd, path)
        finally:
            os.close(fd)
        path.unlink(missing_ok=True)

    def known(self) -> list[str]:
        """Return the ids of the endpoints whose ports are held, or were."""
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return []
        return [name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX)]

    def _path(self, endpoint_id: str) -> Path:
        return self._directory / f"{_PREFIX}{endpoint_id}"


def _refused(status: int, text: str, endpoint: Endpoint) -> Exception:
    if status != _TAKEN:
        return InternalError(f"instance {short_id(endpoint.instance_id)}: {text}")
    # hutch-proxy: tcp,0.0.0.0,8080,172.17.0.2,80: Address already in use
    fields = text.removeprefix("hutch-proxy: ").split(",")
    shown = f"{fields[1]} port {fields[2]}/{fields[0]}" if len(fields) > 2 else text
    reason = text.rpartition(": ")[2]
    return Busy(f"ports: {shown} cannot be held: {reason.lower()}")


def _end_holder(fd: int, path: Path) -> None:
    """End the process that has the record lock of a file."""
    from hutch.linux.locks import lock_holder
    from hutch.linux.pidfd import pidfd_send_signal, wait_pidfd

    while pid := lock_holder(fd):
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            # Only now it is sure that the descriptor is the holder's.
            if lock_holder(fd) != pid:
                continue
            pidfd_send_signal(pidfd, signal.SIGTERM)
            if not wait_pidfd(pidfd, _STOP_TIMEOUT_S):
                raise Busy(f"the port proxy of {path.name} does not end")
        except ProcessLookupError:
            continue
        finally:
            os.close(pidfd)
