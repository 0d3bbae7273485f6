"""Client of the OCI distribution specification: manifests, blobs, tags of one repository.

Reading goes to the mirrors first, writing to the registry itself. Uploads are in
`hutch.image.upload`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar
from urllib.parse import quote, urlencode

import msgspec

from hutch.decoding import decode_json
from hutch.errors import Denied, HutchError, IntegrityError, InvalidArgument, NotFound, Unavailable
from hutch.image.answers import check_status, join_url, origin
from hutch.image.registry_config import RegistryConfig, endpoints
from hutch.image.transport import Cancelled, Response, Transport
from hutch.oci.digest import digest_of, is_digest
from hutch.oci.reference import Reference
from hutch.oci.types import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_MANIFEST_BYTES,
    Descriptor,
    Index,
    decode_index,
    manifest_kind,
)

__all__ = ["FetchedManifest", "Repository", "catalog"]

_ACCEPT = ", ".join((*MANIFEST_TYPES, *INDEX_TYPES, "application/json;q=0.5"))
_MAX_LIST_BYTES = 8 << 20
_MAX_PAGES = 1000
# What a connection must have brought for its end not to count against the tries.
_PROGRESS = 64 << 10
_MAX_NAMES = 1_000_000

T = TypeVar("T")


class FetchedManifest(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest or index as the registry has it, its digest verified."""

    data: bytes
    media_type: str
    digest: str


class _Tags(msgspec.Struct):
    tags: list[str] | None = None


class _Catalog(msgspec.Struct):
    repositories: list[str] | None = None


