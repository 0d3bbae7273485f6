"""What is asked of a build, checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from hutch.errors import InvalidArgument, Unsupported
from hutch.image.registry_config import Credentials
from hutch.oci.platform import host_platform, parse_platform
from hutch.oci.reference import parse

__all__ = ["BuildOptions", "Secret", "check_options", "parse_cache", "parse_secret", "parse_ssh"]

_MAX_SECRET = 500 << 10
_NETWORKS = ("default", "none", "host")


class Secret(msgspec.Struct, frozen=True, kw_only=True):
    """Where a secret comes from: a file, a variable of the environment, or the value itself."""

    path: str = ""
    env: str = ""
    value: bytes | None = None

    def read(self, name: str) -> bytes:
        """Return the value; raise `InvalidArgument` naming the secret, never the value."""
        if self.value is not None:
            data = self.value
        elif self.env:
            text = os.environ.get(self.env)
            if text is None:
                raise InvalidArgument(f"variable {self.env} is not set", field=f"secrets[{name!r}]")
            data = os.fsencode(text)
        else:
            try:
                with open(self.path, "rb") as file:
                    data = file.read(_MAX_SECRET + 1)
            except OSError as error:
                raise InvalidArgument(
                    f"{self.path}: {(error.strerror or '').lower()}", field=f"secrets[{name!r}]"
                ) from None
        if len(data) > _MAX_SECRET:
            raise InvalidArgument(f"larger than {_MAX_SECRET} bytes", field=f"secrets[{name!r}]")
        return data


class BuildOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One build. `epoch_s` is SOURCE_DATE_EPOCH: files are no younger than that, and the image
    was made then. `run` are limits of the steps, as `create` takes them; `credentials` are by
    registry."""

    dockerfile: str = ""
    tags: tuple[str, ...] = ()
    build_args: dict[str, str] = {}
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    target: str = ""
    platform: str = ""
    network: str = "default"
    add_hosts: tuple[str, ...] = ()
    pull: bool = False
    no_cache: bool = False
    no_cache_filter: tuple[str, ...] = ()
    squash: bool = False
    secrets: dict[str, Secret] = {}
    ssh: dict[str, str] = {}
    cache_from: tuple[str, ...] = ()
    cache_to: tuple[str, ...] = ()
    contexts: dict[str, str] = {}
    isolation: str = "container"
    epoch_s: float | None = None
    run: dict[str, Any] = {}
    credentials: dict[str, Credentials] = {}
    parallel: int = 0


def check_options(options: BuildOptions) -> BuildOptions:
    """Return the options with canonical tags; raise for what cannot be."""
    tags = []
    for index, tag in enumerate(options.tags):
        reference = parse(tag, field=f"tags[{index}]")
        if reference.digest:
            raise InvalidArgument("a name here has no digest", field=f"tags[{index}]")
        tags.append(reference.canonical())
    if options.network not in _NETWORKS and options.network in ("", "bridge"):
        options = msgspec.structs.replace(options, network="default")
    if options.isolation not in ("container", "vm"):
        raise InvalidArgument(
            f"expected container or vm, got {options.isolation!r}", field="isolation"
        )
    if options.run or options.add_hosts:
        _check_run(options)
    if options.platform:
        check_platform(options.platform, "platform")
    _check_caches(options)
    for name in options.build_args:
        if not name or "=" in name or "\0" in name:
            raise InvalidArgument(f"bad name {name[:60]!r}", field="build_args")
    epoch = options.epoch_s
    given = options.build_args.get("SOURCE_DATE_EPOCH")
    if epoch is None and given:
        epoch = _epoch(given)
    if epoch is not None and not 0 <= epoch < 2**33:
        raise InvalidArgument(f"out of range: {epoch:g}", field="SOURCE_DATE_EPOCH")
    return msgspec.structs.replace(options, tags=tuple(dict.fromkeys(tags)), epoch_s=epoch)


