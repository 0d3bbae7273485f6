"""Who may read a registry: credentials from files and helpers, tokens, and what never leaks."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest

from hutch.errors import Denied, HutchError, InvalidArgument, Unavailable
from hutch.image.auth import parse_challenges
from hutch.image.credentials import default_auth_files, find_credentials
from hutch.image.pull import pull
from hutch.image.push import push
from hutch.image.registry import Repository
from hutch.image.registry_config import Credentials, RegistryConfig
from hutch.oci.reference import parse
from tests.image.registries import (
    FAST,
    HTPASSWD,
    PASSWORD,
    USER,
    Asked,
    Fault,
    Proxy,
    Registry,
    Root,
    make_image,
    running_proxy,
    running_registry,
)
from tests.requires import requires

pytestmark = [requires("root", "docker-registry"), pytest.mark.integration]

PAIR = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that wants alice's password."""
    directory = tmp_path_factory.mktemp("private")
    (directory / "htpasswd").write_text(HTPASSWD + "\n")
    auth = f"auth:\n  htpasswd: {{realm: test, path: {directory}/htpasswd}}\n"
    with running_registry(directory, auth=auth) as host:
        yield Registry(host, f"Basic {PAIR}")


def with_credentials(host: str, **secret: str) -> RegistryConfig:
    return msgspec.structs.replace(FAST, credentials={host: Credentials(**secret)})


def with_file(path: Path, content: object) -> RegistryConfig:
    path.write_text(json.dumps(content))
    return msgspec.structs.replace(FAST, auth_files=(str(path),))


# ---- basic ---------------------------------------------------------------------------------


def test_a_password_opens_a_private_registry(private: Registry, root: Root) -> None:
    private.put_image("mine", "v1", make_image({"a": b"private"}))
    name = f"{private.host}/mine:v1"
    with pytest.raises(Denied) as failure:
        pull(name, config=FAST, **root.parts())
    assert "docker login" in str(failure.value.hint)
    with pytest.raises(Denied) as failure:
        pull(
            name,
            config=with_credentials(private.host, username=USER, password="wrong-secret"),
            **root.parts(),
        )
    assert "wrong-secret" not in str(failure.value)
    config = with_credentials(private.host, username=USER, password=PASSWORD)
    assert pull(name, config=config, **root.parts()).changed
    root.images.tag(name, f"{private.host}/mine:v2")
    parts = {k: v for k, v in root.parts().items() if k != "layers"}
    push(f"{private.host}/mine:v2", config=config, **parts)
    with Repository(parse(name), config) as repository:
        assert repository.tags() == ["v1", "v2"]


@pytest.mark.parametrize("key", ["{host}", "http://{host}", "https://{host}/v1/", "{host}/filed"])
def test_credentials_come_from_dockers_file(
    private: Registry, root: Root, tmp_path: Path, key: str
) -> None:
    private.put_image("filed", "v1", make_image({"a": b"filed"}))
    content = {"auths": {key.format(host=private.host): {"auth": PAIR}}}
    config = with_file(tmp_path / "config.json", content)
    assert pull(f"{private.host}/filed:v1", config=config, **root.parts()).changed


