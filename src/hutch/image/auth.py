"""Answer a registry's challenges: basic authentication and bearer tokens.

Tokens are kept per scope until shortly before they expire. See the distribution project's
"Token Authentication Specification" and "OAuth2 token" pages.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Mapping
from urllib.parse import urlencode, urlsplit

import msgspec

from hutch.decoding import decode_json
from hutch.errors import Denied, Unavailable
from hutch.image.registry_config import Credentials, is_loopback

__all__ = ["Authenticator", "Challenge", "Fetch", "parse_challenges"]

_DEFAULT_LIFE_S = 60.0
_MARGIN_S = 10.0
_MAX_TOKEN = 256 << 10
_CLIENT_ID = "hutch"


class Fetched(msgspec.Struct, frozen=True, kw_only=True):
    """An answer of the token server."""

    status: int
    body: bytes


class Fetch(msgspec.Struct, frozen=True, kw_only=True):
    """A request to the token server, made by the transport with its own trust and retries."""

    method: str
    url: str
    headers: dict[str, str]
    body: bytes | None = None


class Challenge(msgspec.Struct, frozen=True, kw_only=True):
    """One challenge of a WWW-Authenticate header; `scheme` in lower case."""

    scheme: str
    parameters: dict[str, str]


class _Token(msgspec.Struct, frozen=True, kw_only=True):
    token: str = ""
    access_token: str = ""
    expires_in: float | None = None


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    header: str
    until: float


class Authenticator:
    """Keeps what one registry needs in `Authorization`; thread-safe.

    `credentials` is called once, when the first challenge needs it; `secure` is whether
    the registry is reached over TLS.
    """

    def __init__(
        self,
        credentials: Callable[[], Credentials | None],
        fetch: Callable[[Fetch], Fetched],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load = credentials
        self._fetch = fetch
        self._clock = clock
        self._lock = threading.Lock()
        self._loaded = False
        self._credentials: Credentials | None = None
        self._challenge: Challenge | None = None
        self._kept: dict[tuple[str, ...], _Kept] = {}

    def header(self, scopes: tuple[str, ...], *, secure: bool) -> str | None:
        """Return the value of `Authorization` for the scopes, fetching a token if needed.

        None as long as no challenge was seen: then ask without.
        """
        with self._lock:
            challenge = self._challenge
            if challenge is None:
                return None
            if challenge.scheme == "basic":
                return self._basic()
            kept = self._kept.get(scopes)
            if kept is None or kept.until <= self._clock():
                kept = self._new_token(challenge, scopes, secure=secure)
                self._kept[scopes] = kept
            return kept.header

    def accept(self, headers: Mapping[str, str], scopes: tuple[str, ...]) -> bool:
        """Take the challenge of a 401 answer; return whether asking again can help."""
        header = headers.get("www-authenticate", "")
        challenge = _best(parse_challenges(header))
        if challenge is None:
            return False
        with self._lock:
            known = self._challenge is not None and self._challenge.scheme == challenge.scheme
            self._challenge = challenge
            if challenge.scheme == "basic":
                return not known and self._creds() is not None
            self._kept.pop(scopes, None)
            return True

    # ---- with the lock held -----------------------------------------------------------

    def _creds(self) -> Credentials | None:
        if not self._loaded:
            self._credentials = self._load()
            self._loaded = True
        return self._credentials

    def _basic(self) -> str | None:
        credentials = self._creds()
        if credentials is None:
            return None
        return _basic_header(credentials)

    def _new_token(self, challenge: Challenge, scopes: tuple[str, ...], *, secure: bool) -> _Kept:
        credentials = self._creds()
        if credentials is not None and credentials.registry_token:
            return _Kept(header=f"Bearer {credentials.registry_token}", until=float("inf"))
        realm = challenge.parameters.get("realm", "")
        try:
            parts = urlsplit(realm)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Unavailable(f"registry: names no usable token server ({realm[:120]!r})")
        if parts.scheme == "http" and secure and not is_loopback(parts.netloc):
            raise Denied(f"registry: wants its token from {parts.hostname} without encryption")
        wanted = scopes or tuple(challenge.parameters.get("scope", "").split())
        request = _token_request(realm, challenge, wanted, credentials)
        answer = self._fetch(request)
        if answer.status in (404, 405) and request.method == "POST":
            raise Denied(
                f"token server {parts.hostname}: takes no identity token",
                hint="log in again with a password",
            )
        return self._keep(answer, parts.hostname, anonymous=credentials is None)

    def _keep(self, answer: Fetched, host: str, *, anonymous: bool) -> _Kept:
        if answer.status in (400, 401, 403):
            raise Denied(
                f"token server {host}: refuses "
                + ("anonymous access" if anonymous else "these credentials"),
                hint="log in to the registry with docker login or podman login",
            )
        if answer.status != 200:
            raise Unavailable(f"token server {host}: answered {answer.status}")
        try:
            token = decode_json(answer.body, _Token)
        except msgspec.DecodeError:
            raise Unavailable(f"token server {host}: gave an answer that cannot be read") from None
        text = token.token or token.access_token
        if not text or len(text) > _MAX_TOKEN or not _is_header_text(text):
            raise Unavailable(f"token server {host}: gave no usable token")
        life = _DEFAULT_LIFE_S if token.expires_in is None else token.expires_in
        return _Kept(
            header=f"Bearer {text}", until=self._clock() + max(life - _MARGIN_S, life / 2, 1.0)
        )


def _is_header_text(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _basic_header(credentials: Credentials) -> str:
    pair = f"{credentials.username}:{credentials.password}".encode()
    return "Basic " + base64.b64encode(pair).decode()


def _token_request(
    realm: str, challenge: Challenge, scopes: tuple[str, ...], credentials: Credentials | None
) -> Fetch:
    service = challenge.parameters.get("service", "")
    if credentials is not None and credentials.identity_token:
        form = {
            "grant_type": "refresh_token",
            "service": service,
            "client_id": _CLIENT_ID,
            "scope": " ".join(scopes),
            "refresh_token": credentials.identity_token,
        }
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        return Fetch(method="POST", url=realm, headers=kind, body=urlencode(form).encode())
    query = [("service", service)] if service else []
    query += [("scope", scope) for scope in scopes]
    headers = {}
    if credentials is not None:
        query.append(("account", credentials.username))
        headers["Authorization"] = _basic_header(credentials)
    joint = "&" if "?" in realm else "?"
    return Fetch(method="GET", url=f"{realm}{joint}{urlencode(query)}", headers=headers)


def _best(challenges: list[Challenge]) -> Challenge | None:
    for scheme in ("bearer", "basic"):
        for challenge in challenges:
            if challenge.scheme == scheme:
                return challenge
    return None


def parse_challenges(header: str) -> list[Challenge]:
    """Return the challenges of a WWW-Authenticate header (RFC 9110, 11.6.1), linear.

    What cannot be read is skipped: a registry must not be able to crash its client.
    """
    challenges: list[Challenge] = []
    position, end = 0, min(len(header), 8192)
    while position < end:
        position = _skip(header, position, " \t,")
        start = position
        while position < end and header[position] not in ' \t,="':
            position += 1
        word = header[start:position]
        if position < end and header[position] == "=" and challenges:
            value, position = _value(header, position + 1, end)
            challenges[-1].parameters.setdefault(word.lower(), value)
        elif word:
            challenges.append(Challenge(scheme=word.lower(), parameters={}))
        elif position < end:
            position += 1
    return challenges


def _skip(text: str, position: int, letters: str) -> int:
    while position < len(text) and text[position] in letters:
        position += 1
    return position


def _value(header: str, position: int, end: int) -> tuple[str, int]:
    if position < end and header[position] == '"':
        letters: list[str] = []
        position += 1
        while position < end and header[position] != '"':
            if header[position] == "\\" and position + 1 < end:
                position += 1
            letters.append(header[position])
            position += 1
        return "".join(letters), position + 1
    start = position
    while position < end and header[position] not in " \t,":
        position += 1
    return header[start:position], position