def _check_run(options: BuildOptions) -> None:
    """Refuse limits that no command could have, also where no command has to run."""
    from hutch.spec.build import build
    from hutch.spec.defaults import ImageDefaults

    build(
        "build",
        ImageDefaults(),
        ["true"],
        **{
            **options.run,
            "isolation": options.isolation,
            "add_host": list(options.add_hosts) or None,
        },
    )


def parse_cache(text: str, field: str) -> tuple[str, str]:
    """Read `type=registry,ref=NAME`, `type=inline` or a name; return the type and the name."""
    if "=" not in text:
        return "registry", text
    given = dict(part.partition("=")[::2] for part in text.split(","))
    kind = given.get("type", "registry")
    if kind == "inline" and field == "cache_to":
        return kind, ""
    if kind != "registry":
        raise InvalidArgument(
            f"unknown type {kind[:40]!r}",
            field=field,
            hint="use type=registry,ref=NAME, or for --cache-to type=inline",
        )
    if not given.get("ref"):
        raise InvalidArgument("needs a name: type=registry,ref=NAME", field=field)
    return kind, given["ref"]


def _check_caches(options: BuildOptions) -> None:
    for field, texts in (("cache_from", options.cache_from), ("cache_to", options.cache_to)):
        for text in texts:
            kind, name = parse_cache(text, field)
            if kind == "registry":
                parse(name, field=field)


def _epoch(text: str) -> float:
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise InvalidArgument(
            f"expected seconds since 1970, got {text[:40]!r}", field="SOURCE_DATE_EPOCH"
        )
    return float(text)


def check_platform(text: str, field: str) -> None:
    """Refuse a platform whose programs this host does not run."""
    if "," in text:
        raise Unsupported(
            f"{field}: {text!r}: one platform is built at a time",
            hint="build on a host of each platform, and join them in the registry",
        )
    wanted, here = parse_platform(text), host_platform()
    if (wanted.os, wanted.architecture) != (here.os, here.architecture):
        raise Unsupported(
            f"{field}: {wanted}: this host runs {here}, and emulates no other",
            hint="leave the platform out, or build on such a host",
        )


def parse_secret(text: str) -> tuple[str, Secret]:
    """Read `id=NAME[,src=PATH|,env=VARIABLE][,type=file|env]`."""
    given = _pairs(text, "secret", ("id", "src", "source", "env", "type"))
    name = given.get("id", "")
    if not name:
        raise InvalidArgument("needs an id: id=NAME,src=PATH", field="secret")
    path = given.get("src") or given.get("source") or ""
    env = given.get("env", "")
    kind = given.get("type", "")
    if kind not in ("", "file", "env"):
        raise InvalidArgument(f"type is file or env, not {kind[:40]!r}", field="secret")
    if kind == "env":
        return name, Secret(env=env or path or name)
    if path:
        return name, Secret(path=os.path.abspath(path))
    if env or name in os.environ:
        return name, Secret(env=env or name)
    return name, Secret(path=os.path.abspath(name))


def parse_ssh(text: str) -> tuple[str, str]:
    """Read `default`, or `NAME=SOCKET`; return the name and the agent's socket."""
    import stat

    name, _, path = text.partition("=")
    path = path or os.environ.get("SSH_AUTH_SOCK", "")
    if not name:
        raise InvalidArgument("expected default or NAME=SOCKET", field="ssh")
    if not path:
        raise InvalidArgument(
            "there is no SSH agent: SSH_AUTH_SOCK is not set",
            field="ssh",
            hint="run `eval $(ssh-agent)` and ssh-add, or name a socket",
        )
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            return name, os.path.abspath(path)
    except OSError as error:
        raise InvalidArgument(f"{path}: {(error.strerror or '').lower()}", field="ssh") from None
    raise InvalidArgument(
        f"{path}: is no socket of an agent",
        field="ssh",
        hint="keys are not read here: load them into an agent with ssh-add",
    )


def _pairs(text: str, field: str, known: Sequence[str]) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            raise InvalidArgument(
                f"cannot read {part[:40]!r}", field=field, hint=f"known are {', '.join(known)}"
            )
        found[key] = value
    return found
