"""Network namespaces that stand for the host, for instances and for a machine outside.

A test's own thread moves into the namespace of its "host", so that sockets and programs it
starts are there, and nothing touches the machine's own networks.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hutch.ids import new_id
from hutch.linux import rtnetlink
from hutch.linux.namespaces import CLONE_NEWNET, new_namespace_fd, thread_in_namespace
from hutch.linux.rtnetlink import RouteSocket
from hutch.network import Endpoint, Networks, netns
from hutch.spec.model import NetworkAttachment, PortMapping
from hutch.store.database import Store

TIMEOUT_S = 60.0


class Box:
    """A process in a network namespace of its own."""

    def __init__(self, stack: ExitStack) -> None:
        self._fd = new_namespace_fd(CLONE_NEWNET)
        stack.callback(os.close, self._fd)
        with self.inside():
            self._process = stack.enter_context(
                subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            )
            with RouteSocket() as route:
                route.request(rtnetlink.set_link(1, up=True))
        stack.callback(self._process.kill)
        self.pid = self._process.pid
        self.id = new_id()
        self.endpoints: list[Endpoint] = []

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Run the block's socket calls and programs in this namespace."""
        with thread_in_namespace(self._fd, CLONE_NEWNET):
            yield

    @property
    def ipv4(self) -> str:
        return self.endpoints[0].ipv4

    def listen(self, port: int, kind: int = socket.SOCK_STREAM, host: str = "") -> socket.socket:
        """Return a listening (or, for UDP, bound) socket inside."""
        with self.inside():
            return listener(host, port, kind)

    def connect(self, host: str, port: int) -> socket.socket:
        """Return a connection made from inside."""
        with self.inside():
            return socket.create_connection((host, port), timeout=TIMEOUT_S)

    def run(self, *argv: str) -> str:
        """Run a program inside; return its output."""
        with self.inside():
            return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def listener(host: str, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """Return a socket that waits for connections or datagrams."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
    made.settimeout(TIMEOUT_S)
    if kind == socket.SOCK_STREAM:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((host, port))
    if kind == socket.SOCK_STREAM:
        made.listen()
    return made


def meets(server: socket.socket, client: socket.socket) -> str:
    """Check that a connection leads to this server; return the client's address as seen there."""
    with client, server.accept()[0] as accepted:
        accepted.settimeout(TIMEOUT_S)
        client.sendall(b"ping")
        assert accepted.recv(4) == b"ping"
        accepted.sendall(b"pong")
        assert client.recv(4) == b"pong"
        return str(accepted.getpeername()[0])


class Lab:
    """A host with hutch's networks, instances on them, and a machine outside."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self._stack = stack
        self.root = root
        self.store = Store.open(root / "hutch.db")
        stack.callback(self.store.close)
        self.networks = Networks(root, self.store)
        with RouteSocket() as route:
            route.request(rtnetlink.set_link(1, up=True))

    def box(self) -> Box:
        """Make a namespace with nothing in it."""
        return Box(self._stack)

    def start(
        self,
        *attachments: str | NetworkAttachment,
        name: str = "",
        ports: Sequence[PortMapping] = (),
        dns: Sequence[str] = (),
        box: Box | None = None,
    ) -> Box:
        """Make an instance on these networks (on the default one when none is named)."""
        box = box or self.box()
        wanted = [
            NetworkAttachment(name=item) if isinstance(item, str) else item
            for item in attachments or ("bridge",)
        ]
        box.endpoints = self.networks.prepare(box.id, wanted, name=name, ports=ports, dns=dns)
        for endpoint in box.endpoints:
            self.networks.attach(endpoint, box.pid)
        return box

    def outside(self) -> Box:
        """Make a machine outside, 203.0.113.2, that sends all it has to this host, 203.0.113.1."""
        box = self.box()
        message = rtnetlink.add_veth("uplink", "eth0", netns_pid=box.pid, index=900, peer_index=64)
        with RouteSocket() as route:
            route.request(message, *_addressed(900, "203.0.113.1"))
        gateway = socket.inet_aton("203.0.113.1")
        messages = (*_addressed(64, "203.0.113.2"), rtnetlink.add_route(gateway=gateway, index=64))
        netns.configure(box.pid, messages)
        return box


def _addressed(index: int, address: str) -> tuple[bytes, bytes]:
    raw = socket.inet_aton(address)
    return rtnetlink.add_address(index, raw, 24), rtnetlink.set_link(index, up=True)
