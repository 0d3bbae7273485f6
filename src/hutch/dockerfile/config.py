"""What instructions make of an image's configuration, in Docker's spelling (JSON)."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping
from typing import Any

from hutch.dockerfile import model
from hutch.dockerfile.scopes import Scope, check_pairs
from hutch.dockerfile.source import SourceError
from hutch.dockerfile.words import expand_words
from hutch.errors import InvalidArgument
from hutch.spec.signals import parse_signal

__all__ = ["SHELL", "apply", "environment", "shell_of", "workdir_of"]

Config = dict[str, Any]
SHELL = ("/bin/sh", "-c")
_PROTOCOLS = ("tcp", "udp", "sctp")


def environment(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables of a configuration."""
    found: dict[str, str] = {}
    for entry in config.get("Env") or []:
        name, _, value = entry.partition("=")
        found[name] = value
    return found


def shell_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the shell that runs commands that are not lists."""
    return tuple(config.get("Shell") or SHELL)


def workdir_of(config: Mapping[str, Any]) -> str:
    """Return the directory that relative paths count from."""
    return "/" + str(config.get("WorkingDir") or "/").lstrip("/")


def apply(config: Config, instruction: model.Instruction, scope: Scope, escape: str) -> str:
    """Change `config` as an instruction says; return its line of the history.

    `scope` gives and takes variables. Nothing happens, and "" comes back, for those that
    change more than the configuration (FROM, RUN, COPY, ADD).
    """
    effect = _EFFECTS.get(type(instruction))
    return effect(config, instruction, scope, escape) if effect is not None else ""


def _env(config: Config, it: model.Env, scope: Scope, escape: str) -> str:
    pairs = {scope.expand(name): scope.expand(value) for name, value in it.pairs}
    check_pairs(pairs, "ENV")
    merged = {**environment(config), **pairs}
    config["Env"] = [f"{name}={value}" for name, value in merged.items()]
    scope.env.update(pairs)
    return "ENV " + " ".join(f"{name}={value}" for name, value in pairs.items())


def _label(config: Config, it: model.Label, scope: Scope, escape: str) -> str:
    pairs = {scope.expand(name): scope.expand(value) for name, value in it.pairs}
    if "" in pairs:
        raise SourceError("LABEL: a name is empty")
    config["Labels"] = {**(config.get("Labels") or {}), **pairs}
    return "LABEL " + " ".join(f"{name}={value}" for name, value in pairs.items())


def _arg(config: Config, it: model.Arg, scope: Scope, escape: str) -> str:
    found = scope.declare(it)
    return "ARG " + " ".join(n if v is None else f"{n}={v}" for n, v in found.items())


def _user(config: Config, it: model.User, scope: Scope, escape: str) -> str:
    from hutch.spec.process import check_user

    user = scope.expand(it.user)
    if not user:
        raise SourceError("USER: the name is empty")
    try:
        check_user(user, "USER")
    except InvalidArgument as error:
        raise SourceError(error.message, hint=error.hint) from None
    config["User"] = user
    return f"USER {user}"


def _workdir(config: Config, it: model.Workdir, scope: Scope, escape: str) -> str:
    path = scope.expand(it.path)
    if not path or "\0" in path:
        raise SourceError("WORKDIR: the path is empty")
    joined = posixpath.normpath(posixpath.join(workdir_of(config), path))
    config["WorkingDir"] = "/" + joined.lstrip("/")
    return f"WORKDIR {config['WorkingDir']}"


def _expose(config: Config, it: model.Expose, scope: Scope, escape: str) -> str:
    ports = dict(config.get("ExposedPorts") or {})
    words = [
        word for text in it.ports for word in expand_words(text, scope.variables, escape=escape)
    ]
    for word in words:
        ports.update((port, {}) for port in _ports(word))
    config["ExposedPorts"] = dict(sorted(ports.items()))
    return "EXPOSE " + " ".join(words)


def _ports(word: str) -> list[str]:
    """Return the ports of `80`, `80/udp` or `8000-8010/tcp`."""
    # Docker takes HOST:CONTAINER here too, and ignores the host's.
    number, slash, protocol = word.rpartition(":")[2].partition("/")
    low, dash, high = number.partition("-")
    bounds = [low, high] if dash else [low, low]
    if not all(b.isascii() and b.isdigit() and len(b) < 6 for b in bounds):
        raise SourceError(f"EXPOSE: expected a port, got {word[:40]!r}")
    first, last = int(bounds[0]), int(bounds[1])
    if not 1 <= first <= last <= 65535:
        raise SourceError(f"EXPOSE: port out of range: {word[:40]!r}")
    name = protocol.lower() if slash else "tcp"
    if name not in _PROTOCOLS:
        raise SourceError(f"EXPOSE: expected tcp, udp or sctp, got {word[:40]!r}")
    return [f"{port}/{name}" for port in range(first, last + 1)]


def _volume(config: Config, it: model.Volume, scope: Scope, escape: str) -> str:
    paths = [scope.expand(path) for path in it.paths]
    base = workdir_of(config)
    absolute = [posixpath.normpath(posixpath.join(base, path)) for path in paths]
    if not all(paths):
        raise SourceError("VOLUME: a path is empty")
    config["Volumes"] = {**(config.get("Volumes") or {}), **{path: {} for path in absolute}}
    return f"VOLUME [{' '.join(absolute)}]"


def _stop_signal(config: Config, it: model.StopSignal, scope: Scope, escape: str) -> str:
    signal = scope.expand(it.signal)
    try:
        parse_signal(signal, field="STOPSIGNAL")
    except InvalidArgument as error:
        raise SourceError(error.message, hint=error.hint) from None
    config["StopSignal"] = signal
    return f"STOPSIGNAL {signal}"


def _shell(config: Config, it: model.Shell, scope: Scope, escape: str) -> str:
    config["Shell"] = list(it.argv)
    return f"SHELL [{' '.join(it.argv)}]"


def _healthcheck(config: Config, it: model.Healthcheck, scope: Scope, escape: str) -> str:
    config["Healthcheck"] = {"Test": list(it.test), **dict(it.options)}
    return f"HEALTHCHECK {it.statement.text}"


def _onbuild(config: Config, it: model.OnBuild, scope: Scope, escape: str) -> str:
    config["OnBuild"] = [*(config.get("OnBuild") or []), it.trigger]
    return f"ONBUILD {it.trigger}"


def _command(config: Config, it: model.Command, scope: Scope, escape: str) -> str:
    argv = list(it.argv) if it.argv is not None else [*shell_of(config), it.line]
    key = "Cmd" if it.keyword == "CMD" else "Entrypoint"
    config[key] = argv or None
    if it.keyword == "ENTRYPOINT":
        # The base's command was meant for the base's entrypoint.
        if not scope.has_command:
            config.pop("Cmd", None)
    else:
        scope.has_command = True
    shown = " ".join(f'"{word}"' for word in argv)
    return f"{it.keyword} [{shown}]"


def _maintainer(config: Config, it: model.Maintainer, scope: Scope, escape: str) -> str:
    return f"MAINTAINER {it.name}"


_EFFECTS: dict[type[model.Instruction], Callable[..., str]] = {
    model.Arg: _arg,
    model.Command: _command,
    model.Env: _env,
    model.Expose: _expose,
    model.Healthcheck: _healthcheck,
    model.Label: _label,
    model.Maintainer: _maintainer,
    model.OnBuild: _onbuild,
    model.Shell: _shell,
    model.StopSignal: _stop_signal,
    model.User: _user,
    model.Volume: _volume,
    model.Workdir: _workdir,
}
