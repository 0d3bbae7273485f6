"""Build arguments: where each is known, and with which value."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from hutch.dockerfile import model
from hutch.dockerfile.source import SourceError
from hutch.dockerfile.words import expand

__all__ = ["PROXIES", "Arguments", "Platform", "Scope"]

PROXIES = tuple(
    case
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
    for case in (name, name.lower())
)
"""Arguments that every RUN has without an ARG, and that neither the cache nor the history
knows."""

_MARKERS = ("BUILDKIT_", "SOURCE_DATE_EPOCH")


class Platform(msgspec.Struct, frozen=True, kw_only=True):
    """A platform: `linux`, `amd64`, and a variant or nothing."""

    os: str
    architecture: str
    variant: str = ""

    @property
    def name(self) -> str:
        """`linux/arm64/v8`."""
        base = f"{self.os}/{self.architecture}"
        return f"{base}/{self.variant}" if self.variant else base

    def arguments(self, prefix: str) -> dict[str, str]:
        """Return TARGETPLATFORM and its like, or with BUILD."""
        return {
            f"{prefix}PLATFORM": self.name,
            f"{prefix}OS": self.os,
            f"{prefix}ARCH": self.architecture,
            f"{prefix}VARIANT": self.variant,
        }


class Arguments:
    """The arguments of a build: given ones, and those known before the first FROM."""

    def __init__(
        self,
        given: Mapping[str, str],
        *,
        build: Platform,
        target: Platform,
        target_stage: str = "",
    ) -> None:
        self.given = dict(given)
        self.automatic = {
            **build.arguments("BUILD"),
            **target.arguments("TARGET"),
            "TARGETSTAGE": target_stage or "default",
        }
        self.known: dict[str, str] = {}
        self._used: set[str] = set()

    def declare(self, instruction: model.Arg, escape: str) -> None:
        """Take an ARG from before the first FROM."""
        for written, default in instruction.pairs:
            env = self.for_from()
            name = expand(written, env, escape=escape)
            value = self.given.get(name)
            self._used.add(name)
            if value is None and default is not None:
                value = expand(default, env, escape=escape)
            if value is not None:
                self.known[name] = value

    def for_from(self) -> dict[str, str]:
        """Return what a FROM may use."""
        return {**self.automatic, **self.known}

    def value(self, name: str, default: str | None) -> str | None:
        """Return the value of an ARG in a stage."""
        self._used.add(name)
        if name in self.given:
            return self.given[name]
        if default is not None:
            return default
        if name in self.known:
            return self.known[name]
        return self.automatic.get(name)

    def unused(self) -> list[str]:
        """Return the given arguments that no ARG asked for."""
        return sorted(
            name
            for name in self.given
            if name not in self._used
            and name not in PROXIES
            and name not in self.automatic
            and not name.startswith(_MARKERS)
        )


class Scope:
    """The variables of one stage: its environment over its arguments."""

    def __init__(self, arguments: Arguments, escape: str, base: Scope | None = None) -> None:
        self._arguments = arguments
        self._escape = escape
        self.args: dict[str, str] = dict(base.args) if base is not None else {}
        self.env: dict[str, str] = {}
        self.missing: set[str] = set()
        self.has_command = False
        self._declared: set[str] = set(base._declared) if base is not None else set()

    def declare(self, instruction: model.Arg) -> dict[str, str | None]:
        """Take an ARG; return names and values."""
        found: dict[str, str | None] = {}
        for written, default in instruction.pairs:
            name = self.expand(written)
            fallback = self.expand(default) if default is not None else None
            value = self._arguments.value(name, fallback)
            self._declared.add(name)
            found[name] = value
            if value is not None:
                self.args[name] = value
        return found

    @property
    def variables(self) -> dict[str, str]:
        """What an instruction may use: the environment goes first."""
        return {**self.args, **self.env}

    def run_arguments(self) -> dict[str, str]:
        """Return the arguments that a RUN has in its environment, proxies left out."""
        return {
            name: value
            for name, value in sorted(self.args.items())
            if name not in self.env and name not in PROXIES
        }

    def proxies(self) -> dict[str, str]:
        """Return the proxies of a RUN."""
        given = self._arguments.given
        return {name: given[name] for name in PROXIES if name in given and name not in self.env}

    def expand(self, text: str) -> str:
        """Return a text with variables put in, its quotes gone."""
        return expand(text, self.variables, escape=self._escape, used=self._note)

    def expand_document(self, text: str) -> str:
        """Return a heredoc with variables put in; quotes stay, and so do other escapes."""
        return expand(
            text,
            self.variables,
            escape=self._escape,
            keep_quotes=True,
            keep_escapes=True,
            used=self._note,
        )

    def _note(self, name: str) -> None:
        known = name in self.args or name in self.env or name in self._declared
        if not known and (name[0].isalpha() or name[0] == "_"):
            self.missing.add(name)


def check_pairs(pairs: Mapping[str, str], field: str) -> None:
    """Refuse names that no environment can hold."""
    for name in pairs:
        if not name or "=" in name or "\0" in name + pairs[name]:
            raise SourceError(f"{field}: bad name {name[:60]!r}")