@pytest.mark.parametrize("field", ["credsStore", "credHelpers"])
def test_credentials_come_from_a_helper(
    private: Registry,
    root: Root,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
) -> None:
    private.put_image("helped", "v1", make_image({"a": b"helped"}))
    helper = tmp_path / "docker-credential-hutchtest"
    answer = json.dumps({"ServerURL": private.host, "Username": USER, "Secret": PASSWORD})
    helper.write_text(
        f"#!/bin/sh\nread host\n[ \"$1 $host\" = 'get {private.host}' ] && echo '{answer}' ||"
        " { echo credentials not found in native keychain; exit 1; }\n"
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    value = "hutchtest" if field == "credsStore" else {private.host: "hutchtest"}
    config = with_file(tmp_path / "config.json", {field: value})
    assert pull(f"{private.host}/helped:v1", config=config, **root.parts()).changed
    assert find_credentials("elsewhere.example", "x", config) is None


def test_a_helper_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_file(tmp_path / "config.json", {"credHelpers": {"r.example": "missing"}})
    with pytest.raises(Denied, match="docker-credential-missing: not found"):
        find_credentials("r.example", "x", config)
    helper = tmp_path / "docker-credential-broken"
    helper.write_text("#!/bin/sh\necho 'Secret: hunter2'; exit 3\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    config = with_file(tmp_path / "config.json", {"credHelpers": {"r.example": "broken"}})
    with pytest.raises(Denied, match="failed with status 3") as failure:
        find_credentials("r.example", "x", config)
    assert "hunter2" not in str(failure.value)
    config = with_file(tmp_path / "config.json", {"credsStore": "../../bin/sh"})
    with pytest.raises(InvalidArgument, match="bad name of a credential helper"):
        find_credentials("r.example", "x", config)


def test_the_more_specific_key_wins(tmp_path: Path) -> None:
    def auth(name: str) -> dict[str, str]:
        return {"auth": base64.b64encode(f"{name}:p".encode()).decode()}

    content = {
        "auths": {
            "r.example": auth("host"),
            "r.example/team": auth("team"),
            "https://index.docker.io/v1/": auth("hub"),
        }
    }
    config = with_file(tmp_path / "auth.json", content)

    def user(registry: str, repository: str) -> str:
        found = find_credentials(registry, repository, config)
        return found.username if found else ""

    assert user("r.example", "other/x") == "host"
    assert user("r.example", "team/x") == "team"
    assert user("r.example:5000", "x") == ""
    assert user("docker.io", "library/debian") == "hub"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "Expected `object`"),
        ("{", "truncated"),
        ('{"auths": {"r.example": {"auth": "%%%"}}}', "not base64"),
        ('{"auths": {"r.example": {"auth": "c2VjcmV0"}}}', "not user:password"),
        ('{"auths": {"r.example": {"auth": 5}}}', "auth"),
    ],
)
def test_a_broken_file_is_named_without_its_secrets(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    config = msgspec.structs.replace(FAST, auth_files=(str(path),))
    with pytest.raises(InvalidArgument, match=said) as failure:
        find_credentials("r.example", "x", config)
    assert "secret" not in str(failure.value)


def test_where_credentials_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/h")
    assert default_auth_files() == ("/h/.docker/config.json", "/h/.config/containers/auth.json")
    monkeypatch.setenv("DOCKER_CONFIG", "/d")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/r")
    monkeypatch.setenv("REGISTRY_AUTH_FILE", "/f")
    assert default_auth_files() == (
        "/f",
        "/d/config.json",
        "/r/containers/auth.json",
        "/h/.config/containers/auth.json",
    )


def test_credentials_do_not_show_in_a_text() -> None:
    shown = repr(Credentials(username="u", password="hidden1", identity_token="hidden2"))
    assert "hidden" not in shown
    assert "hidden" not in str(Credentials(username="u", password="hidden1"))


# ---- tokens --------------------------------------------------------------------------------


class TokenServer(ThreadingHTTPServer):
    """Gives tokens `t1`, `t2`, … and remembers who asked for what."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _TokenHandler)
        self.asked: list[dict[str, Any]] = []
        self.life: float | None = 300
        self.status = 200
        self.field = "token"
        self.want: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/token"


class _TokenHandler(BaseHTTPRequestHandler):
    server: TokenServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        self._answer(dict(query), self.headers.get("Authorization"))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self._answer({"POST": True, **parse_qs(body)}, self.headers.get("Authorization"))

    def _answer(self, asked: dict[str, Any], authorization: str | None) -> None:
        self.server.asked.append({**asked, "authorization": authorization})
        refused = self.server.want is not None and authorization != self.server.want
        status = 401 if refused else self.server.status
        answer: dict[str, Any] = {self.server.field: f"t{len(self.server.asked)}"}
        if self.server.life is not None:
            answer["expires_in"] = self.server.life
        data = json.dumps(answer).encode() if status == 200 else b"no"
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def running_token_server() -> Iterator[TokenServer]:
    server = TokenServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def tokens() -> Iterator[TokenServer]:
    with running_token_server() as server:
        yield server


def guard(proxy: Proxy, tokens: TokenServer, *, good: set[str] | None = None) -> None:
    """Let the proxy want a bearer token on everything."""

    def rule(asked: Asked) -> Fault | None:
        token = asked.headers.get("authorization", "").removeprefix("Bearer ")
        if token.startswith("t") and (good is None or token in good):
            return None
        challenge = f'Bearer realm="{tokens.url}",service="test, \\"quoted\\"",scope="x:y:pull"'
        return Fault(status=401, forward=False, headers={"WWW-Authenticate": challenge}, body=b"{}")

    proxy.rule = rule


def test_one_anonymous_token_serves_a_whole_pull(
    registry: Registry, root: Root, proxy: Proxy, tokens: TokenServer
) -> None:
    registry.put_image("public", "v1", make_image({"a": b"1"}, {"b": b"2"}, {"c": b"3"}))
    guard(proxy, tokens)
    pull(f"{proxy.host}/public:v1", config=FAST, **root.parts())
    assert tokens.asked == [
        {"service": ['test, "quoted"'], "scope": ["repository:public:pull"], "authorization": None}
    ]
    # The challenge of /v2/ is enough: nothing is asked twice.
    assert len(proxy.asked) == 1 + 1 + 1 + 3


def test_a_token_for_a_push_names_its_scope_and_a_mounts_origin(
    registry: Registry, root: Root, proxy: Proxy, tokens: TokenServer
) -> None:
    registry.put_image("origin", "v1", make_image({"a": b"mounted"}))
    guard(proxy, tokens)
    config = with_credentials(proxy.host, username=USER, password=PASSWORD)
    tokens.want = f"Basic {PAIR}"
    pull(f"{proxy.host}/origin:v1", config=config, **root.parts())
    root.images.tag(f"{proxy.host}/origin:v1", f"{proxy.host}/target:v1")
    parts = {k: v for k, v in root.parts().items() if k != "layers"}
    done = push(f"{proxy.host}/target:v1", config=config, **parts)
    assert {sent.how for sent in done.sent.values()} == {"mounted"}
    scopes = [asked["scope"] for asked in tokens.asked]
    assert ["repository:target:pull,push"] in scopes
    assert ["repository:target:pull,push", "repository:origin:pull"] in scopes
    assert {asked["account"][0] for asked in tokens.asked} == {USER}


def test_an_identity_token_is_exchanged(
    registry: Registry, root: Root, proxy: Proxy, tokens: TokenServer
) -> None:
    registry.put_image("identity", "v1", make_image({"a": b"identity"}))
    guard(proxy, tokens)
    tokens.field = "access_token"
    config = with_credentials(proxy.host, identity_token="refresh-me")
    pull(f"{proxy.host}/identity:v1", config=config, **root.parts())
    assert tokens.asked[0]["grant_type"] == ["refresh_token"]
    assert tokens.asked[0]["refresh_token"] == ["refresh-me"]
    assert tokens.asked[0]["authorization"] is None


def test_a_token_that_the_registry_no_longer_takes_is_renewed(
    registry: Registry, root: Root, proxy: Proxy, tokens: TokenServer
) -> None:
    registry.put_image("renewed", "v1", make_image({"a": b"renewed"}))
    good = {"t1"}
    guard(proxy, tokens, good=good)
    with Repository(parse(f"{proxy.host}/renewed:v1"), FAST) as repository:
        repository.manifest("v1")
        good.clear()
        good.add("t2")
        repository.manifest("v1")
    assert len(tokens.asked) == 2


def test_wrong_credentials_are_denied_without_being_told(
    proxy: Proxy, root: Root, tokens: TokenServer
) -> None:
    guard(proxy, tokens)
    tokens.want = "Basic nobody"
    config = with_credentials(proxy.host, username="bob", password="hunter2")
    with pytest.raises(Denied, match="refuses these credentials") as failure:
        pull(f"{proxy.host}/x:v1", config=config, **root.parts())
    assert "hunter2" not in str(failure.value)
    with pytest.raises(Denied, match="refuses anonymous access"):
        pull(f"{proxy.host}/x:v1", config=FAST, **root.parts())


def test_a_token_server_that_is_down_is_unavailable(
    proxy: Proxy, root: Root, tokens: TokenServer
) -> None:
    guard(proxy, tokens)
    tokens.status = 503
    with pytest.raises(Unavailable, match="answered 503"):
        pull(f"{proxy.host}/x:v1", config=FAST, **root.parts())
    assert len(tokens.asked) == FAST.tries


def test_a_registry_that_always_wants_another_token_is_denied(
    proxy: Proxy, root: Root, tokens: TokenServer
) -> None:
    guard(proxy, tokens, good=set())
    with pytest.raises(Denied):
        pull(f"{proxy.host}/x:v1", config=FAST, **root.parts())
    assert len(tokens.asked) == 2


@pytest.mark.parametrize("realm", ["file:///etc/passwd", "", "gopher://x", "http://", "http://["])
def test_an_unusable_token_server_is_refused(proxy: Proxy, root: Root, realm: str) -> None:
    challenge = {"WWW-Authenticate": f'Bearer realm="{realm}"'}
    proxy.rule = lambda asked: Fault(status=401, headers=challenge, forward=False, body=b"")
    with pytest.raises(HutchError):
        pull(f"{proxy.host}/x:v1", config=FAST, **root.parts())


def test_another_host_gets_no_credentials(
    registry: Registry, root: Root, proxy: Proxy, tokens: TokenServer
) -> None:
    image = make_image({"a": b"redirected away"})
    registry.put_image("away", "v1", image)
    with running_proxy(registry.host) as storage:
        path = f"/v2/away/blobs/{image.layers[0].digest}"

        def rule(asked: Asked) -> Fault | None:
            if "authorization" not in asked.headers:
                challenge = {"WWW-Authenticate": f'Bearer realm="{tokens.url}"'}
                return Fault(status=401, headers=challenge, forward=False, body=b"")
            if asked.path == path:
                target = f"http://{storage.host}{path}"
                return Fault(status=307, headers={"Location": target}, body=b"")
            return None

        proxy.rule = rule
        pull(f"{proxy.host}/away:v1", config=FAST, **root.parts())
        assert [asked.path for asked in storage.asked] == [path]
        assert "authorization" not in storage.asked[0].headers


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", []),
        ("Basic", [("basic", {})]),
        ('Basic realm="a b"', [("basic", {"realm": "a b"})]),
        (
            'Bearer realm="https://a/t",service="s",scope="r:x:pull,push"',
            [("bearer", {"realm": "https://a/t", "service": "s", "scope": "r:x:pull,push"})],
        ),
        (
            "Bearer realm=https://a/t , service=s",
            [("bearer", {"realm": "https://a/t", "service": "s"})],
        ),
        (
            'Negotiate, Basic realm="x", Bearer realm="y"',
            [("negotiate", {}), ("basic", {"realm": "x"}), ("bearer", {"realm": "y"})],
        ),
        ('Bearer realm="open', [("bearer", {"realm": "open"})]),
        ('="', []),
    ],
)
def test_challenges_are_read(header: str, expected: list[tuple[str, dict[str, str]]]) -> None:
    assert [(c.scheme, c.parameters) for c in parse_challenges(header)] == expected


# ---- TLS -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Registry, Path]]:
    """A registry with a certificate of its own authority; yields its CA certificate too."""
    directory = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=hutch test", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=directory, check=True, capture_output=True,
    )  # fmt: skip
    tls = f"  tls: {{certificate: {directory}/cert.pem, key: {directory}/key.pem}}\n"
    with running_registry(directory / "registry", tls=tls) as host:
        yield Registry(host), directory / "cert.pem"


def test_a_certificate_of_an_unknown_authority_is_refused(
    tls_registry: tuple[Registry, Path], root: Root, tmp_path: Path
) -> None:
    registry, authority = tls_registry
    name = f"{registry.host}/secure:v1"
    with pytest.raises(Unavailable, match="certificate is not trusted") as failure:
        pull(name, config=FAST, **root.parts())
    assert "certs.d" in str(failure.value.hint)
    directory = tmp_path / "certs.d" / registry.host
    directory.mkdir(parents=True)
    (directory / "ca.crt").write_bytes(authority.read_bytes())
    trusting = msgspec.structs.replace(FAST, ca_dirs=(str(tmp_path / "certs.d"),))
    unverified = msgspec.structs.replace(FAST, insecure=("127.0.0.0/8",))
    for config in (trusting, unverified):
        with Repository(parse(name), config) as repository:
            assert repository.home.base == f"https://{registry.host}"


def test_plain_http_is_only_for_loopback_or_when_told() -> None:
    from hutch.image.registry_config import endpoints

    def schemes(host: str, *insecure: str) -> tuple[str, ...]:
        return endpoints(host, RegistryConfig(insecure=insecure))[-1].schemes

    assert schemes("registry.example:5000") == ("https",)
    assert schemes("10.1.2.3:5000") == ("https",)
    assert schemes("localhost.example.com") == ("https",)
    assert schemes("localhost:5000") == ("https", "http")
    assert schemes("127.0.0.1:5000") == ("https", "http")
    assert schemes("[::1]:5000") == ("https", "http")
    assert schemes("10.1.2.3:5000", "10.0.0.0/8") == ("https", "http")
    assert schemes("registry.example:5000", "registry.example") == ("https", "http")
    assert schemes("registry.example:5000", "registry.example:5001") == ("https",)
