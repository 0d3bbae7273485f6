"""Run the daemon: listen, serve, end on a signal with all that was begun brought to its end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from hutch.api.docker import Front, serve_client
from hutch.daemon.listen import Listener, Tls, open_listeners
from hutch.errors import Busy, InvalidArgument

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter

    from hutch.daemon.config import DaemonConfig
    from hutch.engine import Engine

__all__ = ["run_daemon"]

_BUFFER = 256 << 10
_LEVELS = ("debug", "info", "warn", "error", "fatal")


def run_daemon(engine: Engine, config: DaemonConfig, *, insecure: bool) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code. Instances go on unless the
    configuration has `live-restore` false."""
    _start_log(config)
    log = logging.getLogger("hutch.daemon")
    with ExitStack() as stack:
        _hold_root(stack, engine)
        listeners = _listeners(config, insecure)
        for listener in listeners:
            stack.callback(listener.close)
        if config.pidfile:
            _write_pidfile(stack, config.pidfile)
        for listener in listeners:
            log.info("API listen on %s", listener.address)
        asyncio.run(_serve(engine, config, listeners))
    log.info("ended")
    return 0


def _start_log(config: DaemonConfig) -> None:
    if config.log_level not in _LEVELS:
        raise InvalidArgument(
            f"expected one of {', '.join(_LEVELS)}, got {config.log_level[:20]!r}",
            field="log-level",
        )
    level = "debug" if config.debug else config.log_level.replace("warn", "warning")
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper() if level != "fatal" else logging.CRITICAL,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def _hold_root(stack: ExitStack, engine: Engine) -> None:
    """See that no other daemon serves the same root."""
    from hutch.linux.locks import lock_file

    try:
        stack.enter_context(lock_file(engine.root / "locks" / "daemon", timeout_s=0.0))
    except (Busy, TimeoutError) as exc:
        raise Busy(f"{engine.root}: another daemon serves this root") from exc


def _listeners(config: DaemonConfig, insecure: bool) -> list[Listener]:
    tls = None
    if config.tls or config.tlsverify:
        tls = Tls(
            ca=config.tlscacert,
            certificate=config.tlscert,
            key=config.tlskey,
            verify=config.tlsverify,
        )
    found: list[Listener] = []
    try:
        for host in config.hosts or ("unix:///var/run/docker.sock",):
            found += open_listeners(host, group=config.group, tls=tls, insecure=insecure)
    except BaseException:
        for listener in found:
            listener.close()
        raise
    return found


def _write_pidfile(stack: ExitStack, path: str) -> None:
    with open(path, "w") as file:
        file.write(f"{os.getpid()}\n")
    stack.callback(_remove, path)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def notify(state: str) -> None:
    """Tell the service manager, as sd_notify(3) does."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError:
            pass  # nobody listens: then nobody waits


async def _serve(engine: Engine, config: DaemonConfig, listeners: list[Listener]) -> None:
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    front = Front(engine, config.front_options())
    clients: set[asyncio.Task[None]] = set()

    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        clients.add(task)
        try:
            await serve_client(front, reader, writer)
        except asyncio.CancelledError:
            pass  # the daemon ends
        finally:
            clients.discard(task)

    await front.start()
    servers = [
        await asyncio.start_server(serve, sock=listener.socket, limit=_BUFFER, ssl=listener.tls)
        if listener.socket.family != socket.AF_UNIX
        else await asyncio.start_unix_server(serve, sock=listener.socket, limit=_BUFFER)
        for listener in listeners
    ]
    notify("READY=1")
    await ending.wait()
    notify("STOPPING=1")
    for server in servers:
        server.close()
    await front.finish()
    for task in list(clients):
        task.cancel()
    if clients:
        await asyncio.wait(list(clients), timeout=config.shutdown_timeout)
    await front.close()
