"""What the host's apt knows: where packages come from, which keys sign them, how to get there.

Read only, and only what `hutch.image.bootstrap` needs to fetch another suite from the same
place. Credentials stay in the host's files: what is written into an image never has any.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import msgspec

__all__ = [
    "Source",
    "acquire_options",
    "distribution_of",
    "load_sources",
    "sources_for",
    "without_credentials",
]

_MAX_FILE = 1 << 20
_ONE_LINE = re.compile(r"^deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<uri>\S+)\s+(?P<rest>.+)$")
_DEBIAN = frozenset(
    "buster bullseye bookworm trixie forky duke sid unstable testing stable oldstable "
    "oldoldstable experimental".split()
)
_UBUNTU = frozenset("bionic focal jammy noble oracular plucky questing resolute devel".split())
_POCKET = re.compile(r"(?:-updates|-security|-backports|-proposed(?:-updates)?|/updates)$")
_NO_UPDATES = frozenset({"sid", "unstable", "experimental"})


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """One archive of binary packages, as a stanza or line of sources.list(5) says it."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""
    trusted: bool = False

    def lines(self) -> Iterator[str]:
        """Yield the one-line form, a line for each suite."""
        options = []
        if self.signed_by:
            options.append(f"signed-by={self.signed_by}")
        if self.trusted:
            options.append("trusted=yes")
        bracket = f"[{' '.join(options)}] " if options else ""
        for suite in self.suites:
            yield " ".join([f"deb {bracket}{self.uri}", suite, *self.components])


def load_sources(etc_apt: Path = Path("/etc/apt")) -> list[Source]:
    """Return every enabled source of binary packages, in the order in which apt reads them."""
    found: list[Source] = []
    files = [etc_apt / "sources.list", *sorted(etc_apt.glob("sources.list.d/*"))]
    for path in files:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read(_MAX_FILE)
        except OSError:
            continue
        if path.suffix == ".sources":
            found.extend(_deb822(text))
        elif path.suffix == ".list":
            found.extend(_one_line(text))
    return found


def _one_line(text: str) -> Iterator[Source]:
    for line in text.splitlines():
        match = _ONE_LINE.match(line.split("#", 1)[0].strip())
        if match is None:
            continue
        options = dict(
            option.split("=", 1) for option in (match["options"] or "").split() if "=" in option
        )
        suite, *components = match["rest"].split()
        yield Source(
            uri=match["uri"],
            suites=(suite,),
            components=tuple(components),
            signed_by=options.get("signed-by", ""),
            trusted=options.get("trusted") == "yes",
        )


def _deb822(text: str) -> Iterator[Source]:
    for stanza in re.split(r"\n[ \t]*\n", text):
        fields = _fields(stanza)
        if "deb" not in fields.get("types", "").split():
            continue
        if fields.get("enabled", "yes").lower() in ("no", "false", "0"):
            continue
        signed_by = fields.get("signed-by", "")
        for uri in fields.get("uris", "").split():
            yield Source(
                uri=uri,
                suites=tuple(fields.get("suites", "").split()),
                components=tuple(fields.get("components", "").split()),
                # A key written into the stanza itself has no path to hand on.
                signed_by=signed_by if signed_by.startswith("/") else "",
                trusted=fields.get("trusted", "").lower() == "yes",
            )


def _fields(stanza: str) -> dict[str, str]:
    """Return the fields of a deb822 stanza, names in lower case, continuation lines joined."""
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line.startswith("#"):
            continue
        if line[:1] in (" ", "\t"):
            if name in fields:
                fields[name] += " " + line.strip()
            continue
        name, colon, value = line.partition(":")
        name = name.strip().lower()
        if colon:
            fields[name] = value.strip()
    return fields


def distribution_of(source: Source) -> str:
    """Return `debian`, `ubuntu` or an empty text: whose archive a source is."""
    bases = {_POCKET.sub("", suite) for suite in source.suites}
    if bases & _UBUNTU:
        return "ubuntu"
    if bases & _DEBIAN and "main" in source.components:
        return "debian"
    return ""


def _is_security(source: Source) -> bool:
    return any(s.endswith(("-security", "/updates")) for s in source.suites)


def sources_for(distribution: str, suite: str, known: Iterable[Source]) -> list[Source]:
    """Return the sources of a suite, at the places from which the host gets its own.

    The suite itself with its updates, and its security updates where the host has such a
    place. Empty where the host has no source of that distribution.
    """
    of_it = [s for s in known if distribution_of(s) == distribution]
    main = next((s for s in of_it if any(_POCKET.search(n) is None for n in s.suites)), None)
    if main is None:
        return []
    components = main.components if distribution == "ubuntu" else ("main",)
    suites = (suite,) if suite in _NO_UPDATES else (suite, f"{suite}-updates")
    chosen = [msgspec.structs.replace(main, suites=suites, components=components)]
    security = next((s for s in of_it if _is_security(s)), None)
    if security is not None and suite not in _NO_UPDATES:
        chosen.append(
            msgspec.structs.replace(security, suites=(f"{suite}-security",), components=components)
        )
    return chosen


def without_credentials(uri: str) -> str:
    """Return a URI without the user and password that may stand in it."""
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, parts.query, parts.fragment))


def acquire_options(dump: str, etc_apt: Path = Path("/etc/apt")) -> list[str]:
    """Return lines of apt.conf(5) that say how to reach a mirror: proxies, certificates, keys.

    `dump` is what `apt-config dump` printed. Where the host keeps passwords in auth.conf,
    the lines point there.
    """
    wanted = re.compile(r"^Acquire::(?:https?|ftp|Retries|ForceIPv[46])\b.*;$")
    lines = [line for line in dump.splitlines() if wanted.match(line) and '""' not in line]
    if (etc_apt / "auth.conf").is_file():
        lines.append(f'Dir::Etc::netrc "{etc_apt}/auth.conf";')
    if any(etc_apt.glob("auth.conf.d/*.conf")):
        lines.append(f'Dir::Etc::netrcparts "{etc_apt}/auth.conf.d";')
    return lines
