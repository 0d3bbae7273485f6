"""The process of an instance: command, environment, user, working directory, health check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hutch.errors import InvalidArgument
from hutch.spec.defaults import ImageDefaults, ImageHealth
from hutch.spec.model import HealthCheck, ProcessSpec
from hutch.spec.parse import absolute_path, flag, integer, strings, text
from hutch.units import parse_duration

__all__ = [
    "DEFAULT_PATH",
    "build_exec",
    "check_user",
    "merge_env",
    "parse_command",
    "parse_environment",
    "read_command",
    "read_health",
]

DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MAX_ARGUMENTS_BYTES = 2 * 1024 * 1024
# More than execve(2) takes: of its 2 MiB each has a pointer and a zero byte.
_MAX_WORDS = 1 << 18
_HEALTH_OPTIONS = (
    "health_cmd", "health_interval", "health_timeout", "health_retries", "health_start_period",
    "health_start_interval",
)  # fmt: skip


def parse_command(value: object, field: str) -> tuple[str, ...]:
    """Return a program with its arguments; one text is split as a shell would split it."""
    if isinstance(value, str):
        import shlex

        try:
            value = shlex.split(text(value, field))
        except ValueError as exc:
            raise InvalidArgument(f"cannot be split: {str(exc).lower()}", field=field) from exc
    words = strings(value, field, most=_MAX_WORDS)
    if sum(map(len, words)) > _MAX_ARGUMENTS_BYTES:
        raise InvalidArgument(f"longer than {_MAX_ARGUMENTS_BYTES} bytes", field=field)
    return words


def read_command(
    image: ImageDefaults, command: object, given: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (entrypoint, command) as Docker combines options with an image.

    An entry point of the caller's replaces the image's and drops its command; an empty one
    leaves none.
    """
    words = parse_command(command, "command") if command is not None else ()
    if "entrypoint" not in given:
        return image.entrypoint, words or image.cmd
    value = given["entrypoint"]
    entrypoint = (
        (text(value, "entrypoint"),)
        if isinstance(value, str)
        else (parse_command(value, "entrypoint"))
    )
    return (() if entrypoint == ("",) else entrypoint), words


def argv_of(entrypoint: tuple[str, ...], command: tuple[str, ...]) -> tuple[str, ...]:
    """Join both and check that a program is named."""
    argv = (*entrypoint, *command)
    if not argv:
        raise InvalidArgument(
            "is missing, and the image names none",
            field="command",
            hint="write a command after the image",
        )
    if not argv[0]:
        raise InvalidArgument("the program's name is empty", field="command[0]")
    return argv


def merge_env(base: Sequence[str], value: object, field: str = "env") -> tuple[str, ...]:
    """Return `base` with the caller's variables set in place or added.

    A name without a value (None in a mapping) removes the variable.
    """
    merged: dict[str, str | None] = {}
    for entry in base:
        name, _, content = entry.partition("=")
        merged[name] = content
    if isinstance(value, Mapping):
        pairs: list[tuple[str, str | None]] = [
            (text(k, field), None if v is None else text(_plain(v), f"{field}.{str(k)[:80]}"))
            for k, v in value.items()
        ]
    else:
        pairs = []
        for entry in strings(value, field, most=_MAX_WORDS):
            name, equals, content = entry.partition("=")
            pairs.append((name, content if equals else None))
    for name, content_or_none in pairs:
        if not name or "=" in name:
            raise InvalidArgument(f"bad variable name {name[:80]!r}", field=field)
        merged[name] = content_or_none
    env = tuple(f"{name}={content}" for name, content in merged.items() if content is not None)
    if sum(map(len, env)) > _MAX_ARGUMENTS_BYTES:
        raise InvalidArgument(f"longer than {_MAX_ARGUMENTS_BYTES} bytes", field=field)
    return env


def parse_environment(value: object, field: str = "env") -> tuple[str, ...]:
    """Return `NAME=VALUE` texts from a mapping or a sequence of them."""
    return merge_env((), value, field)


def _plain(value: object) -> object:
    return str(value) if isinstance(value, (bool, float)) else value


def check_user(value: object, field: str = "user") -> str:
    """Return `NAME|UID[:GROUP|GID]` after checking its shape and the range of numbers."""
    given = text(value, field)
    parts = given.split(":")
    if not given:
        return ""
    if len(parts) > 2 or not parts[0] or any(c.isspace() or c == "/" for c in given):
        raise InvalidArgument(
            f"expected NAME|UID[:GROUP|GID], got {given[:80]!r}",
            field=field,
            hint="for example 1000:1000 or www-data",
        )
    for part in parts:
        _check_numeric_id(part, field)
    return given.removesuffix(":")


def _check_numeric_id(part: str, field: str) -> None:
    if part.isascii() and part.isdigit() and (len(part) > 10 or int(part) > 4_294_967_294):
        raise InvalidArgument(f"number out of range: {part[:20]}", field=field)
    if part.startswith("-"):
        raise InvalidArgument(f"number out of range: {part[:20]}", field=field)


