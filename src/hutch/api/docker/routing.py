"""Routes as data: method, path, since which version, handler, and what the reference says."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

import msgspec

from hutch.api.docker.errors import ApiError

if TYPE_CHECKING:
    from hutch.api.docker.replies import Answer
    from hutch.api.docker.requests import Request

__all__ = [
    "ANCIENT",
    "NEWEST",
    "OLDEST",
    "Handler",
    "Route",
    "Router",
    "Version",
    "parse_version",
    "show",
]

Version = tuple[int, int]
OLDEST: Version = (1, 24)
ANCIENT: Version = (1, 12)
NEWEST: Version = (1, 51)
Handler = Callable[["Request"], Awaitable["Answer"]]

_VERSIONED = re.compile(r"/v(\d{1,4})(?:\.(\d{1,4}))?(/.*)", re.DOTALL)
_PARAMETER = re.compile(r"\{(\w+)(\.\.\.)?\}")


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint. In the path, `{name}` is one segment and `{name...}` any number of them.

    `options` are its query parameters, headers and fields, with how far they go: each text
    begins with "works", "differs", "ignored" or "refused", and so does `verdict`, which is of
    the endpoint as a whole.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    since: Version = OLDEST
    verdict: str = "works"
    options: dict[str, str] = {}


def show(version: Version) -> str:
    """Return a version as it is written: `1.51`."""
    return f"{version[0]}.{version[1]}"


def parse_version(path: str, oldest: Version = OLDEST) -> tuple[Version, str]:
    """Return the version that a path begins with, the newest without, and the rest; raise
    for one that is not spoken here, in Docker's words. `oldest` may be set as low as `ANCIENT`,
    for clients that ask for it and use only what has not changed since."""
    match = _VERSIONED.fullmatch(path)
    if match is None:
        return NEWEST, path
    version = (int(match[1]), int(match[2] or 0))
    if version < oldest:
        raise ApiError(
            400,
            f"client version {show(version)} is too old. Minimum supported API version is "
            f"{show(oldest)}, please upgrade your client to a newer version",
        )
    if version > NEWEST:
        raise ApiError(
            400,
            f"client version {show(version)} is too new. Maximum supported API version is "
            f"{show(NEWEST)}",
        )
    return version, match[3]


class Router:
    """Finds the route of a request."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._plain: dict[tuple[str, str], Route] = {}
        self._patterns: dict[tuple[str, str], list[tuple[re.Pattern[str], Route]]] = {}
        for route in routes:
            if "{" not in route.path:
                self._plain[route.method, route.path] = route
                continue
            key = (route.method, route.path.split("/")[1])
            self._patterns.setdefault(key, []).append((_compile(route.path), route))

    def find(self, method: str, path: str, version: Version) -> tuple[Route, dict[str, str]]:
        """Return the route and the values in its path; raise as Docker for a page that is not."""
        route = self._plain.get((method, path))
        if route is not None and max(version, OLDEST) >= route.since:
            return route, {}
        for pattern, candidate in self._patterns.get((method, _first(path)), ()):
            match = pattern.fullmatch(path)
            if match is not None and max(version, OLDEST) >= candidate.since:
                return candidate, match.groupdict()
        raise ApiError(404, "page not found")


def _first(path: str) -> str:
    return path[1:].partition("/")[0]


def _compile(path: str) -> re.Pattern[str]:
    at = 0
    parts = []
    for match in _PARAMETER.finditer(path):
        parts.append(re.escape(path[at : match.start()]))
        parts.append(f"(?P<{match[1]}>{'.+' if match[2] else '[^/]+'})")
        at = match.end()
    parts.append(re.escape(path[at:]))
    return re.compile("".join(parts), re.DOTALL)
