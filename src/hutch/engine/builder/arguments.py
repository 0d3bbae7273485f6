"""The arguments of `Engine.build`: their types, and the checked options they become."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from hutch.engine.builder.options import BuildOptions, Secret, parse_secret, parse_ssh
from hutch.errors import InvalidArgument
from hutch.image.registry_config import Credentials
from hutch.spec.parse import mapping, strings

__all__ = ["BuildArguments", "read_options"]

_LIMITS = frozenset(
    """cpu_period cpu_quota cpu_shares cpus cpuset_cpus cpuset_mems memory memory_swap shm_size
    ulimits pids_limit dns dns_search dns_options security_opt""".split()
)
_TEXTS = ("target", "platform", "network", "isolation")
_FLAGS = ("pull", "no_cache", "squash")
_LISTS = ("tags", "cache_from", "cache_to", "no_cache_filter")
_PAIRS = ("build_args", "labels", "contexts")


class BuildArguments(TypedDict, total=False):
    """All that may be asked of a build beside its context and Dockerfile.

    A secret is `{"name": bytes}`, or what `--secret` takes; `ssh` is what `--ssh` takes.
    `source_date_epoch` in seconds makes builds reproducible. `credentials` by registry
    (`docker.io`, `host:port`) go before those that are configured. The rest are limits of the
    commands, as `run` has them.
    """

    tags: str | Sequence[str] | None
    build_args: Mapping[str, object] | Sequence[str] | None
    labels: Mapping[str, object] | Sequence[str] | None
    contexts: Mapping[str, str] | Sequence[str] | None
    target: str | None
    platform: str | None
    network: str | None
    isolation: str | None
    add_host: Mapping[str, str] | Sequence[str] | str | None
    pull: bool | None
    no_cache: bool | None
    no_cache_filter: Sequence[str] | None
    squash: bool | None
    secrets: Mapping[str, bytes] | Sequence[str] | None
    ssh: Sequence[str] | str | None
    cache_from: Sequence[str] | str | None
    cache_to: Sequence[str] | str | None
    source_date_epoch: int | float | None
    parallel: int | None
    credentials: Mapping[str, Credentials] | None
    cpu_period: int | str | None
    cpu_quota: int | str | None
    cpu_shares: int | None
    cpus: float | str | None
    cpuset_cpus: str | None
    cpuset_mems: str | None
    dns: str | Sequence[str] | None
    dns_options: str | Sequence[str] | None
    dns_search: str | Sequence[str] | None
    memory: int | str | None
    memory_swap: int | str | None
    pids_limit: int | None
    security_opt: Sequence[str] | None
    shm_size: int | str | None
    ulimits: Sequence[str] | None


def read_options(dockerfile: str | None, given: Mapping[str, Any]) -> BuildOptions:
    """Return the options; raise `InvalidArgument` naming the one that is wrong."""
    values: dict[str, Any] = {"dockerfile": dockerfile or ""}
    limits: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in _LIMITS:
            limits[name] = value
        elif name in _TEXTS:
            values[name] = _text(value, name)
        elif name in _FLAGS:
            values[name] = bool(value)
        elif name in _LISTS:
            values[name] = strings([value] if isinstance(value, str) else value, name)
        elif name in _PAIRS:
            values[name] = _pairs(value, name)
        else:
            values.update(_others(name, value))
    return BuildOptions(run=limits, **values)


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(f"expected a text, got {type(value).__name__}", field=field)
    return value


def _pairs(value: object, field: str) -> dict[str, str]:
    """Read NAME=VALUE; a build argument without a value has that of the environment."""
    if isinstance(value, Mapping):
        return {str(name): str(content) for name, content in value.items()}
    found: dict[str, str] = {}
    for text in strings(value, field):
        name, equals, content = text.partition("=")
        if not equals and field == "build_args":
            if name in os.environ:
                found[name] = os.environ[name]
            continue
        found[name] = content
    return found


def _others(name: str, value: Any) -> dict[str, Any]:
    match name:
        case "secrets":
            return {"secrets": _secrets(value)}
        case "ssh":
            texts = [value] if isinstance(value, str) else value
            return {"ssh": dict(parse_ssh(text) for text in texts)}
        case "add_host":
            if isinstance(value, Mapping):
                pairs = [f"{host}:{ip}" for host, ip in mapping(value, name).items()]
                return {"add_hosts": tuple(pairs)}
            return {"add_hosts": strings([value] if isinstance(value, str) else value, name)}
        case "source_date_epoch":
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InvalidArgument(f"expected seconds, got {value!r}", field=name)
            return {"epoch_s": float(value)}
        case "credentials":
            return {"credentials": _credentials(value)}
        case "parallel":
            if not isinstance(value, int) or not 1 <= value <= 64:
                raise InvalidArgument(f"expected 1 to 64, got {value!r}", field=name)
            return {"parallel": value}
    from difflib import get_close_matches

    near = get_close_matches(name, BuildArguments.__annotations__, 1)
    raise InvalidArgument(
        "no such option", field=name, hint=f"did you mean {near[0]}?" if near else None
    )


def _credentials(value: Any) -> dict[str, Credentials]:
    found = dict(value)
    for registry, one in found.items():
        if not isinstance(one, Credentials):
            raise InvalidArgument(
                f"expected Credentials, got {type(one).__name__}",
                field=f"credentials[{str(registry)!r}]",
            )
    return found


def _secrets(value: Any) -> dict[str, Secret]:
    if not isinstance(value, Mapping):
        return dict(parse_secret(text) for text in value)
    found = {}
    for name, content in value.items():
        if isinstance(content, Secret):
            found[str(name)] = content
        elif isinstance(content, bytes | bytearray):
            found[str(name)] = Secret(value=bytes(content))
        else:
            raise InvalidArgument(
                f"expected bytes, got {type(content).__name__}", field=f"secrets[{str(name)!r}]"
            )
    return found
