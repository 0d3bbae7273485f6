"""`serve`: the daemon that speaks Docker's API."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from hutch.cli.command import Command
from hutch.cli.session import Invocation

if TYPE_CHECKING:
    from hutch.daemon.config import DaemonConfig

__all__ = ["COMMANDS"]

_CONFIG = "/etc/hutch/daemon.json"


def _serve(invocation: Invocation) -> int:
    from hutch.daemon.config import load_config, merge
    from hutch.daemon.server import run_daemon
    from hutch.engine import Engine

    values = invocation.options
    path = values.get("config_file") or _CONFIG

    def read() -> DaemonConfig:
        config = load_config(path, must_exist=bool(values.get("config_file")))
        return merge(config, **given)

    given = {
        "hosts": tuple(values.get("docker") or ()),
        "group": values.get("group"),
        "debug": invocation.flag("debug"),
        "log_level": values.get("log_level"),
        "metrics_addr": values.get("metrics_addr"),
        "pidfile": values.get("pidfile"),
        "tls": invocation.flag("tls"),
        "tlsverify": invocation.flag("tlsverify"),
        "tlscacert": values.get("tlscacert"),
        "tlscert": values.get("tlscert"),
        "tlskey": values.get("tlskey"),
    }
    config = read()
    if invocation.flag("validate"):
        config.check()
        from hutch.cli.output import show_result

        return show_result(invocation, "configuration OK", Config=path, NoEffect=config.idle)
    with Engine(invocation.root or config.data_root or None) as engine:
        insecure = invocation.flag("insecure_tcp")
        with engine.jobs.dispatching() if invocation.flag("jobs") else nullcontext():
            return run_daemon(engine, config, insecure=insecure, reload=read)


COMMANDS = {
    "serve": Command(
        handler=_serve,
        summary="Serve Docker's API, for docker, Compose and all that speaks to dockerd.",
        options=(
            ("docker", "", "list", "URL", "unix://PATH, tcp://HOST:PORT or fd:// (several)"),
            ("config-file", "", "text", "FILE", f"Read Docker's daemon.json keys ({_CONFIG})"),
            ("debug", "", "flag", "", "Log every request"),
            ("group", "", "text", "GROUP", "Who may use the unix socket (docker, else hutch)"),
            ("jobs", "", "flag", "", "Be the dispatcher of this root's jobs too"),
            ("insecure-tcp", "", "flag", "", "Listen on TCP without client certificates"),
            ("log-level", "", "text", "LEVEL", "debug, info, warn, error or fatal"),
            ("metrics-addr", "", "text", "HOST:PORT", "Serve metrics for Prometheus there too"),
            ("pidfile", "", "text", "FILE", "Write the process id there"),
            ("tls", "", "flag", "", "Use TLS on TCP, without asking for client certificates"),
            ("tlsverify", "", "flag", "", "Use TLS on TCP, for clients with a certificate"),
            ("tlscacert", "", "text", "FILE", "Who signs the clients' certificates"),
            ("tlscert", "", "text", "FILE", "The server's certificate"),
            ("tlskey", "", "text", "FILE", "The server's key"),
            ("validate", "", "flag", "", "Check the configuration, and end"),
        ),
        examples=(
            "hutch serve --docker unix:///run/hutch.sock",
            "docker -H unix:///run/hutch.sock run --rm busybox true",
        ),
        epilog="Who may use the socket can do what the user that serves it can.",
    ),
}
