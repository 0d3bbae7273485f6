"""The daemon's configuration: `daemon.json` with Docker's keys, and what the command line says."""

# Annotations are not postponed: msgspec would compile each of them when it first decodes.
import os
from pathlib import Path
from typing import Any

import msgspec

from hutch.api.docker import FrontOptions
from hutch.decoding import decode_json
from hutch.errors import InvalidArgument, NotFound

__all__ = ["KEYS", "DaemonConfig", "load_config", "merge"]

_MAX_FILE = 1 << 20


class DaemonConfig(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """What `daemon.json` may say. Keys that Docker has and hutch has not are refused."""

    hosts: tuple[str, ...] = ()
    group: str = ""
    data_root: str = ""
    debug: bool = False
    log_level: str = "info"
    labels: tuple[str, ...] = ()
    log_driver: str = "json-file"
    log_opts: dict[str, str] = {}
    default_ulimits: dict[str, dict[str, Any]] = {}
    default_shm_size: str | int = 0
    default_runtime: str = "hutch"
    init: bool = False
    dns: tuple[str, ...] = ()
    dns_opts: tuple[str, ...] = ()
    dns_search: tuple[str, ...] = ()
    live_restore: bool = True
    min_api_version: str = ""
    shutdown_timeout: int = 15
    metrics_addr: str = ""
    pidfile: str = ""
    tls: bool = False
    tlsverify: bool = False
    tlscacert: str = ""
    tlscert: str = ""
    tlskey: str = ""

    def front_options(self) -> FrontOptions:
        """Return what the API has to know of it."""
        from hutch.units import parse_bytes

        ulimits = tuple(
            f"{name}={limit.get('Soft', -1)}:{limit.get('Hard', -1)}"
            for name, limit in self.default_ulimits.items()
        )
        return FrontOptions(
            labels=self.labels,
            min_api_version=_oldest(self.min_api_version),
            log_driver=self.log_driver,
            log_opts=self.log_opts,
            default_ulimits=ulimits,
            default_shm_size=parse_bytes(self.default_shm_size, field="default-shm-size"),
            default_runtime=self.default_runtime,
            init=self.init,
            dns=self.dns,
            dns_options=self.dns_opts,
            dns_search=self.dns_search,
            live_restore=self.live_restore,
            shutdown_timeout_s=float(self.shutdown_timeout),
        )


def _oldest(text: str) -> tuple[int, int]:
    """Return the oldest version of the API that is spoken; Docker's variable says it too."""
    from hutch.api.docker.routing import ANCIENT, NEWEST, OLDEST, show

    text = text or os.environ.get("DOCKER_MIN_API_VERSION", "")
    if not text:
        return OLDEST
    major, _, minor = text.partition(".")
    if (
        len(text) < 8
        and text.isascii()
        and major.isdigit()
        and minor.isdigit()
        and ANCIENT <= (found := (int(major), int(minor))) <= NEWEST
    ):
        return found
    raise InvalidArgument(
        f"expected {show(ANCIENT)} to {show(NEWEST)}, got {text[:20]!r}", field="min-api-version"
    )


KEYS: tuple[str, ...] = tuple(field.encode_name for field in msgspec.structs.fields(DaemonConfig))


def load_config(path: str, *, must_exist: bool) -> DaemonConfig:
    """Return what a file says; one that need not exist and does not says nothing."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as exc:
        if must_exist:
            raise NotFound(f"{path}: no such file") from exc
        return DaemonConfig()
    except OSError as exc:
        raise InvalidArgument(f"{path}: {(exc.strerror or str(exc)).lower()}") from exc
    if len(data) > _MAX_FILE:
        raise InvalidArgument(f"{path}: larger than {_MAX_FILE} bytes")
    try:
        given = decode_json(data, dict[str, Any])
        unknown = sorted(set(given) - set(KEYS))
        if unknown:
            raise InvalidArgument(
                f"{path}: not a key of the configuration: {', '.join(unknown)[:200]}",
                hint=f"keys are {', '.join(KEYS)}",
            )
        return decode_json(data, DaemonConfig)
    except msgspec.MsgspecError as exc:
        raise InvalidArgument(f"{path}: {exc}") from exc


def merge(config: DaemonConfig, **given: Any) -> DaemonConfig:
    """Return the configuration with what the command line gives; refuse what both give,
    as Docker does, but for flags that only switch something on."""
    changes = {name: value for name, value in given.items() if value}
    if "hosts" in changes and config.hosts:
        raise InvalidArgument(
            "is given in the configuration file and on the command line", field="hosts"
        )
    return msgspec.structs.replace(config, **changes)
