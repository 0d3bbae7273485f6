"""Pushing: what is sent, what is mounted, and what others read of it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import msgspec
import pytest

from hutch.errors import Denied, InvalidArgument, NotFound, Unavailable
from hutch.image.pull import pull
from hutch.image.push import PushResult, push
from tests.image.registries import FAST, Asked, Fault, Proxy, Registry, Root, make_image
from tests.requires import requires

pytestmark = [requires("root", "docker-registry"), pytest.mark.integration]


def send(root: Root, source: str, target: str) -> PushResult:
    """Tag an image and push it there."""
    root.images.tag(source, target)
    parts = {k: v for k, v in root.parts().items() if k != "layers"}
    return push(target, config=FAST, **parts)


@pytest.fixture
def pulled(registry: Registry, root: Root) -> str:
    """The id of an image of two layers in the root, from the repository `base`."""
    image = make_image({"a": b"push one" * 1000}, {"b": b"push two"})
    registry.put_image("base", "v1", image)
    return pull(f"{registry.host}/base:v1", config=FAST, **root.parts()).record.id


@pytest.mark.parametrize("flavour", ["oci", "docker"])
def test_a_pushed_image_is_byte_for_byte_the_one_that_was_pulled(
    registry: Registry, root: Root, proxy: Proxy, flavour: str
) -> None:
    image = make_image({"f": flavour.encode()}, flavour=flavour)
    registry.put_image(f"src-{flavour}", "v1", image)
    pull(f"{registry.host}/src-{flavour}:v1", config=FAST, **root.parts())
    done = send(root, f"{registry.host}/src-{flavour}:v1", f"{proxy.host}/dst-{flavour}:v2")
    status, headers, data = registry.call(
        "GET", f"/v2/dst-{flavour}/manifests/v2", Accept=image.manifest.media_type
    )
    assert status == 200
    assert data == image.manifest.data
    assert headers["content-type"] == image.manifest.media_type
    assert done.digest == image.manifest.digest
    assert {s.how for s in done.sent.values()} == {"pushed"}


def test_blobs_of_another_repository_of_the_registry_are_mounted(
    registry: Registry, root: Root, pulled: str
) -> None:
    done = send(root, pulled, f"{registry.host}/mounted:v1")
    assert {(s.how, s.origin) for s in done.sent.values()} == {("mounted", "base")}


def test_blobs_that_are_there_are_not_sent_again(
    registry: Registry, root: Root, proxy: Proxy, pulled: str
) -> None:
    send(root, pulled, f"{proxy.host}/again:v1")
    proxy.asked.clear()
    done = send(root, pulled, f"{proxy.host}/again:v2")
    assert {s.how for s in done.sent.values()} == {"exists"}
    assert proxy.count("POST", "uploads") == 0


@pytest.mark.parametrize("status", [405, 413, 501])
def test_a_registry_that_takes_no_whole_blob_gets_chunks(
    registry: Registry, root: Root, proxy: Proxy, pulled: str, status: int
) -> None:
    def no_whole(asked: Asked) -> Fault | None:
        whole = asked.method == "PUT" and asked.headers.get("content-length") != "0"
        if whole and "/blobs/uploads/" in asked.path:
            return Fault(status=status, body=b"", forward=False)
        return None

    proxy.rule = no_whole
    done = send(root, pulled, f"{proxy.host}/chunks{status}:v1")
    assert {s.how for s in done.sent.values()} == {"pushed"}
    assert proxy.count("PATCH", "uploads") == 3
    fresh = Root(root.path / "second")
    try:
        pull(f"{registry.host}/chunks{status}:v1", config=FAST, **fresh.parts())
    finally:
        fresh.close()


def test_an_upload_that_breaks_is_begun_anew(root: Root, proxy: Proxy, pulled: str) -> None:
    broken: list[str] = []

    def once(asked: Asked) -> Fault | None:
        if asked.method == "PUT" and "/blobs/uploads/" in asked.path and not broken:
            broken.append(asked.path)
            return Fault(forward=False, hang_up=True)
        return None

    proxy.rule = once
    done = send(root, pulled, f"{proxy.host}/broken:v1")
    assert broken
    assert {s.how for s in done.sent.values()} == {"pushed"}


def test_a_registry_that_stays_down_is_reported(root: Root, proxy: Proxy, pulled: str) -> None:
    proxy.rule = lambda asked: (
        Fault(status=503, body=b"", forward=False) if asked.method == "PUT" else None
    )
    with pytest.raises(Unavailable, match="503"):
        send(root, pulled, f"{proxy.host}/down:v1")


def test_a_refusal_is_reported_with_what_the_registry_says(
    root: Root, proxy: Proxy, pulled: str
) -> None:
    said = {"errors": [{"code": "DENIED", "message": "not on a Sunday"}]}
    proxy.rule = lambda asked: (
        Fault(status=403, body=json.dumps(said).encode(), forward=False)
        if asked.method == "POST"
        else None
    )
    with pytest.raises(Denied, match="not on a Sunday"):
        send(root, pulled, f"{proxy.host}/refused:v1")


def test_what_was_pushed_is_known_by_its_digest(
    registry: Registry, root: Root, pulled: str
) -> None:
    done = send(root, pulled, f"{registry.host}/known:v1")
    assert root.images.get(f"{registry.host}/known@{done.digest}").id == pulled


def test_an_image_that_is_not_here_or_has_a_digest_is_not_pushed(
    registry: Registry, root: Root
) -> None:
    parts = {k: v for k, v in root.parts().items() if k != "layers"}
    with pytest.raises(NotFound):
        push(f"{registry.host}/nothing:v1", config=FAST, **parts)
    with pytest.raises(InvalidArgument, match="digest"):
        push(f"{registry.host}/nothing@sha256:{'0' * 64}", config=FAST, **parts)


def test_a_blob_missing_from_the_store_is_named(
    registry: Registry, root: Root, pulled: str
) -> None:
    gone = root.images.get(pulled).layers[0].digest
    root.content.delete(gone)
    with pytest.raises(NotFound, match=gone):
        send(root, pulled, f"{registry.host}/missing:v1")


@requires("skopeo")
def test_skopeo_reads_what_was_pushed(
    registry: Registry, root: Root, pulled: str, tmp_path: Path
) -> None:
    done = send(root, pulled, f"{registry.host}/forskopeo:v1")
    source = f"docker://{registry.host}/forskopeo:v1"
    options = ["--tls-verify=false"]
    told = subprocess.run(
        ["skopeo", "inspect", *options, source], check=True, capture_output=True
    ).stdout
    assert msgspec.json.decode(told)["Digest"] == done.digest
    subprocess.run(
        ["skopeo", "copy", "-q", "--src-tls-verify=false", source, f"oci:{tmp_path}/out:v1"],
        check=True,
        capture_output=True,
    )
    layer = root.images.get(pulled).layers[0].digest.removeprefix("sha256:")
    assert (tmp_path / "out/blobs/sha256" / layer).exists()
