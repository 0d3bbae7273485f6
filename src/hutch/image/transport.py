"""HTTP to one registry endpoint: trust, authorization, redirects, retries with back-off.

Everything above speaks of blobs and manifests; everything about sockets is here. Errors
name method, host and path, never a query (it may be signed) or a header.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from hutch.errors import Denied, HutchError, Unavailable
from hutch.image.answers import (
    RETRY_STATUSES,
    describe,
    join_url,
    origin,
    read_bounded,
    reason,
    retry_after,
)
from hutch.image.auth import Authenticator, Fetch, Fetched
from hutch.image.credentials import find_credentials
from hutch.image.registry_config import Credentials, Endpoint, RegistryConfig, trust
from hutch.image.trust import NotTls, proxy_for, tls_context, tls_error

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

    from hutch.image.connections import Sockets

__all__ = ["Body", "Cancelled", "Response", "Transport"]

_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_MAX_REDIRECTS = 10
_FIRST_WAIT_S = 0.25
_SMALL_BODY = 64 << 10
_CHUNK = 1 << 18

Body = Callable[[], Iterable[bytes] | bytes]
"""Makes the body of a request anew, for every time it has to be sent."""


class Cancelled(HutchError):
    """Another part of the same work failed, so this part stopped."""


class Response:
    """One answer: status, headers (names in lower case) and a body to read once.

    Close it, or read it to its end, to give the connection back.
    """

    def __init__(self, raw: BaseHTTPResponse, url: str) -> None:
        self._raw = raw
        self.url = url
        self.status = raw.status
        self.headers = {name.lower(): value for name, value in raw.headers.items()}

    def read(self, limit: int) -> bytes:
        """Return the whole body; raise `InvalidArgument` where it is longer than `limit`."""
        with self:
            return read_bounded(self.chunks(), limit, describe(self.url))

    def chunks(self, size: int = _CHUNK) -> Iterator[bytes]:
        """Yield the body in pieces; raise `Unavailable` where the connection breaks."""
        from urllib3.exceptions import HTTPError

        while True:
            try:
                data = self._raw.read(size, decode_content=False)
            except (HTTPError, OSError) as exc:
                raise Unavailable(f"{describe(self.url)}: connection lost ({reason(exc)})") from exc
            if not data:
                return
            yield data

    def close(self) -> None:
        """Give the connection back if the rest of the body is small, else close it."""
        if not self._raw.closed:
            length = self.headers.get("content-length", "")
            if length.isdigit() and int(length) <= _SMALL_BODY:
                try:
                    for _ in self.chunks():
                        pass
                except Unavailable:
                    pass
        if not self._raw.closed:
            self._raw.close()
        self._raw.release_conn()

    def discard(self) -> None:
        """Close the connection without waiting for a body that nobody wants."""
        self._raw.close()
        self.close()

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Transport:
    """Requests to one endpoint; thread-safe. Close it when done.

    `stop`, once set, ends waits and makes further requests raise `Cancelled`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        config: RegistryConfig,
        *,
        repository: str = "",
        stop: threading.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.endpoint = endpoint
        self._config = config
        self._repository = repository
        self._stop = stop or threading.Event()
        self._chance = chance
        self._auth = Authenticator(self._credentials, self._fetch_token, clock=clock)
        self._pools: dict[str, PoolManager] = {}
        self._sockets: Sockets | None = None
        self._lock = threading.Lock()
        self._base: str | None = None

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            pools, self._pools = list(self._pools.values()), {}
        for pool in pools:
            pool.clear()

    def abort(self) -> None:
        """Break every transfer that is under way."""
        if self._sockets is not None:
            self._sockets.shutdown()

    # ---- requests ---------------------------------------------------------------------

    @property
    def base(self) -> str:
        """The endpoint's URL up to the host, found by asking /v2/ once."""
        with self._lock:
            found = self._base
        return found if found is not None else self._ping()

    def request(
        self,
        method: str,
        path: str,
        *,
        scopes: tuple[str, ...] = (),
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        retry: bool = True,
    ) -> Response:
        """Send a request and return the answer, whatever its status.

        `path` is under the endpoint, or a URL the registry gave. Lost connections and
        answers that ask for patience (429, 5xx) are tried again while `retry`.
        Raises `Unavailable` when tries run out, `Denied` when nobody is let in.
        """
        url = urljoin(self.base + "/", path)
        attempt = 0
        while True:
            attempt += 1
            response, problem, wait_s = self._attempt(method, url, scopes, headers or {}, body)
            last = attempt >= self._config.tries or not retry
            if response is not None and (problem is None or last):
                return response
            if last:
                raise Unavailable(f"{method} {describe(url)}: {problem}")
            if response is not None:
                response.close()
            if wait_s is not None and wait_s > self._config.max_wait_s:
                raise Unavailable(
                    f"{method} {describe(url)}: {problem}",
                    hint=f"the registry asks to come back in {wait_s:.0f} s",
                )
            self.pause(attempt, wait_s)

    def pause(self, attempt: int, at_least_s: float | None = None) -> None:
        """Wait before try number `attempt` + 1: exponential, jittered; `Cancelled` on stop."""
        limit = min(self._config.max_wait_s, _FIRST_WAIT_S * 2 ** (attempt - 1))
        wait_s = max(at_least_s or 0.0, limit * (0.5 + self._chance() / 2))
        if self._stop.wait(wait_s):
            raise Cancelled("stopped")

    def _attempt(
        self,
        method: str,
        url: str,
        scopes: tuple[str, ...],
        headers: Mapping[str, str],
        body: Body | None,
    ) -> tuple[Response | None, str | None, float | None]:
        """Send once; return the answer, what is wrong with it (None: nothing), how long to wait."""
        try:
            response = self._authorized(method, url, scopes, headers, body)
        except _Lost as exc:
            return None, str(exc), None
        if response.status in RETRY_STATUSES:
            return response, f"answered {response.status}", retry_after(response)
        return response, None, None

    def _authorized(
        self,
        method: str,
        url: str,
        scopes: tuple[str, ...],
        headers: Mapping[str, str],
        body: Body | None,
    ) -> Response:
        home = origin(url) == origin(self.base)
        for last in (False, True):
            sent = dict(headers)
            secure = url.startswith("https:")
            authorization = self._auth.header(scopes, secure=secure) if home else None
            if authorization is not None:
                sent["Authorization"] = authorization
            response = self._follow(method, url, sent, body)
            elsewhere = origin(response.url) != origin(url)
            if response.status != 401 or last or not home or elsewhere:
                return response
            if not self._auth.accept(response.headers, scopes):
                return response
            response.close()
        raise AssertionError("unreachable")

    def _follow(
        self, method: str, url: str, headers: dict[str, str], body: Body | None
    ) -> Response:
        """Send a request and follow redirects; another host gets no Authorization."""
        for _ in range(_MAX_REDIRECTS):
            response = self._send(method, url, headers, body)
            target = response.headers.get("location")
            moves = response.status in (307, 308) or method in ("GET", "HEAD")
            if response.status not in _REDIRECTS or not target or not moves:
                return response
            response.close()
            there = join_url(url, target)
            scheme = urlsplit(there).scheme
            if url.startswith("https:") and scheme == "http" and self.endpoint.verify:
                raise Denied(
                    f"{describe(url)}: redirects to {urlsplit(there).hostname} without encryption"
                )
            if origin(there) != origin(url):
                headers = {k: v for k, v in headers.items() if k != "Authorization"}
            url = there
        raise Unavailable(f"{describe(url)}: more than {_MAX_REDIRECTS} redirects")

    def _send(
        self, method: str, url: str, headers: Mapping[str, str], body: Body | None
    ) -> Response:
        from urllib3.exceptions import HTTPError, LocationValueError, SSLError

        if self._stop.is_set():
            raise Cancelled("stopped")
        sent = {"User-Agent": "hutch", "Accept-Encoding": "identity", **headers}
        try:
            raw = self._pool(url).request(
                method,
                url,
                body=body() if body is not None else None,
                headers=sent,
                preload_content=False,
                decode_content=False,
                redirect=False,
                retries=False,
            )
        except LocationValueError as exc:
            raise Unavailable(f"{describe(url)}: not a usable address") from exc
        except SSLError as exc:
            meaning = tls_error(url, exc)
            raise (meaning if meaning is not None else _Lost("TLS handshake failed")) from exc
        except (HTTPError, OSError) as exc:
            raise _Lost(reason(exc)) from exc
        return Response(raw, url)

    # ---- trust ------------------------------------------------------------------------

    def _ping(self) -> str:
        """Find how the endpoint is reached, and take its challenge beforehand."""
        problem: HutchError | None = None
        for attempt in (1, 2, 3):
            for scheme in self.endpoint.schemes:
                base = f"{scheme}://{self.endpoint.host}"
                try:
                    with self._send("GET", f"{base}/v2/", {}, None) as response:
                        if response.status == 401:
                            self._auth.accept(response.headers, ())
                        self._check_api(response)
                except _Lost as exc:
                    problem = Unavailable(f"registry {self.endpoint.host}: {exc}")
                except NotTls as exc:
                    problem = exc
                else:
                    with self._lock:
                        self._base = base
                    return base
            if isinstance(problem, NotTls) or attempt == 3 or self.endpoint.mirror:
                break
            self.pause(attempt)
        assert problem is not None
        raise problem

    def _check_api(self, response: Response) -> None:
        kind = response.headers.get("content-type", "")
        if response.status == 404 and "docker-distribution-api-version" not in response.headers:
            raise Unavailable(
                f"registry {self.endpoint.host}: is no registry (answers 404 to /v2/, {kind[:60]})"
            )

    def _pool(self, url: str) -> PoolManager:
        """Return the connection pool for a URL: its own trust for the endpoint's host."""
        parts = urlsplit(url)
        proxy = proxy_for(parts.scheme, parts.hostname or "")
        key = f"{parts.scheme}://{parts.netloc} {proxy}"
        with self._lock:
            pool = self._pools.get(key)
            if pool is None:
                pool = self._pools[key] = self._new_pool(parts.scheme, parts.netloc, proxy)
        return pool

    def _new_pool(self, scheme: str, host: str, proxy: str | None) -> PoolManager:
        import urllib3

        from hutch.image.connections import Sockets, open_pool

        if self._sockets is None:
            self._sockets = Sockets()
        timeout = urllib3.Timeout(
            connect=self._config.connect_timeout_s, read=self._config.read_timeout_s
        )
        size = max(4, self._config.parallel + 2)
        context = None
        if scheme == "https":
            _, verify = trust(host, self._config)
            context = tls_context(host, verify, self._config.ca_dirs)
            if not verify:
                urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        return open_pool(
            self._sockets, proxy=proxy, maxsize=size, timeout=timeout, ssl_context=context
        )

    # ---- credentials ------------------------------------------------------------------

    def _credentials(self) -> Credentials | None:
        name = self.endpoint.host if self.endpoint.mirror else self.endpoint.registry
        return find_credentials(name, self._repository, self._config)

    def _fetch_token(self, fetch: Fetch) -> Fetched:
        """Make the authenticator's request; redirects are not followed with credentials."""
        problem = ""
        body = fetch.body
        for attempt in range(1, self._config.tries + 1):
            wait_s: float | None = None
            try:
                with self._send(
                    fetch.method, fetch.url, fetch.headers, (lambda: body) if body else None
                ) as response:
                    if response.status not in RETRY_STATUSES:
                        data = read_bounded(response.chunks(), 1 << 20, describe(fetch.url))
                        return Fetched(status=response.status, body=data)
                    problem, wait_s = f"answered {response.status}", retry_after(response)
            except (_Lost, Unavailable) as exc:
                problem = str(exc)
            if wait_s is not None and wait_s > self._config.max_wait_s:
                break
            if attempt < self._config.tries:
                self.pause(attempt, wait_s)
        raise Unavailable(f"token server {urlsplit(fetch.url).hostname}: {problem}")


class _Lost(Exception):
    """The connection failed or broke before an answer; trying again may help."""