class Repository:
    """One repository of a registry; thread-safe, a context manager.

    `actions` is what tokens are asked for: `pull`, or `pull,push`.
    """

    def __init__(
        self,
        reference: Reference,
        config: RegistryConfig,
        *,
        actions: str = "pull",
        mirrors: bool = True,
        stop: threading.Event | None = None,
    ) -> None:
        self.reference = reference
        self.actions = actions
        self._transports = [
            Transport(endpoint, config, repository=reference.path, stop=stop)
            for endpoint in endpoints(reference.domain, config, mirrors=mirrors)
        ]
        self._dead: set[Transport] = set()
        self.tries = config.tries

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        for transport in self._transports:
            transport.close()

    def abort(self) -> None:
        """Break every transfer that is under way."""
        for transport in self._transports:
            transport.abort()

    @property
    def has_mirrors(self) -> bool:
        """Whether something else than the registry itself may answer."""
        return len(self._transports) > 1

    @property
    def home(self) -> Transport:
        """The registry itself, which takes what is written."""
        return self._transports[-1]

    def path(self, transport: Transport, rest: str) -> str:
        """Return the URL path of something in this repository."""
        prefix = transport.endpoint.prefix
        name = f"{prefix}/{self.reference.path}" if prefix else self.reference.path
        return f"/v2/{quote(name)}/{rest}"

    def scopes(self, transport: Transport, actions: str = "") -> tuple[str, ...]:
        """Return what to ask the token server for."""
        prefix = transport.endpoint.prefix
        name = f"{prefix}/{self.reference.path}" if prefix else self.reference.path
        return (f"repository:{name}:{actions or self.actions}",)

    # ---- manifests --------------------------------------------------------------------

    def manifest(self, target: str, *, size: int | None = None) -> FetchedManifest:
        """Fetch a manifest or index by tag or digest and verify it.

        Raises `NotFound`, `Denied`, `IntegrityError` where the content is not what the
        digest says.
        """
        return self._first(lambda transport: self._manifest(transport, target, size))

    def _manifest(self, transport: Transport, target: str, size: int | None) -> FetchedManifest:
        what = f"manifest {self._name(target)}"
        response = self._get(transport, f"manifests/{quote(target, safe=':')}", what)
        if response.headers.get("content-type", "").startswith("text/html"):
            response.discard()
            raise Unavailable(
                f"{what}: the answer is a web page, not a manifest",
                hint=f"is {transport.endpoint.host} a registry? a proxy or a login page may"
                " stand before it",
            )
        data = response.read(MAX_MANIFEST_BYTES)
        stated = target if is_digest(target) else response.headers.get("docker-content-digest", "")
        algorithm = stated.partition(":")[0] if is_digest(stated) else "sha256"
        digest = digest_of(data, algorithm)
        if is_digest(stated) and digest != stated:
            raise IntegrityError(f"{what}: digest is {digest}, expected {stated}")
        if size is not None and len(data) != size:
            raise IntegrityError(f"{what}: {len(data)} bytes where {size} were stated")
        kind = manifest_kind(data, response.headers.get("content-type", ""), what=what)
        return FetchedManifest(data=data, media_type=kind, digest=digest)

    def head(self, target: str) -> str | None:
        """Return the digest a tag has now, "" if the registry does not say, None if missing."""
        return self._first(lambda transport: self._head(transport, target))

    def _head(self, transport: Transport, target: str) -> str | None:
        with transport.request(
            "HEAD",
            self.path(transport, f"manifests/{quote(target, safe=':')}"),
            scopes=self.scopes(transport),
            headers={"Accept": _ACCEPT},
        ) as response:
            if response.status == 404:
                if transport is not self.home:
                    raise NotFound(f"manifest {self._name(target)}: not in the mirror")
                return None
            check_status(response, (200,), f"manifest {self._name(target)}")
            stated = response.headers.get("docker-content-digest", "")
            return stated if is_digest(stated) else ""

    def put_manifest(self, target: str, data: bytes, media_type: str) -> str:
        """Store a manifest by tag or digest and return its digest."""
        home = self.home
        what = f"manifest {self._name(target)}"
        digest = digest_of(data)
        with home.request(
            "PUT",
            self.path(home, f"manifests/{quote(target, safe=':')}"),
            scopes=self.scopes(home),
            headers={"Content-Type": media_type, "Content-Length": str(len(data))},
            body=lambda: data,
        ) as response:
            check_status(response, (200, 201, 202), what)
            stated = response.headers.get("docker-content-digest", "")
            if stated.startswith("sha256:") and stated != digest:
                raise IntegrityError(f"{what}: the registry stored {stated}, not {digest}")
        return digest

    def delete_manifest(self, digest: str) -> None:
        """Delete a manifest by digest; raise `NotFound`, or `InvalidArgument` if not allowed."""
        self._delete(f"manifests/{digest}", f"manifest {self._name(digest)}")

    def delete_blob(self, digest: str) -> None:
        """Delete a blob by digest."""
        self._delete(f"blobs/{digest}", f"blob {self._name(digest)}")

    def _delete(self, rest: str, what: str) -> None:
        home = self.home
        with home.request(
            "DELETE", self.path(home, rest), scopes=self.scopes(home, "pull,push,delete")
        ) as response:
            if response.status == 405:
                raise InvalidArgument(f"{what}: the registry does not allow deletion")
            check_status(response, (200, 202), what)

    def referrers(self, digest: str) -> list[Descriptor]:
        """Return what refers to a manifest (signatures, attestations); none is fine."""
        home = self.home
        what = f"referrers of {self._name(digest)}"
        for rest in (f"referrers/{digest}", f"manifests/{digest.replace(':', '-')}"):
            with home.request(
                "GET",
                self.path(home, rest),
                scopes=self.scopes(home),
                headers={"Accept": INDEX_TYPES[0]},
            ) as response:
                if response.status == 404:
                    continue
                check_status(response, (200,), what)
                index: Index = decode_index(response.read(MAX_MANIFEST_BYTES), what=what)
                return index.manifests
        return []

    # ---- blobs ------------------------------------------------------------------------

    def has_blob(self, digest: str) -> bool:
        """Tell whether the registry itself has a blob."""
        home = self.home
        with home.request(
            "HEAD", self.path(home, f"blobs/{digest}"), scopes=self.scopes(home)
        ) as response:
            if response.status == 404:
                return False
            check_status(response, (200,), f"blob {self._name(digest)}")
            return True

    def blob(
        self, descriptor: Descriptor, offset: int = 0, *, mirrors: bool = True
    ) -> Iterator[bytes]:
        """Yield a blob from `offset` on, asking for the rest where a connection breaks.

        The caller verifies the digest. Raises `IntegrityError` where the registry sends
        more than the descriptor's size, `Unavailable` where it never sends all of it.
        """
        what = f"blob {self._name(descriptor.digest)}"
        position, failures = offset, 0
        while position < descriptor.size:
            begun = position
            opening = partial(self._open_blob, descriptor=descriptor, offset=position, what=what)
            try:
                for chunk in self._first(opening) if mirrors else opening(self.home):
                    position += len(chunk)
                    if position > descriptor.size:
                        raise IntegrityError(
                            f"{what}: longer than the {descriptor.size} bytes stated"
                        )
                    yield chunk
                problem = f"ends after {position} of {descriptor.size} bytes"
            except (Denied, NotFound, Cancelled):
                raise
            except Unavailable as exc:
                problem = exc.message
            if position >= descriptor.size:
                return
            failures = 1 if position - begun >= _PROGRESS else failures + 1
            if failures >= self.tries:
                raise Unavailable(f"{what}: {problem}", hint="the rest is fetched on the next pull")
            self.home.pause(failures)

    def _open_blob(
        self, transport: Transport, descriptor: Descriptor, offset: int, what: str
    ) -> Iterator[bytes]:
        headers = {"Range": f"bytes={offset}-{descriptor.size - 1}"} if offset else {}
        response = transport.request(
            "GET",
            self.path(transport, f"blobs/{descriptor.digest}"),
            scopes=self.scopes(transport),
            headers=headers,
        )
        check_status(response, (200, 206), what)
        if response.status == 206:
            stated = response.headers.get("content-range", "")
            if not stated.replace(" ", "").startswith((f"bytes{offset}-", f"bytes={offset}-")):
                response.discard()
                raise IntegrityError(f"{what}: wrong range in the answer: {stated[:60]!r}")
            return _drain(response, 0)
        length = response.headers.get("content-length", "")
        if length.isdigit() and int(length) > descriptor.size:
            response.discard()
            raise IntegrityError(f"{what}: {length[:20]} bytes where {descriptor.size} were stated")
        return _drain(response, offset)

    # ---- lists ------------------------------------------------------------------------

    def tags(self) -> list[str]:
        """Return all tags of the repository, sorted."""
        home = self.home
        what = f"tags of {self.reference.familiar_name()}"
        pages = _pages(home, self.path(home, "tags/list?n=1000"), self.scopes(home), what)
        names: set[str] = set()
        for page in pages:
            names.update(_decode_page(page, _Tags, what).tags or ())
            _check_count(len(names), what)
        return sorted(names)

    # ---- both -------------------------------------------------------------------------

    def _get(self, transport: Transport, rest: str, what: str) -> Response:
        response = transport.request(
            "GET",
            self.path(transport, rest),
            scopes=self.scopes(transport),
            headers={"Accept": _ACCEPT},
        )
        check_status(response, (200,), what)
        return response

    def _first(self, ask: Callable[[Transport], T]) -> T:
        """Ask the mirrors, then the registry: a mirror's failure is nobody's business."""
        for transport in self._transports[:-1]:
            if transport in self._dead:
                continue
            try:
                return ask(transport)
            except Cancelled:
                raise
            except Unavailable:
                self._dead.add(transport)
            except HutchError:
                continue
        return ask(self.home)

    def _name(self, target: str) -> str:
        joint = "@" if is_digest(target) else ":"
        return f"{self.reference.familiar_name()}{joint}{target}"


