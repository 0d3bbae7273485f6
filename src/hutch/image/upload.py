"""Bring one blob into a repository: find it, mount it, send it whole, or send it in chunks.

Each try begins a new upload session: what a broken one holds is not to be trusted, except
between chunks, where the registry says how far it got.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import FileIO
from urllib.parse import quote, urlsplit

import msgspec

from hutch.errors import Denied, IntegrityError, Unavailable
from hutch.image.answers import RETRY_STATUSES, check_status, describe, join_url, retry_after
from hutch.image.registry import Repository
from hutch.image.transport import Response
from hutch.oci.digest import is_digest

__all__ = ["Sent", "upload_blob"]

_PIECE = 1 << 20
_CHUNK = 8 << 20
_MAX_CHUNK = 256 << 20
_MAX_MOUNTS = 3
_WHOLE_REFUSED = frozenset((400, 404, 405, 411, 413, 415, 416, 501))
_BINARY = "application/octet-stream"

Report = Callable[[int], None]


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """How a blob came to be there: `exists`, `mounted` (`origin` says whence), `pushed`."""

    how: str
    bytes: int = 0
    origin: str = ""


class _Blob(msgspec.Struct, frozen=True, kw_only=True):
    digest: str
    size: int
    open: Callable[[], FileIO]
    report: Report


def upload_blob(
    repository: Repository,
    digest: str,
    size: int,
    opener: Callable[[], FileIO],
    *,
    origins: Sequence[str] = (),
    report: Report = lambda done: None,
) -> Sent:
    """Make a blob be in the repository.

    `origins` are paths of repositories of the same registry that may hold it; `opener`
    opens the content anew for every try.
    """
    blob = _Blob(digest=digest, size=size, open=opener, report=report)
    if repository.has_blob(digest):
        return Sent(how="exists")
    for origin in origins[:_MAX_MOUNTS]:
        if _mount(repository, digest, origin):
            return Sent(how="mounted", origin=origin)
    whole, problem = True, ""
    for attempt in range(1, repository.tries + 1):
        try:
            answer = _send_whole(repository, blob) if whole else _send_chunks(repository, blob)
        except Unavailable as exc:
            problem, wait_s, whole = exc.message, None, whole and attempt < 2
        else:
            if answer.status in (201, 204):
                _check_digest(answer, digest)
                return Sent(how="pushed", bytes=size)
            wait_s = retry_after(answer)
            if whole and answer.status in _WHOLE_REFUSED:
                whole = False
                answer.close()
                continue
            if answer.status not in RETRY_STATUSES:
                check_status(answer, (201,), _what(repository, digest))
            problem = f"registry answered {answer.status}"
            answer.close()
        if attempt < repository.tries:
            repository.home.pause(attempt, wait_s)
            # The answer to a finished upload may be all that was lost.
            if repository.has_blob(digest):
                return Sent(how="pushed", bytes=size)
    raise Unavailable(f"{_what(repository, digest)}: {problem}")


def _what(repository: Repository, digest: str) -> str:
    return f"blob {repository.reference.familiar_name()}@{digest}"


def _mount(repository: Repository, digest: str, origin: str) -> bool:
    """Ask the registry to take a blob over from another of its repositories."""
    home = repository.home
    query = f"blobs/uploads/?mount={quote(digest)}&from={quote(origin, safe='')}"
    scopes = (*repository.scopes(home), f"repository:{origin}:pull")
    try:
        answer = home.request("POST", repository.path(home, query), scopes=scopes, body=lambda: b"")
    except Denied:
        return False
    with answer:
        if answer.status == 202:
            # A session that nobody will use: a courtesy to end it, its failure no matter.
            _cancel(repository, _location(repository, answer))
        return answer.status == 201


def _cancel(repository: Repository, location: str) -> None:
    try:
        repository.home.request(
            "DELETE", location, scopes=repository.scopes(repository.home), retry=False
        ).close()
    except (Unavailable, Denied):
        pass


def _start(repository: Repository, digest: str) -> Response:
    home = repository.home
    answer = home.request(
        "POST",
        repository.path(home, "blobs/uploads/"),
        scopes=repository.scopes(home),
        body=lambda: b"",
    )
    check_status(answer, (202,), _what(repository, digest))
    answer.close()
    return answer


def _send_whole(repository: Repository, blob: _Blob) -> Response:
    """Send a blob in one PUT."""
    location = _location(repository, _start(repository, blob.digest))
    return repository.home.request(
        "PUT",
        _with_digest(location, blob.digest),
        scopes=repository.scopes(repository.home),
        headers={"Content-Type": _BINARY, "Content-Length": str(blob.size)},
        body=partial(_pieces, blob, 0, blob.size),
        retry=False,
    )


def _send_chunks(repository: Repository, blob: _Blob) -> Response:
    """Send a blob in PATCHes, each as large as the registry wants at least."""
    scopes = repository.scopes(repository.home)
    started = _start(repository, blob.digest)
    location, offset = _location(repository, started), 0
    wanted = started.headers.get("oci-chunk-min-length", "")
    chunk = min(max(_CHUNK, int(wanted[:12]) if wanted.isdigit() else 0), _MAX_CHUNK)
    while offset < blob.size:
        end = min(offset + chunk, blob.size)
        answer = repository.home.request(
            "PATCH",
            location,
            scopes=scopes,
            headers={
                "Content-Type": _BINARY,
                "Content-Length": str(end - offset),
                "Content-Range": f"{offset}-{end - 1}",
            },
            body=partial(_pieces, blob, offset, end),
            retry=False,
        )
        if answer.status != 202:
            return answer
        answer.close()
        location = _location(repository, answer)
        offset = _reached(answer, end, offset, repository, blob.digest)
    return repository.home.request(
        "PUT",
        _with_digest(location, blob.digest),
        scopes=scopes,
        headers={"Content-Type": _BINARY, "Content-Length": "0"},
        body=lambda: b"",
        retry=False,
    )


def _reached(answer: Response, sent: int, before: int, repository: Repository, digest: str) -> int:
    """Return where the next chunk begins; the registry may have taken less than was sent."""
    last = answer.headers.get("range", "").rpartition("-")[2]
    offset = int(last[:18]) + 1 if last.isdigit() else sent
    if not before < offset <= sent:
        raise Unavailable(f"{_what(repository, digest)}: the registry lost what was sent")
    return offset


def _pieces(blob: _Blob, first: int, last: int) -> Iterator[bytes]:
    with blob.open() as file:
        file.seek(first)
        position = first
        while position < last:
            data = file.read(min(_PIECE, last - position))
            if not data:
                raise IntegrityError(f"blob {blob.digest}: shorter on disk than recorded")
            position += len(data)
            yield data
            blob.report(position)


def _location(repository: Repository, answer: Response) -> str:
    """Return where an upload goes on; a registry behind a TLS proxy may say http for itself."""
    target = answer.headers.get("location", "")
    if not target:
        raise Unavailable(f"{describe(answer.url)}: no Location in the answer")
    url = join_url(answer.url, target)
    here, there = urlsplit(answer.url), urlsplit(url)
    if here.scheme == "https" and there.scheme == "http":
        if here.hostname != there.hostname:
            raise Denied(f"{describe(answer.url)}: wants the upload sent without encryption")
        url = there._replace(scheme="https", netloc=here.netloc).geturl()
    return url


def _with_digest(location: str, digest: str) -> str:
    return f"{location}{'&' if '?' in location else '?'}digest={quote(digest)}"


def _check_digest(answer: Response, digest: str) -> None:
    stated = answer.headers.get("docker-content-digest", "")
    answer.close()
    if is_digest(stated) and stated != digest:
        raise IntegrityError(f"blob {digest}: the registry stored {stated}")
