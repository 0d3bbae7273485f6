"""Find a registry's credentials where Docker and Podman keep them.

Read only: `auths`, `credHelpers` and `credsStore` of Docker's `config.json` and of Podman's
`auth.json`. A helper is a program `docker-credential-NAME`; a secret never appears in an
error.
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path

import msgspec

from hutch.decoding import decode_json
from hutch.errors import Denied, InvalidArgument, Unsupported
from hutch.image.registry_config import Credentials, RegistryConfig

__all__ = ["default_auth_files", "find_credentials", "registry_of"]

_HUB_KEYS = ("https://index.docker.io/v1/", "index.docker.io", "docker.io")
_MAX_FILE = 4 << 20
_HELPER_TIMEOUT_S = 30.0
_TOKEN_USER = "<token>"


class _Auth(msgspec.Struct, frozen=True, kw_only=True, rename="lower"):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""
    registrytoken: str = ""


class _AuthFile(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    auths: dict[str, _Auth] | None = None
    cred_helpers: dict[str, str] | None = None
    creds_store: str = ""


class _HelperAnswer(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    username: str = ""
    secret: str = ""


def default_auth_files() -> tuple[str, ...]:
    """Return the files to look in, the most specific first."""
    home = os.environ.get("HOME", "")
    places = []
    if explicit := os.environ.get("REGISTRY_AUTH_FILE"):
        places.append(explicit)
    if docker := os.environ.get("DOCKER_CONFIG"):
        places.append(f"{docker}/config.json")
    elif home:
        places.append(f"{home}/.docker/config.json")
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        places.append(f"{runtime}/containers/auth.json")
    config_home = os.environ.get("XDG_CONFIG_HOME") or (f"{home}/.config" if home else "")
    if config_home:
        places.append(f"{config_home}/containers/auth.json")
    return tuple(places)


def find_credentials(registry: str, repository: str, config: RegistryConfig) -> Credentials | None:
    """Return the credentials for a registry (the domain of a reference, or a mirror's host).

    `repository` lets Podman's keys name part of a registry. Raises `Denied` where a helper
    fails for another reason than not knowing the registry.
    """
    if registry in config.credentials:
        return config.credentials[registry]
    files = default_auth_files() if config.auth_files is None else config.auth_files
    for name in files:
        loaded = _load(Path(name))
        if loaded is None:
            continue
        found = _from_file(loaded, registry, repository)
        if found is not None:
            return found
    return None


def _load(path: Path) -> _AuthFile | None:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError):
        return None
    if len(data) > _MAX_FILE:
        raise InvalidArgument(f"{path}: larger than {_MAX_FILE} bytes")
    try:
        return decode_json(data or b"{}", _AuthFile)
    except msgspec.DecodeError as exc:
        # The text of the exception names a path in the document, never a value.
        raise InvalidArgument(f"{path}: {exc}") from None


def _keys(registry: str, repository: str) -> list[str]:
    """Return the keys that may stand for a registry, the longest first."""
    if registry in ("docker.io", "index.docker.io", "registry-1.docker.io"):
        return [f"docker.io/{repository}", *_HUB_KEYS]
    keys = []
    path = repository
    while path:
        keys.append(f"{registry}/{path}")
        path = path.rpartition("/")[0]
    return [*keys, registry]


def registry_of(key: str) -> str:
    """Return the domain of the registry that a key of `auths` means."""
    normal = _normal(key)
    return "docker.io" if normal in _HUB_KEYS else normal


def _normal(key: str) -> str:
    """Return a key of `auths` without what old versions of Docker put around the host."""
    if key in _HUB_KEYS:
        return key
    bare = key.removeprefix("https://").removeprefix("http://").rstrip("/")
    return bare.removesuffix("/v1").removesuffix("/v2")


def _from_file(file: _AuthFile, registry: str, repository: str) -> Credentials | None:
    keys = _keys(registry, repository)
    for key in keys:
        helper = (file.cred_helpers or {}).get(key)
        if helper:
            return _ask_helper(helper, key)
    if file.creds_store:
        found = _ask_helper(file.creds_store, _HUB_KEYS[0] if _HUB_KEYS[0] in keys else registry)
        if found is not None:
            return found
    auths = {_normal(key): auth for key, auth in (file.auths or {}).items()}
    for key in keys:
        if key in auths:
            found = _decode(auths[key], key)
            if found is not None:
                return found
    return None


def _decode(auth: _Auth, key: str) -> Credentials | None:
    username, password = auth.username, auth.password
    if auth.auth:
        try:
            text = base64.b64decode(auth.auth, validate=True).decode().strip("\0")
        except (binascii.Error, ValueError):
            raise InvalidArgument(f"auths[{key!r}].auth: is not base64 text") from None
        username, colon, password = text.partition(":")
        if not colon:
            raise InvalidArgument(f"auths[{key!r}].auth: is not user:password")
    if not (username or password or auth.identitytoken or auth.registrytoken):
        return None
    return Credentials(
        username=username,
        password=password,
        identity_token=auth.identitytoken,
        registry_token=auth.registrytoken,
    )


def _ask_helper(name: str, key: str) -> Credentials | None:
    from hutch.process.run import run_command

    if not name or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise InvalidArgument(f"bad name of a credential helper: {name[:80]!r}")
    program = f"docker-credential-{name}"
    try:
        done = run_command([program, "get"], input=key.encode(), timeout_s=_HELPER_TIMEOUT_S)
    except Unsupported:
        raise Denied(
            f"credential helper {program}: not found",
            hint="install it, or remove it from config.json",
        ) from None
    if done.returncode != 0:
        said = bytes(done.stdout)[:2000] + bytes(done.stderr)[:2000]
        if b"not found" in said.lower():
            return None
        raise Denied(f"credential helper {program}: failed with status {done.returncode} for {key}")
    try:
        answer = decode_json(done.stdout, _HelperAnswer)
    except msgspec.DecodeError:
        raise Denied(f"credential helper {program}: gave an answer that is not JSON") from None
    if answer.username == _TOKEN_USER:
        return Credentials(identity_token=answer.secret)
    if not answer.username and not answer.secret:
        return None
    return Credentials(username=answer.username, password=answer.secret)
