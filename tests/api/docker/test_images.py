"""Images over Docker's API: from a registry and to it, as archives, their names and removal."""

from __future__ import annotations

import base64
import functools
import gzip
import http.server
import io
import json
import os
import subprocess
import tarfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hutch.engine import Engine
from hutch.errors import HutchError
from tests.api.docker.conftest import Answer, Client, Daemon
from tests.image.registries import running_registry

pytestmark = pytest.mark.requires("root", "overlayfs", "docker-registry")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry on loopback, as `host:port`."""
    with running_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


@pytest.fixture
def tag(hutch_engine: Engine) -> Iterator[str]:
    """A tag of its own; images that have it at the end lose it."""
    chosen = f"t{uuid.uuid4().hex[:12]}"
    yield chosen
    for record in hutch_engine.images.list():
        for name in record.names:
            if name.endswith(f":{chosen}"):
                with suppress(HutchError):
                    hutch_engine.images.remove(name, force=True)


def lines(answer: Answer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.body.splitlines()]


def layer(name: str, content: bytes) -> bytes:
    """A tar with one file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def imported(api: Client, reference: str, *, content: bytes = b"") -> str:
    """Make an image of one file and return its id."""
    repository, _, tag = reference.rpartition(":")
    data = layer("file", content or uuid.uuid4().bytes)
    answer = api.ask("POST", f"/images/create?fromSrc=-&repo={repository}&tag={tag}", data)
    assert answer.status == 200, answer
    return str(lines(answer)[-1]["status"])


def test_an_image_is_listed_and_described(api: Client, tag: str) -> None:
    made = imported(api, f"api/listed:{tag}")
    found = api.ask("GET", f'/images/json?filters={{"reference":["api/listed:{tag}"]}}').json
    assert [(one["Id"], one["RepoTags"]) for one in found] == [(made, [f"api/listed:{tag}"])]
    described = api.ask("GET", f"/images/api/listed:{tag}/json").json
    assert described["Id"] == made
    assert described["RootFS"]["Type"] == "layers"
    assert api.ask("GET", f"/images/{made[7:19]}/history").json[0]["Id"] == made


def test_old_versions_have_the_fields_that_were_dropped_since(api: Client, tag: str) -> None:
    imported(api, f"api/old:{tag}")
    path = f"/images/api/old:{tag}/json"
    old = api.ask("GET", f"/v1.40{path}", raw=True).json
    assert old["VirtualSize"] == old["Size"]
    assert old["Config"]["Tty"] is False
    assert "VirtualSize" not in api.ask("GET", path).json


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/images/{}/json"),
        ("GET", "/images/{}/history"),
        ("GET", "/images/{}/get"),
        ("DELETE", "/images/{}"),
        ("POST", "/images/{}/tag?repo=a/b"),
    ],
)
def test_an_image_that_is_not_there_is_told_as_by_docker(
    api: Client, method: str, path: str
) -> None:
    answer = api.ask(method, path.format("there/is-none"))
    assert answer.status == 404
    assert answer.message == "No such image: there/is-none:latest"


def test_removal_tells_what_was_untagged_and_what_deleted(api: Client, tag: str) -> None:
    made = imported(api, f"api/gone:{tag}")
    assert api.ask("POST", f"/images/{made}/tag?repo=api/twice&tag={tag}").status == 201
    first = api.ask("DELETE", f"/images/api/twice:{tag}").json
    assert first == [{"Untagged": f"api/twice:{tag}"}]
    second = api.ask("DELETE", f"/images/api/gone:{tag}").json
    assert second[:2] == [{"Untagged": f"api/gone:{tag}"}, {"Deleted": made}]
    assert len(second) == 3  # and its layer
    assert api.ask("GET", f"/images/{made}/json").status == 404


def test_an_image_in_use_is_not_removed(api: Client, image: str, name: str, tag: str) -> None:
    assert api.ask("POST", f"/images/{image}/tag?repo=api/used&tag={tag}").status == 201
    made = api.ask("POST", f"/containers/create?name={name}", {"Image": f"api/used:{tag}"})
    assert made.status == 201, made
    identifier = api.ask("GET", f"/images/api/used:{tag}/json").json["Id"]
    answer = api.ask("DELETE", f"/images/{identifier}")
    assert answer.status == 409
    assert "conflict: unable to delete" in answer.message


