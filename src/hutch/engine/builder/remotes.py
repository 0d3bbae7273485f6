"""Names of what is fetched: URLs and repositories."""

from __future__ import annotations

import re

import msgspec

from hutch.errors import InvalidArgument

__all__ = ["GitSource", "is_remote", "parse_git", "refuse_scheme"]

_GIT_SCHEMES = ("git://", "ssh://", "git@", "git+ssh://")
_GIT_HTTP = re.compile(r"https?://[^#]*\.git(?:/)?(?:#.*)?$")
_REF = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./@{}^~+-]*")


class GitSource(msgspec.Struct, frozen=True, kw_only=True):
    """A repository, what of it, and which directory; "" is the default branch, or the top."""

    url: str
    ref: str = ""
    directory: str = ""


def is_remote(text: str) -> bool:
    """Tell whether a source of ADD is fetched."""
    return text.startswith(("http://", "https://")) or parse_git(text) is not None


def parse_git(text: str) -> GitSource | None:
    """Read `https://…/x.git#REF:DIRECTORY`, `git://…`, `ssh://…`, `git@…`; None for others."""
    if not text.startswith(_GIT_SCHEMES) and _GIT_HTTP.match(text) is None:
        return None
    url, _, fragment = text.partition("#")
    ref, _, directory = fragment.partition(":")
    if ref and (_REF.fullmatch(ref) is None or ".." in ref):
        raise InvalidArgument(f"not a name in a repository: {ref[:60]!r}", field="context")
    return GitSource(url=url, ref=ref, directory=directory)


def refuse_scheme(text: str, field: str | None = None) -> None:
    """Raise `InvalidArgument` for a URL that is none of those that are fetched."""
    scheme, mark, _ = text.partition("://")
    if mark and scheme.isascii() and scheme.replace("+", "").isalnum():
        raise InvalidArgument(
            f"{scheme[:20]}:// is not read",
            field=field,
            hint="use http, https, ssh or git; name what is on this host by its path",
        )
