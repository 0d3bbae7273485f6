"""Image references in Docker's grammar: `debian`, `ghcr.io/x/y:tag@sha256:…`.

Scanned by hand rather than with regular expressions: linear on any input, and nothing to
compile when a command starts.
"""

from __future__ import annotations

import msgspec

from hutch.errors import InvalidArgument

__all__ = ["DEFAULT_DOMAIN", "DEFAULT_TAG", "Reference", "check_registry", "is_hex", "parse"]

DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"
_LEGACY_DOMAIN = "index.docker.io"
_OFFICIAL = "library/"
_MAX_NAME = 255
_MAX_TAG = 128
_MAX_TEXT = 1024

_LOWER = frozenset("abcdefghijklmnopqrstuvwxyz")
_DIGITS = frozenset("0123456789")
_HEX = frozenset("0123456789abcdef")
_ALNUM = _LOWER | _DIGITS
_LETTERS = _LOWER | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_WORD = _LETTERS | _DIGITS | {"_"}
_TAG = _WORD | {".", "-"}
_HOST = _LETTERS | _DIGITS | {"-"}
_HEX_LENGTH = {"sha256": 64, "sha512": 128}


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """A normalised reference: where an image lives and which one of its repository.

    `tag` and `digest` may both be there; then the digest decides and the tag is a remark.
    """

    domain: str
    path: str
    tag: str | None = None
    digest: str | None = None

    @property
    def name(self) -> str:
        """The repository with its registry: `docker.io/library/debian`."""
        return f"{self.domain}/{self.path}"

    @property
    def target(self) -> str:
        """What to ask the registry for: the digest, else the tag."""
        return self.digest or self.tag or DEFAULT_TAG

    def familiar_name(self) -> str:
        """Return the repository as people write it: `debian`, `ghcr.io/x/y`."""
        if self.domain != DEFAULT_DOMAIN:
            return self.name
        short = self.path.removeprefix(_OFFICIAL)
        if "/" not in short:
            return short
        # `docker.io/a.b/x` without its domain would read back as a registry named a.b.
        return self.name if _is_registry(self.path.partition("/")[0]) else self.path

    def _suffix(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{tag}@{self.digest}" if self.digest else tag

    def familiar(self) -> str:
        """Return the reference as people write it: `debian:latest`."""
        return self.familiar_name() + self._suffix()

    def canonical(self) -> str:
        """Return the whole reference: `docker.io/library/debian:latest`."""
        return self.name + self._suffix()

    def with_tag(self, tag: str) -> Reference:
        """Return the same repository with this tag and no digest."""
        _check_tag(tag, "tag", tag)
        return Reference(domain=self.domain, path=self.path, tag=tag)

    def with_digest(self, digest: str) -> Reference:
        """Return the same repository with this digest and no tag."""
        _check_digest(digest, "digest", digest)
        return Reference(domain=self.domain, path=self.path, digest=digest)

    def __str__(self) -> str:
        return self.familiar()


def parse(text: str, *, field: str = "image") -> Reference:
    """Return the reference that `text` means, with Docker's defaults filled in.

    Raises `InvalidArgument` naming `field`; a bare image identifier is not a reference.
    """
    if not isinstance(text, str):
        raise InvalidArgument(f"expected a reference, got {type(text).__name__}", field=field)
    if not text:
        raise InvalidArgument("is empty", field=field, hint="name an image, such as debian:latest")
    if len(text) > _MAX_TEXT:
        raise InvalidArgument(f"longer than {_MAX_TEXT} characters", field=field)
    scheme, separator, rest = text.partition("://")
    if separator:
        raise InvalidArgument(
            f"is an address, not a reference: {text!r}",
            field=field,
            hint=f"leave out {scheme}://, as in {rest}" if rest else None,
        )
    if len(text) == 64 and is_hex(text):
        raise InvalidArgument(f"is an image id, not a reference: {text!r}", field=field)
    rest, at, digest = text.partition("@")
    if at:
        _check_digest(digest, field, text)
    name, tag = _split_tag(rest)
    if tag is not None:
        _check_tag(tag, field, text)
    domain, path = _split_domain(name)
    _check_domain(domain, field, text)
    _check_path(path, field, text)
    if len(domain) + 1 + len(path) > _MAX_NAME:
        raise InvalidArgument(f"name is longer than {_MAX_NAME} characters", field=field)
    if tag is None and not at:
        tag = DEFAULT_TAG
    return Reference(domain=domain, path=path, tag=tag, digest=digest if at else None)


def is_hex(text: str) -> bool:
    """Tell whether `text` is one or more lower-case hexadecimal digits."""
    return bool(text) and _HEX.issuperset(text)


def _split_tag(rest: str) -> tuple[str, str | None]:
    colon = rest.rfind(":")
    if colon < 0 or "/" in rest[colon:] or "]" in rest[colon:]:
        return rest, None
    return rest[:colon], rest[colon + 1 :]


def _is_registry(first: str) -> bool:
    return "." in first or ":" in first or first == "localhost" or first != first.lower()


def _split_domain(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    if not slash or not _is_registry(first):
        domain, path = DEFAULT_DOMAIN, name
    else:
        domain, path = (DEFAULT_DOMAIN if first == _LEGACY_DOMAIN else first), rest
    if domain == DEFAULT_DOMAIN and "/" not in path:
        path = _OFFICIAL + path
    return domain, path


def check_registry(name: str, *, field: str = "registry") -> None:
    """Refuse what is no registry's name: a host, or an address, and maybe a port."""
    _check_domain(name, field, name)


def _wrong(what: str, field: str, text: str, hint: str | None = None) -> InvalidArgument:
    return InvalidArgument(f"{what} in reference {text!r}", field=field, hint=hint)


def _check_domain(domain: str, field: str, text: str) -> None:
    host, colon, port = domain, "", ""
    if domain.startswith("["):
        host, bracket, tail = domain[1:].partition("]")
        if not bracket or (tail and not tail.startswith(":")):
            raise _wrong("bad IPv6 address", field, text)
        colon, port = tail[:1], tail[1:]
        _check_ipv6(host, field, text)
    else:
        host, colon, port = domain.partition(":")
        for label in host.split("."):
            bad_edge = label[:1] == "-" or label[-1:] == "-"
            if not label or bad_edge or not _HOST.issuperset(label):
                raise _wrong(f"bad registry name {domain!r}", field, text)
    if colon and (not port or not _DIGITS.issuperset(port) or len(port) > 5 or int(port) > 65535):
        raise _wrong(f"bad port {port!r}", field, text)


def _check_ipv6(host: str, field: str, text: str) -> None:
    import _socket

    try:
        _socket.inet_pton(_socket.AF_INET6, host)
    except (OSError, ValueError):
        raise _wrong(f"bad IPv6 address {host!r}", field, text) from None


def _check_path(path: str, field: str, text: str) -> None:
    for part in path.split("/"):
        if not _is_component(part):
            if part != part.lower():
                raise _wrong(
                    f"upper-case letters in the repository name {path!r}",
                    field,
                    text,
                    hint=f"repository names are lower case: {path.lower()}",
                )
            raise _wrong(f"bad repository name {path!r}", field, text)


def _is_component(part: str) -> bool:
    """Tell whether `part` is runs of [a-z0-9] joined by `.`, `_`, `__` or dashes."""
    if not part or part[0] not in _ALNUM or part[-1] not in _ALNUM:
        return False
    separator = ""
    for letter in part:
        if letter in _ALNUM:
            if separator not in ("", ".", "_", "__") and separator.strip("-"):
                return False
            separator = ""
        elif letter in "._-":
            separator += letter
        else:
            return False
    return True


def _check_tag(tag: str, field: str, text: str) -> None:
    if not tag or tag[0] not in _WORD or not _TAG.issuperset(tag):
        raise _wrong(f"bad tag {tag!r}", field, text)
    if len(tag) > _MAX_TAG:
        raise _wrong(f"tag longer than {_MAX_TAG} characters", field, text)


def _check_digest(digest: str, field: str, text: str) -> None:
    algorithm, _, digits = digest.partition(":")
    length = _HEX_LENGTH.get(algorithm)
    if length is None:
        raise _wrong(f"bad digest {digest!r}", field, text, hint="a digest is sha256:… or sha512:…")
    if len(digits) != length or not is_hex(digits):
        raise _wrong(f"bad digest: {algorithm} has {length} hexadecimal digits", field, text)