def test_pull_and_push_tell_their_progress(api: Client, registry: str, tag: str) -> None:
    reference = f"{registry}/api/pushed:{tag}"
    made = imported(api, reference)
    pushed = api.ask("POST", f"/images/{registry}/api/pushed/push?tag={tag}")
    told = lines(pushed)
    assert told[0] == {"status": f"The push refers to repository [{registry}/api/pushed]"}
    assert told[-1]["aux"]["Tag"] == tag
    assert any(line.get("status") == "Pushed" for line in told)
    assert api.ask("DELETE", f"/images/{reference}").status == 200
    pulled = lines(api.ask("POST", f"/images/create?fromImage={registry}/api/pushed&tag={tag}"))
    assert pulled[0] == {"status": "Pulling from api/pushed", "id": tag}
    assert pulled[-2] == {"status": f"Digest: {told[-1]['aux']['Digest']}"}
    assert pulled[-1] == {"status": f"Status: Downloaded newer image for {reference}"}
    assert api.ask("GET", f"/images/{reference}/json").json["Id"] == made
    again = lines(api.ask("POST", f"/images/create?fromImage={reference}"))
    assert again[-1] == {"status": f"Status: Image is up to date for {reference}"}


def test_without_a_tag_all_are_pulled(api: Client, registry: str, tag: str) -> None:
    repository = f"{registry}/api/all-{tag}"
    for name in ("one", "two"):
        imported(api, f"{repository}:{name}")
    assert "aux" in lines(api.ask("POST", f"/images/{repository}/push"))[-1]
    for name in ("one", "two"):
        api.ask("DELETE", f"/images/{repository}:{name}")
    assert api.ask("POST", f"/images/create?fromImage={repository}").status == 200
    for name in ("one", "two"):
        assert api.ask("DELETE", f"/images/{repository}:{name}").status == 200


def test_what_a_registry_has_not_is_an_error_before_any_progress(
    api: Client, registry: str, tag: str
) -> None:
    answer = api.ask("POST", f"/images/create?fromImage={registry}/api/none&tag={tag}")
    assert answer.status == 404
    assert "manifest unknown" in answer.message
    answer = api.ask("POST", f"/images/api/none/push?tag={tag}")
    assert answer.status == 404
    assert "does not exist locally" in answer.message


def test_what_a_registry_has_is_told_without_a_pull(api: Client, registry: str, tag: str) -> None:
    imported(api, f"{registry}/api/looked:{tag}")
    pushed = lines(api.ask("POST", f"/images/{registry}/api/looked/push?tag={tag}"))
    found = api.ask("GET", f"/distribution/{registry}/api/looked:{tag}/json").json
    assert found["Descriptor"]["digest"] == pushed[-1]["aux"]["Digest"]
    assert found["Platforms"][0]["os"] == "linux"
    names = [one["name"] for one in api.ask("GET", f"/images/search?term={registry}/looked").json]
    assert names == [f"{registry}/api/looked"]


def test_credentials_are_the_client_s_and_never_logged(
    api: Client, daemon: Daemon, tmp_path: Path, tag: str
) -> None:
    secret = f"s3cret-{tag}"
    hashed = subprocess.run(
        ["htpasswd", "-nbB", "user", secret], capture_output=True, check=True, timeout=60
    )
    (tmp_path / "htpasswd").write_bytes(hashed.stdout)
    auth = f"auth:\n  htpasswd: {{realm: test, path: {tmp_path}/htpasswd}}\n"
    with running_registry(tmp_path, auth=auth) as host:
        reference = f"{host}/api/private"
        imported(api, f"{reference}:{tag}")
        refused = lines(api.ask("POST", f"/images/{reference}/push?tag={tag}"))
        assert "error" in refused[-1]
        given = {"username": "user", "password": secret, "serveraddress": host}
        header = base64.urlsafe_b64encode(json.dumps(given).encode()).decode()
        headers = {"X-Registry-Auth": header}
        pushed = api.ask("POST", f"/images/{reference}/push?tag={tag}", headers=headers)
        assert "aux" in lines(pushed)[-1]
        assert api.ask("POST", "/auth", given).json["Status"] == "Login Succeeded"
        wrong = api.ask("POST", "/auth", given | {"password": f"{secret}x"})
        assert wrong.status == 401
        broken = api.ask(
            "POST", f"/images/{reference}/push?tag={tag}", headers={"X-Registry-Auth": "%%"}
        )
        assert broken.status == 400
    log = daemon.log.read_text()
    assert secret not in log
    assert header not in log