def catalog(domain: str, config: RegistryConfig) -> list[str]:
    """Return the names of a registry's repositories, where it lists them."""
    endpoint = endpoints(domain, config, mirrors=False)[0]
    what = f"catalog of {domain}"
    transport = Transport(endpoint, config)
    names: set[str] = set()
    try:
        path = "/v2/_catalog?" + urlencode({"n": 1000})
        for page in _pages(transport, path, ("registry:catalog:*",), what):
            names.update(_decode_page(page, _Catalog, what).repositories or ())
            _check_count(len(names), what)
    finally:
        transport.close()
    return sorted(names)


def _drain(response: Response, skip: int) -> Iterator[bytes]:
    """Yield a body without its first `skip` bytes, which a registry without ranges repeats."""
    with response:
        for chunk in response.chunks():
            if skip >= len(chunk):
                skip -= len(chunk)
                continue
            yield chunk[skip:] if skip else chunk
            skip = 0


def _pages(transport: Transport, path: str, scopes: tuple[str, ...], what: str) -> Iterator[bytes]:
    """Yield the pages of a list; a next page elsewhere than at the registry is refused."""
    seen: set[str] = set()
    while len(seen) < _MAX_PAGES:
        seen.add(path)
        response = transport.request("GET", path, scopes=scopes)
        check_status(response, (200,), what)
        yield response.read(_MAX_LIST_BYTES)
        following = _next_link(response.headers.get("link", ""))
        if following is None:
            return
        url = join_url(response.url, following)
        if origin(url) != origin(transport.base):
            raise Unavailable(f"{what}: the next page is said to be on another host")
        if url in seen:
            raise Unavailable(f"{what}: its pages go in circles")
        path = url
    raise Unavailable(f"{what}: more than {_MAX_PAGES} pages")


def _next_link(header: str) -> str | None:
    """Return the target of `<…>; rel="next"` (RFC 8288), or None."""
    for part in header[:8192].split(","):
        target, _, parameters = part.partition(";")
        target = target.strip()
        if target.startswith("<") and target.endswith(">"):
            relation = parameters.replace(" ", "").replace('"', "").lower()
            if "rel=next" in relation.split(";"):
                return target[1:-1]
    return None


def _decode_page(data: bytes, kind: type[T], what: str) -> T:
    try:
        return decode_json(data, kind)
    except msgspec.DecodeError as exc:
        raise Unavailable(f"{what}: the answer cannot be read ({str(exc)[:200]})") from exc


def _check_count(count: int, what: str) -> None:
    if count > _MAX_NAMES:
        raise Unavailable(f"{what}: more than {_MAX_NAMES} names")
