"""Run the daemon: listen, serve, end on a signal with all that was begun brought to its end."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from hutch.api.docker import Front, metrics, serve_client
from hutch.api.docker.routing import Router
from hutch.daemon.listen import Listener, Tls, metrics_listener, open_listeners
from hutch.errors import Busy, HutchError, InvalidArgument

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter

    from hutch.daemon.config import DaemonConfig
    from hutch.engine import Engine

__all__ = ["run_daemon"]

Reload = Callable[[], "DaemonConfig"]

_BUFFER = 256 << 10
_DESCRIPTORS = 65_536
_LEVELS = ("debug", "info", "warn", "error", "fatal")


def run_daemon(engine: Engine, config: DaemonConfig, *, insecure: bool, reload: Reload) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code. Instances go on unless the
    configuration has `live-restore` false. At SIGHUP `reload` reads the configuration anew."""
    _start_log(config)
    log = logging.getLogger("hutch.daemon")
    _allow_clients()
    with ExitStack() as stack:
        _hold_root(stack, engine)
        apply(engine, config)
        listeners = _listeners(config, insecure)
        for listener in listeners:
            stack.callback(listener.close)
        if config.pidfile:
            _write_pidfile(stack, config.pidfile)
        for listener in listeners:
            log.info("API listen on %s", listener.address)
        asyncio.run(_Server(engine, config, reload).run(listeners))
    log.info("ended")
    return 0


def _allow_clients() -> None:
    """Have room for the descriptors of many clients, two for each that is attached. What is
    started here has the same limit unless it asks for another, as with Docker."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def apply(engine: Engine, config: DaemonConfig) -> None:
    """Tell the engine what the configuration says of registries, proxies and networks."""
    from hutch.daemon.docker_keys import IDLE

    log = logging.getLogger("hutch.daemon")
    registry, choices = config.registry(engine.context.read_registry()), config.network_choices()
    environment = config.environment()
    if not engine.context.rootless and not engine.context.networks.configure(choices):
        log.warning("the default network stays as it was: it is in use")
    engine.context.registry = registry
    os.environ.update(environment)
    for key in config.idle:
        log.warning("%s of the configuration has no effect: %s", key, IDLE[key])


def _start_log(config: DaemonConfig) -> None:
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    _set_level(config)


def _set_level(config: DaemonConfig) -> None:
    if config.log_level not in _LEVELS:
        raise InvalidArgument(
            f"expected one of {', '.join(_LEVELS)}, got {config.log_level[:20]!r}",
            field="log-level",
        )
    level = "debug" if config.debug else config.log_level.replace("warn", "warning")
    logging.getLogger().setLevel(level.upper() if level != "fatal" else logging.CRITICAL)


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
        if config.metrics_addr:
            found.append(metrics_listener(config.metrics_addr))
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


class _Server:
    """The front with its sockets, in the event loop."""

    def __init__(self, engine: Engine, config: DaemonConfig, reload: Reload) -> None:
        self._config = config
        self._reload = reload
        self._front = Front(engine, config.front_options())
        self._clients: set[asyncio.Task[None]] = set()

    async def run(self, listeners: list[Listener]) -> None:
        """Serve until a signal ends it."""
        ending = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ending.set)
        loop.add_signal_handler(signal.SIGHUP, self._reconfigure)
        provider = self._start_tracing()
        await self._front.start()
        servers = [await self._listen(listener) for listener in listeners]
        notify("READY=1")
        await ending.wait()
        notify("STOPPING=1")
        for server in servers:
            server.close()
        await self._finish()
        if provider is not None:
            await asyncio.to_thread(provider.shutdown)

    async def _listen(self, listener: Listener) -> asyncio.Server:
        async def serve(reader: StreamReader, writer: StreamWriter) -> None:
            await self._client(listener, reader, writer)

        if listener.socket.family == socket.AF_UNIX:
            return await asyncio.start_unix_server(serve, sock=listener.socket, limit=_BUFFER)
        return await asyncio.start_server(
            serve, sock=listener.socket, limit=_BUFFER, ssl=listener.tls
        )

    async def _client(self, listener: Listener, reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        if listener.socket.family != socket.AF_UNIX:
            _keep_alive(writer)
        router = Router(metrics.ROUTES) if listener.metrics_only else None
        try:
            await serve_client(self._front, reader, writer, router)
        except asyncio.CancelledError:
            pass  # the daemon ends
        finally:
            self._clients.discard(task)

    def _start_tracing(self) -> Any:
        from hutch.daemon import tracing

        if not tracing.is_configured():
            return None
        provider = tracing.load_provider()
        self._front.observers.append(tracing.tracer_of(provider))
        return provider

    def _reconfigure(self) -> None:
        """Read the configuration anew: what does not need a restart is changed."""
        try:
            config = self._reload()
            options = config.front_options()
            apply(self._front.engine, config)
            _set_level(config)
        except HutchError as exc:
            self._front.log.error("the configuration stays as it was: %s", exc)
            return
        self._front.options = options
        self._front.log.info("the configuration was read anew")

    async def _finish(self) -> None:
        await self._front.finish()
        for task in list(self._clients):
            task.cancel()
        if self._clients:
            await asyncio.wait(list(self._clients), timeout=self._config.shutdown_timeout)
        await self._front.close()


def _keep_alive(writer: StreamWriter) -> None:
    """Notice a client whose host is gone, while there is nothing to send to it."""
    sock = writer.get_extra_info("socket")
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ):
        sock.setsockopt(level, option, value)
