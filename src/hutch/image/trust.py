"""Whom to trust on the way to a registry: certificates, and the environment's proxies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from hutch.errors import InvalidArgument, Unavailable
from hutch.image.registry_config import is_loopback

if TYPE_CHECKING:
    import ssl

__all__ = ["NotTls", "Untrusted", "proxy_for", "tls_context", "tls_error"]

# What OpenSSL says of bytes that are no TLS record, by version.
_PLAIN_ANSWER = (
    "WRONG_VERSION_NUMBER",
    "RECORD_LAYER_FAILURE",
    "HTTP_REQUEST",
    "UNKNOWN_PROTOCOL",
    "PACKET_LENGTH_TOO_LONG",
)


class NotTls(Unavailable):
    """The peer does not speak TLS."""


class Untrusted(Unavailable):
    """The peer speaks TLS with a certificate that nobody known vouches for."""


def tls_error(url: str, exc: Exception) -> NotTls | Untrusted | None:
    """Return what a failed handshake means, or None where the connection merely broke."""
    text = str(exc)
    host = urlsplit(url).netloc
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate" in text.lower():
        return Untrusted(
            f"registry {host}: its certificate is not trusted",
            hint=f"put the authority's certificate into /etc/docker/certs.d/{host}/ca.crt",
        )
    if any(mark in text for mark in _PLAIN_ANSWER):
        return NotTls(
            f"registry {host}: does not speak TLS",
            hint="add it to `insecure` of registries.json to allow plain HTTP",
        )
    return None


def tls_context(host: str, verify: bool, ca_dirs: tuple[str, ...]) -> ssl.SSLContext:
    """Return the trust for a host: the system's, and what the CA directories hold for it."""
    import ssl

    context = ssl.create_default_context()
    for directory in (Path(base) / host for base in ca_dirs if host):
        try:
            names = sorted(entry.name for entry in directory.iterdir())
        except OSError:
            continue
        for name in names:
            path = directory / name
            try:
                if name.endswith(".crt"):
                    context.load_verify_locations(path)
                elif name.endswith(".cert"):
                    context.load_cert_chain(path, path.with_suffix(".key"))
            except (OSError, ssl.SSLError) as exc:
                raise InvalidArgument(f"{path}: cannot be used ({exc})") from exc
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def proxy_for(scheme: str, host: str) -> str | None:
    """Return the proxy that the environment names for a host; loopback never has one."""
    from urllib import request

    if is_loopback(host if ":" not in host else f"[{host}]"):
        return None
    proxies = request.getproxies_environment()
    # typeshed has the name on macOS and Windows only.
    bypass = getattr(request, "proxy_bypass_environment")  # noqa: B009
    if scheme not in proxies or bypass(host, proxies):
        return None
    found = proxies[scheme]
    return found if "://" in found else f"http://{found}"
