"""The registry client by itself: lists, pages, deletion, uploads' edges, hostile answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hutch.errors import (
    HutchError,
    IntegrityError,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from hutch.image.registry import Repository, catalog
from hutch.image.registry_config import (
    Endpoint,
    RegistryConfig,
    endpoints,
    load_registry_config,
)
from hutch.image.transport import Cancelled, Transport
from hutch.oci.reference import parse
from hutch.oci.types import Descriptor, MediaType
from tests.image.registries import (
    FAST,
    Asked,
    Fault,
    Proxy,
    Registry,
    digest,
    make_image,
)
from tests.requires import requires

pytestmark = [requires("root", "docker-registry"), pytest.mark.integration]


@pytest.fixture
def open_repository(registry: Registry) -> Iterator[Any]:
    """Opens repositories by name, at the registry or another host; closes them."""
    opened: list[Repository] = []

    def opener(name: str, host: str = "") -> Repository:
        repository = Repository(parse(f"{host or registry.host}/{name}"), FAST)
        opened.append(repository)
        return repository

    yield opener
    for repository in opened:
        repository.close()


def test_tags_and_repositories_are_listed_over_pages(
    registry: Registry, proxy: Proxy, open_repository: Any
) -> None:
    image = make_image({"a": b"tagged"})
    for number in range(7):
        registry.put_image("pages", f"t{number}", image)

    def two_at_a_time(asked: Asked) -> Fault | None:
        if "tags/list" not in asked.path:
            return None
        last = int(asked.path.partition("last=t")[2] or -1)
        names = [f"t{n}" for n in range(last + 1, min(last + 3, 7))]
        link = f'</v2/pages/tags/list?n=2&last=t{last + 2}>; rel="next"'
        return Fault(
            forward=False,
            headers={"Link": link} if last + 3 < 7 else {},
            body=json.dumps({"name": "pages", "tags": names}).encode(),
        )

    proxy.rule = two_at_a_time
    assert open_repository("pages", proxy.host).tags() == [f"t{n}" for n in range(7)]
    assert proxy.count("GET", "tags/list") == 4
    assert open_repository("pages").tags() == [f"t{n}" for n in range(7)]
    assert "pages" in catalog(registry.host, FAST)


@pytest.mark.parametrize(
    "link", ['<http://elsewhere.invalid/v2/x>; rel="next"', '</v2/x/tags/list>; rel="next"']
)
def test_pages_that_lead_away_or_never_end_are_refused(
    proxy: Proxy, open_repository: Any, link: str
) -> None:
    proxy.rule = lambda asked: Fault(forward=False, headers={"Link": link}, body=b'{"tags": ["a"]}')
    with pytest.raises(Unavailable, match=r"another host|in circles"):
        open_repository("x", proxy.host).tags()


def test_a_manifest_is_looked_up_and_deleted(registry: Registry, open_repository: Any) -> None:
    image = make_image({"a": b"deleted"})
    registry.put_image("deleted", "v1", image)
    repository = open_repository("deleted")
    assert repository.head("v1") == image.manifest.digest
    assert repository.head("v2") is None
    fetched = repository.manifest("v1")
    assert (fetched.data, fetched.media_type) == (image.manifest.data, MediaType.OCI_MANIFEST)
    assert repository.has_blob(image.config.digest)
    repository.delete_manifest(image.manifest.digest)
    assert repository.head("v1") is None
    with pytest.raises(NotFound):
        repository.delete_manifest(image.manifest.digest)
    repository.delete_blob(image.config.digest)
    assert not repository.has_blob(image.config.digest)


def test_a_registry_that_forbids_deletion_says_so(proxy: Proxy, open_repository: Any) -> None:
    proxy.rule = lambda asked: (
        Fault(status=405, forward=False, body=b"") if asked.method == "DELETE" else None
    )
    with pytest.raises(InvalidArgument, match="does not allow deletion"):
        open_repository("x", proxy.host).delete_manifest(digest(b"x"))


def test_referrers_are_optional(proxy: Proxy, open_repository: Any) -> None:
    repository = open_repository("x", proxy.host)
    assert repository.referrers(digest(b"x")) == []
    entry = {"mediaType": MediaType.OCI_MANIFEST, "digest": digest(b"s"), "size": 1}
    document = {"schemaVersion": 2, "mediaType": MediaType.OCI_INDEX, "manifests": [entry]}
    proxy.rule = lambda asked: (
        Fault(status=200, forward=False, body=json.dumps(document).encode())
        if "/referrers/" in asked.path
        else None
    )
    assert [found.digest for found in repository.referrers(digest(b"x"))] == [digest(b"s")]


def test_a_manifest_longer_than_any_is_not_read(proxy: Proxy, open_repository: Any) -> None:
    proxy.rule = lambda asked: Fault(forward=False, body=b" " * (5 << 20))
    with pytest.raises(InvalidArgument, match="longer than"):
        open_repository("x", proxy.host).manifest("v1")


def test_a_stated_digest_that_is_wrong_is_refused(proxy: Proxy, open_repository: Any) -> None:
    headers = {"Docker-Content-Digest": digest(b"other"), "Content-Type": MediaType.OCI_MANIFEST}
    proxy.rule = lambda asked: Fault(forward=False, headers=headers, body=b"{}")
    with pytest.raises(IntegrityError, match="digest is"):
        open_repository("x", proxy.host).manifest("v1")


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (206, {"Content-Range": "bytes 0-9/10"}),
        (206, {}),
        (200, {"content-length": "11"}),
    ],
)
def test_a_wrong_range_or_length_is_refused(
    proxy: Proxy, open_repository: Any, status: int, headers: dict[str, str]
) -> None:
    proxy.rule = lambda asked: (
        Fault(forward=False, status=status, headers=headers, body=b"0123456789")
        if "/blobs/" in asked.path
        else None
    )
    repository = open_repository("x", proxy.host)
    blob = Descriptor(digest=digest(b"x"), size=10)
    with pytest.raises(IntegrityError):
        list(repository.blob(blob, 5))


def test_waiting_for_a_registry_ends_with_the_stop(proxy: Proxy) -> None:
    stop = threading.Event()
    patient = RegistryConfig(auth_files=(), max_wait_s=600)

    def busy(asked: Asked) -> Fault | None:
        if asked.path == "/v2/":
            return None
        threading.Timer(0.05, stop.set).start()
        return Fault(status=503, headers={"Retry-After": "500"}, forward=False, body=b"")

    proxy.rule = busy
    with (
        Repository(parse(f"{proxy.host}/x"), patient, stop=stop) as repository,
        pytest.raises(Cancelled),
    ):
        repository.manifest("v1")


def test_something_else_than_a_registry_is_told(proxy: Proxy, open_repository: Any) -> None:
    page = Fault(status=404, headers={"Content-Type": "text/html"}, forward=False, body=b"<html>")
    proxy.rule = lambda asked: page
    with pytest.raises(Unavailable, match="is no registry"):
        open_repository("x", proxy.host).manifest("v1")


@pytest.mark.parametrize("target", ["v1", "sha256:" + "0" * 64])
def test_a_web_page_is_no_manifest(target: str, proxy: Proxy, open_repository: Any) -> None:
    """A proxy's or a wireless network's log-in page answers 200 to everything."""
    headers = {"Content-Type": "text/html; charset=utf-8"}
    page = Fault(status=200, headers=headers, forward=False, body=b"<html>log in")
    proxy.rule = lambda asked: page
    with pytest.raises(Unavailable, match="is a web page") as caught:
        open_repository("x", proxy.host).manifest(target)
    assert proxy.host in str(caught.value.hint)


def test_the_wait_grows_and_keeps_to_its_limit() -> None:
    class Clockless(threading.Event):
        def __init__(self) -> None:
            super().__init__()
            self.waits: list[float] = []

        def wait(self, timeout: float | None = None) -> bool:
            self.waits.append(timeout or 0.0)
            return False

    stop = Clockless()
    endpoint = Endpoint(host="x", registry="x")
    transport = Transport(endpoint, RegistryConfig(max_wait_s=3), stop=stop, chance=lambda: 1.0)
    for attempt in range(1, 7):
        transport.pause(attempt)
    transport.pause(1, 2.5)
    assert stop.waits == [0.25, 0.5, 1, 2, 3, 3, 2.5]


# ---- settings ------------------------------------------------------------------------------


def test_settings_come_from_the_first_file_there_is(tmp_path: Any) -> None:
    path = tmp_path / "registries.json"
    missing = tmp_path / "missing.json"
    assert load_registry_config(missing, path) == RegistryConfig()
    path.write_text('{"insecure": ["a:5000"], "mirrors": {"docker.io": ["https://m/hub"]}}')
    config = load_registry_config(missing, path)
    mirror, home = endpoints("docker.io", config)
    assert (mirror.host, mirror.prefix, mirror.schemes) == ("m", "hub", ("https",))
    assert home.host == "registry-1.docker.io"
    path.write_text('{"insecur": []}')
    with pytest.raises(InvalidArgument, match="insecur"):
        load_registry_config(path)
    with pytest.raises(InvalidArgument, match=r"mirrors\.x"):
        endpoints("x", RegistryConfig(mirrors={"x": ("ftp://y",)}))


# ---- fuzz ----------------------------------------------------------------------------------

_header = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)
_names = st.sampled_from(
    ["WWW-Authenticate", "Link", "Location", "Docker-Content-Digest", "Content-Type",
     "Retry-After", "Content-Range", "Range"]
)  # fmt: skip
_bodies = st.binary(max_size=60) | st.sampled_from(
    [b"{}", b"[]", b'{"tags": null}', b'{"tags": [1]}', b'{"schemaVersion": 2, "layers": []}',
     b'{"errors": [{"code": "X", "message": "\\u001b[31mred"}]}', b'{"errors": {}}']
)  # fmt: skip


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    status=st.sampled_from(
        [200, 201, 202, 206, 302, 307, 400, 401, 403, 404, 416, 418, 429, 500, 503]
    ),
    headers=st.dictionaries(_names, _header, max_size=3),
    body=_bodies,
)
def test_any_answer_gives_a_result_or_an_error_of_ours(
    proxy: Proxy, status: int, headers: dict[str, str], body: bytes
) -> None:
    quick = RegistryConfig(auth_files=(), tries=2, max_wait_s=0.001, read_timeout_s=2)
    proxy.rule = lambda asked: Fault(status=status, headers=headers, forward=False, body=body)
    with Repository(parse(f"{proxy.host}/x"), quick, actions="pull,push") as repository:
        for ask in (
            lambda: repository.manifest("v1"),
            lambda: repository.head("v1"),
            repository.tags,
            lambda: repository.referrers(digest(b"x")),
            lambda: list(repository.blob(Descriptor(digest=digest(b"x"), size=9), 3)),
            lambda: repository.put_manifest("v1", b"{}", MediaType.OCI_MANIFEST),
            lambda: repository.delete_manifest(digest(b"x")),
        ):
            try:
                ask()
            except HutchError as exc:
                assert "\x1b" not in str(exc)
