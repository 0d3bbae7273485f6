"""Containerfile instructions that change an image's configuration: `--change` of import
and commit.

They act on the `config` object as JSON has it (Docker's spelling), so that fields unknown
here survive a commit.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from hutch.decoding import decode_json
from hutch.errors import InvalidArgument
from hutch.spec.signals import parse_signal

__all__ = ["apply_changes"]

Config = dict[str, Any]

_SHELL = ["/bin/sh", "-c"]


def apply_changes(config: Config, changes: Iterable[str], *, field: str = "changes") -> Config:
    """Return `config` with instructions such as `ENV A=1` or `CMD ["sh"]` applied in order.

    ENV, CMD, ENTRYPOINT, WORKDIR, USER, EXPOSE, LABEL, VOLUME, STOPSIGNAL, SHELL,
    HEALTHCHECK and ONBUILD are known, as in `docker commit --change`.
    """
    changed = dict(config)
    for index, change in enumerate(changes):
        where = f"{field}[{index}]"
        word, _, rest = change.strip().partition(" ")
        apply = _INSTRUCTIONS.get(word.upper())
        if apply is None:
            raise InvalidArgument(
                f"unknown instruction {word!r}",
                field=where,
                hint="use one of " + ", ".join(sorted(_INSTRUCTIONS)),
            )
        rest = rest.strip()
        if not rest:
            raise InvalidArgument(f"{word.upper()} needs an argument", field=where)
        apply(changed, rest, where)
    return changed


def _words(text: str, where: str) -> list[str]:
    """Split at white space as a shell would, quotes and backslashes understood."""
    words: list[str] = []
    current = ""
    started = False
    quote = ""
    at = 0
    while at < len(text):
        char = text[at]
        if char == "\\" and quote != "'" and at + 1 < len(text):
            at += 1
            current += text[at]
            started = True
        elif quote:
            quote = "" if char == quote else quote
            current += char if quote else ""
        elif char in "'\"":
            quote = char
            started = True
        elif char.isspace():
            if started:
                words.append(current)
            current, started = "", False
        else:
            current += char
            started = True
        at += 1
    if quote:
        raise InvalidArgument(f"quote {quote} is not closed", field=where)
    return [*words, current] if started else words


def _json_list(text: str, where: str) -> list[str] | None:
    if not text.startswith("["):
        return None
    try:
        return decode_json(text.encode(), list[str])
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidArgument(f"expected a JSON list of strings: {error}", field=where) from None


def _command(config: Config, text: str, where: str) -> list[str]:
    listed = _json_list(text, where)
    return listed if listed is not None else [*(config.get("Shell") or _SHELL), text]


def _pairs(text: str, where: str) -> list[tuple[str, str]]:
    words = _words(text, where)
    if words and "=" not in words[0]:
        # The old form: one key, then its value up to the end of the line.
        key, _, value = text.partition(" ")
        if not value.strip():
            raise InvalidArgument(f"expected key=value, got {text[:80]!r}", field=where)
        return [(key, value.strip())]
    pairs = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise InvalidArgument(f"expected key=value, got {word[:80]!r}", field=where)
        pairs.append((key, value))
    return pairs


def _env(config: Config, text: str, where: str) -> None:
    entries: dict[str, str] = {}
    for entry in config.get("Env") or []:
        key, _, value = entry.partition("=")
        entries[key] = value
    entries.update(_pairs(text, where))
    config["Env"] = [f"{key}={value}" for key, value in entries.items()]


def _label(config: Config, text: str, where: str) -> None:
    config["Labels"] = {**(config.get("Labels") or {}), **dict(_pairs(text, where))}


def _cmd(config: Config, text: str, where: str) -> None:
    config["Cmd"] = _command(config, text, where)


def _entrypoint(config: Config, text: str, where: str) -> None:
    config["Entrypoint"] = _command(config, text, where)


def _workdir(config: Config, text: str, where: str) -> None:
    path = _single(text, where)
    config["WorkingDir"] = posixpath.normpath(
        posixpath.join("/", config.get("WorkingDir") or "/", path)
    )


def _user(config: Config, text: str, where: str) -> None:
    config["User"] = _single(text, where)


def _expose(config: Config, text: str, where: str) -> None:
    ports = dict(config.get("ExposedPorts") or {})
    for word in _words(text, where):
        number, slash, protocol = word.partition("/")
        for part in number.split("-"):
            if not (part.isascii() and part.isdigit() and 1 <= int(part) <= 65535):
                raise InvalidArgument(f"expected a port, got {word!r}", field=where)
        if slash and protocol not in ("tcp", "udp", "sctp"):
            raise InvalidArgument(f"expected tcp, udp or sctp, got {word!r}", field=where)
        ports[f"{number}/{protocol or 'tcp'}"] = {}
    config["ExposedPorts"] = ports


def _volume(config: Config, text: str, where: str) -> None:
    listed = _json_list(text, where)
    paths = listed if listed is not None else _words(text, where)
    for path in paths:
        if not path.startswith("/"):
            raise InvalidArgument(f"must be an absolute path, got {path!r}", field=where)
    config["Volumes"] = {**(config.get("Volumes") or {}), **{path: {} for path in paths}}


def _stop_signal(config: Config, text: str, where: str) -> None:
    signal = _single(text, where)
    parse_signal(signal, field=where)
    config["StopSignal"] = signal


def _shell(config: Config, text: str, where: str) -> None:
    listed = _json_list(text, where)
    if not listed:
        raise InvalidArgument("SHELL takes a JSON list of strings", field=where)
    config["Shell"] = listed


def _on_build(config: Config, text: str, where: str) -> None:
    config["OnBuild"] = [*(config.get("OnBuild") or []), text]


def _healthcheck(config: Config, text: str, where: str) -> None:
    from hutch.units import parse_duration

    if text.upper() == "NONE":
        config["Healthcheck"] = {"Test": ["NONE"]}
        return
    options: Config = {}
    names = {
        "--interval": "Interval",
        "--timeout": "Timeout",
        "--start-period": "StartPeriod",
        "--start-interval": "StartInterval",
    }
    while text.startswith("--"):
        option, _, text = text.partition(" ")
        key, _, value = option.partition("=")
        text = text.strip()
        if key in names:
            options[names[key]] = int(parse_duration(value, field=where) * 1_000_000_000)
        elif key == "--retries" and value.isdigit():
            options["Retries"] = int(value)
        else:
            raise InvalidArgument(f"unknown option {option!r}", field=where)
    word, _, command = text.partition(" ")
    if word.upper() != "CMD" or not command.strip():
        raise InvalidArgument("HEALTHCHECK takes NONE, or CMD and a command", field=where)
    listed = _json_list(command.strip(), where)
    test = ["CMD", *listed] if listed is not None else ["CMD-SHELL", command.strip()]
    config["Healthcheck"] = {"Test": test, **options}


def _single(text: str, where: str) -> str:
    words = _words(text, where)
    if len(words) != 1:
        raise InvalidArgument(f"expected one word, got {text[:80]!r}", field=where)
    return words[0]


_INSTRUCTIONS: dict[str, Callable[[Config, str, str], None]] = {
    "CMD": _cmd,
    "ENTRYPOINT": _entrypoint,
    "ENV": _env,
    "EXPOSE": _expose,
    "HEALTHCHECK": _healthcheck,
    "LABEL": _label,
    "ONBUILD": _on_build,
    "SHELL": _shell,
    "STOPSIGNAL": _stop_signal,
    "USER": _user,
    "VOLUME": _volume,
    "WORKDIR": _workdir,
}