def read_groups(value: object, field: str = "group_add") -> tuple[str, ...]:
    """Return supplementary groups, names or numbers."""
    groups = strings(value, field)
    for i, group in enumerate(groups):
        where = f"{field}[{i}]"
        if not group or any(c.isspace() or c in ":/" for c in group):
            raise InvalidArgument(f"expected a group's name or number, got {group!r}", field=where)
        _check_numeric_id(group, where)
    return groups


def read_workdir(image: ImageDefaults, given: Mapping[str, Any]) -> str:
    """Return the working directory of the options, else of the image, else `/`."""
    if given.get("workdir"):
        return absolute_path(given["workdir"], "workdir", root=True)
    if not image.workdir or image.workdir == "/":
        return "/"
    return absolute_path("/" + image.workdir.lstrip("/"), "image.workdir", root=True)


def read_process(
    image: ImageDefaults, argv: tuple[str, ...], given: Mapping[str, Any]
) -> ProcessSpec:
    """Return the main process."""
    tty = flag(given.get("tty", False), "tty")
    stdin = flag(given.get("interactive", False), "interactive")
    base = image.env
    if not any(entry.startswith("PATH=") for entry in base):
        base = (DEFAULT_PATH, *base)
    if tty and not any(entry.startswith("TERM=") for entry in base):
        base = (*base, "TERM=xterm")
    return ProcessSpec(
        argv=argv,
        env=merge_env(base, given["env"]) if "env" in given else base,
        cwd=read_workdir(image, given),
        user=check_user(given.get("user", image.user)),
        groups=read_groups(given["group_add"]) if "group_add" in given else (),
        tty=tty,
        stdin=stdin,
        stdin_once=flag(given.get("stdin_once", False), "stdin_once"),
    )


def build_exec(
    base: ProcessSpec,
    command: object,
    *,
    user: str | int | None = None,
    env: object = None,
    workdir: str | None = None,
    tty: bool = False,
    stdin: bool = False,
) -> ProcessSpec:
    """Return a further process of a running instance, after its main one.

    User, environment and working directory are those of the main process where not given.
    """
    argv = argv_of((), parse_command(command, "command"))
    inherited = base.env
    if tty and not any(entry.startswith("TERM=") for entry in inherited):
        inherited = (*inherited, "TERM=xterm")
    return ProcessSpec(
        argv=argv,
        env=merge_env(inherited, env) if env is not None else inherited,
        cwd=absolute_path(workdir, "workdir", root=True) if workdir else base.cwd,
        user=check_user(user) if user is not None else base.user,
        groups=base.groups,
        tty=tty,
        stdin=stdin,
        umask=base.umask,
    )


# ---- health -----------------------------------------------------------------------------


def read_health(image: ImageDefaults, given: Mapping[str, Any]) -> HealthCheck | None:
    """Return the health check of the options over the image's; None where there is none."""
    named = [name for name in _HEALTH_OPTIONS if name in given]
    if flag(given.get("no_healthcheck", False), "no_healthcheck"):
        if named:
            raise InvalidArgument(f"conflicts with {named[0]}", field="no_healthcheck")
        return None
    base = image.healthcheck or ImageHealth()
    shell = image.shell or ("/bin/sh", "-c")
    if given.get("health_cmd"):
        value = given["health_cmd"]
        test: tuple[str, ...] = (
            ("CMD-SHELL", text(value, "health_cmd"))
            if isinstance(value, str)
            else parse_command(value, "health_cmd")
        )
    else:
        test = base.test
    command = _health_command(test, shell)
    if not command:
        return None
    return HealthCheck(
        command=command,
        interval_s=_health_time(given, "health_interval", base.interval_s) or 30.0,
        timeout_s=_health_time(given, "health_timeout", base.timeout_s) or 30.0,
        retries=integer(given.get("health_retries", base.retries), "health_retries", low=0,
                        high=1_000_000) or 3,
        start_period_s=_health_time(given, "health_start_period", base.start_period_s),
        start_interval_s=_health_time(given, "health_start_interval", base.start_interval_s),
    )  # fmt: skip


def _health_command(test: tuple[str, ...], shell: tuple[str, ...]) -> tuple[str, ...]:
    if not test or test == ("NONE",):
        return ()
    if test[0] == "CMD":
        return test[1:]
    if test[0] == "CMD-SHELL":
        return (*shell, *test[1:2]) if len(test) > 1 and test[1] else ()
    return test


def _health_time(given: Mapping[str, Any], name: str, base: float) -> float:
    seconds = parse_duration(given[name], field=name) if name in given else base
    if seconds and seconds < 0.001:
        raise InvalidArgument("must be 0 or at least 1ms", field=name)
    return seconds