def test_several_images_go_through_one_archive(api: Client, tag: str) -> None:
    names = [f"api/saved-{letter}:{tag}" for letter in "ab"]
    ids = [imported(api, name) for name in names]
    saved = api.ask("GET", f"/images/get?names={names[0]}&names={names[1]}")
    assert saved.status == 200
    assert saved.headers["content-type"] == "application/x-tar"
    with tarfile.open(fileobj=io.BytesIO(saved.body)) as tar:
        member = tar.extractfile("manifest.json")
        assert member is not None
        listed = {one for image in json.load(member) for one in image["RepoTags"]}
    assert listed == set(names)
    for name in names:
        api.ask("DELETE", f"/images/{name}")
    loaded = api.ask("POST", "/images/load?quiet=1", saved.body)
    assert loaded.headers["transfer-encoding"] == "chunked"  # docker-py counts on it
    assert {line["stream"] for line in lines(loaded)} == {
        f"Loaded image: {name}\n" for name in names
    }
    assert [api.ask("GET", f"/images/{name}/json").json["Id"] for name in names] == ids


def test_an_archive_that_is_none_leaves_nothing(api: Client) -> None:
    before = api.ask("GET", "/images/json").json
    answer = api.ask("POST", "/images/load", b"no tar at all" * 1000)
    assert answer.status == 400
    assert api.ask("GET", "/images/json").json == before


def test_a_client_that_leaves_in_the_middle_of_an_import_leaves_nothing(
    api: Client, hutch_engine: Engine, tag: str
) -> None:
    with api.socket() as sock:
        head = f"POST /v1.51/images/create?fromSrc=-&repo=api/half&tag={tag} HTTP/1.1\r\n"
        sock.sendall(f"{head}Host: d\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        sock.sendall(b"10000\r\n" + layer("f", b"x" * 0x40000)[:0x10000] + b"\r\n")
    assert api.ask("GET", "/_ping").status == 200
    assert api.ask("GET", f"/images/api/half:{tag}/json").status == 404


@pytest.mark.parametrize("version", ["v1.44", "v1.51"])
def test_what_an_image_does_not_set_is_told_as_empty(api: Client, tag: str, version: str) -> None:
    imported(api, f"api/plain:{tag}")
    path = f"/{version}/images/api/plain:{tag}/json"
    config = api.ask("GET", path, raw=True).json["Config"]
    told = {name: config[name] for name in ("Cmd", "Entrypoint", "OnBuild", "Volumes")}
    assert told == dict.fromkeys(told)
    assert (config["User"], config["WorkingDir"]) == ("", "")
    assert ("Hostname" in config) is (version == "v1.44")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A directory, and where it is on the loopback as `host:port`."""
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield tmp_path, f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_an_image_is_imported_from_an_address(
    api: Client, tag: str, site: tuple[Path, str], scheme: str
) -> None:
    directory, host = site
    (directory / "root.tar.gz").write_bytes(gzip.compress(layer("file", tag.encode())))
    path = f"/images/create?fromSrc={scheme}{host}/root.tar.gz&repo=api/fetched&tag={tag}"
    told = lines(api.ask("POST", path))
    assert told[0]["status"] == f"Downloading from http://{host}/root.tar.gz"
    described = api.ask("GET", f"/images/api/fetched:{tag}/json").json
    assert told[-1]["status"] == described["Id"]


def test_what_is_not_at_an_address_is_told_and_makes_no_image(
    api: Client, hutch_engine: Engine, tag: str, site: tuple[Path, str]
) -> None:
    directory, host = site
    (directory / "text").write_bytes(b"no archive" * 100)
    left = set(os.listdir(hutch_engine.root / "tmp"))
    for name, word in (("nothing", "answered 404"), ("text", "tar")):
        path = f"/images/create?fromSrc=http://{host}/{name}&repo=api/fetched&tag={tag}"
        last = lines(api.ask("POST", path))[-1]
        assert word in last["error"]
        assert last["errorDetail"]["message"] == last["error"]
    assert api.ask("GET", f"/images/api/fetched:{tag}/json").status == 404
    assert set(os.listdir(hutch_engine.root / "tmp")) <= left


@pytest.mark.parametrize("source", ["file:///etc/passwd", "http://", "ssh://a/b"])
def test_an_address_that_is_not_read_is_refused(api: Client, source: str) -> None:
    answer = api.ask("POST", f"/images/create?fromSrc={source}&repo=api/none")
    assert answer.status == 400
    assert answer.message.startswith("fromSrc: ")


def test_prune_takes_dangling_images(api: Client, tag: str) -> None:
    label = f"prune={tag}"
    change = f"LABEL%20{label}"
    data = layer("file", tag.encode())
    path = f"/images/create?fromSrc=-&changes={change}"
    made = lines(api.ask("POST", path, data))[-1]["status"]
    filters = json.dumps({"label": [label]})
    pruned = api.ask("POST", f"/images/prune?filters={filters.replace(' ', '')}").json
    assert {"Deleted": made} in pruned["ImagesDeleted"]
    assert pruned["SpaceReclaimed"] > 0
