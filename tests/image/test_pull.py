"""Pulling: what is fetched, what is not, and what is left when it goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from hutch.errors import (
    Denied,
    Exhausted,
    HutchError,
    IntegrityError,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unsupported,
)
from hutch.image.pull import PullResult, pull
from hutch.image.records import LayerRecord
from hutch.image.transport import Cancelled
from hutch.image.unpacking import ensure_unpacked
from hutch.oci.platform import host_platform
from hutch.oci.types import MediaType
from hutch.records import ProgressEvent
from hutch.storage.extract import UnpackLimits
from hutch.storage.layers import Layers
from tests.image.registries import (
    FAST,
    Asked,
    Blob,
    Fault,
    Image,
    Proxy,
    Registry,
    Root,
    digest,
    make_image,
    make_index,
    running_proxy,
    tar,
)
from tests.requires import requires

pytestmark = [requires("root", "docker-registry"), pytest.mark.integration]

BIG = os.urandom(3 << 20)


def fetch(root: Root, name: str, **more: object) -> PullResult:
    return pull(name, **{"config": FAST, **root.parts(), **more})


def content_of(root: Root, layer: LayerRecord, name: str) -> bytes:
    return Path(root.layers.path(layer.chain_id), name).read_bytes()


def only_blob(digest_: str) -> Callable[[Asked], bool]:
    return lambda asked: asked.method == "GET" and digest_ in asked.path


def nothing_recorded(root: Root) -> bool:
    return not root.images.all()


# ---- what comes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flavour", "how"),
    [("oci", "gzip"), ("oci", "zstd"), ("oci", ""), ("docker", "gzip"), ("docker", "")],
)
def test_every_kind_of_image_is_pulled_unpacked_and_recorded(
    registry: Registry, root: Root, flavour: str, how: str
) -> None:
    config = {
        "Cmd": ["sh"],
        "Entrypoint": ["/init"],
        "Env": ["A=1", "B=2", "A=3"],
        "ExposedPorts": {"80": {}, "53/udp": {}},
        "Volumes": {"/data/": {}},
        "Labels": {"k": "v"},
        "User": "1:2",
        "WorkingDir": "/w",
        "StopSignal": "SIGINT",
        "Healthcheck": {"Test": ["CMD", "true"], "Interval": 5_000_000_000},
    }
    image = make_image({"a": b"one"}, {"b": b"two"}, flavour=flavour, how=how, config=config)
    repository = f"kinds-{flavour}-{how or 'plain'}"
    registry.put_image(repository, "v1", image)
    result = fetch(root, f"{registry.host}/{repository}:v1")
    record = result.record
    assert result.changed
    assert record.id == image.config.digest
    assert record.manifest_digest == result.digest == image.manifest.digest
    assert content_of(root, record.layers[0], "a") == b"one"
    assert content_of(root, record.layers[1], "b") == b"two"
    assert record.layers[1].unpacked_size == len(tar({"b": b"two"}))
    assert all(root.content.has(each) for each in record.digests)
    run = record.config
    assert (run.cmd, run.entrypoint) == (("sh",), ("/init",))
    assert run.env == ("A=3", "B=2")
    assert run.exposed_ports == ("53/udp", "80/tcp")
    assert run.volumes == ("/data",)
    assert run.labels == {"k": "v"}
    assert (run.user, run.workdir, run.stop_signal) == ("1:2", "/w", "SIGINT")
    assert run.healthcheck is not None
    assert run.healthcheck.interval_s == 5
    assert root.images.get(f"{registry.host}/{repository}:v1") == record
    assert root.images.get(f"{registry.host}/{repository}@{result.digest}") == record
    assert root.images.get(record.id[7:19]) == record


@pytest.mark.parametrize("flavour", ["oci", "docker"])
def test_the_platform_is_chosen_from_an_index(registry: Registry, root: Root, flavour: str) -> None:
    images = [
        make_image({"arch": name.encode()}, architecture=name, flavour=flavour)
        for name in ("arm64", "amd64", "s390x")
    ]
    index = make_index(
        [
            (images[0], {"os": "linux", "architecture": "arm64", "variant": "v8"}),
            (images[1], {"os": "linux", "architecture": "amd64"}),
            (images[2], {"os": "linux", "architecture": "s390x"}),
        ],
        flavour=flavour,
    )
    repository = f"index-{flavour}"
    registry.put_index(repository, "v1", index, images)
    name = f"{registry.host}/{repository}:v1"
    native = fetch(root, name, platform="linux/amd64")
    assert native.record.id == images[1].config.digest
    assert native.digest == digest(index.data)
    assert f"{registry.host}/{repository}@{digest(index.data)}" in native.record.repo_digests
    assert not fetch(root, name, platform="linux/amd64").changed
    foreign = fetch(root, name, platform="linux/arm64")
    assert foreign.record.id == images[0].config.digest
    assert foreign.record.architecture == "arm64"
    assert fetch(root, name).record.architecture == host_platform().architecture
    with pytest.raises(NotFound, match="no image for linux/riscv64") as failure:
        fetch(root, name, platform="riscv64")
    assert "linux/amd64" in str(failure.value.hint)


def test_a_pull_by_digest_gives_no_tag(registry: Registry, root: Root) -> None:
    image = make_image({"a": b"by digest"})
    registry.put_image("bydigest", "v1", image)
    name = f"{registry.host}/bydigest@{image.manifest.digest}"
    assert fetch(root, name).record.names == ()
    assert root.images.get(name).id == image.config.digest


def test_skipping_what_is_there(registry: Registry, root: Root, proxy: Proxy) -> None:
    shared = {"shared": b"s" * 1000}
    registry.put_image("shared", "v1", make_image(shared, {"one": b"1"}))
    second = make_image(shared, {"two": b"2"})
    registry.put_image("shared", "v2", second)
    fetch(root, f"{proxy.host}/shared:v1")
    proxy.asked.clear()
    result = fetch(root, f"{proxy.host}/shared:v2")
    assert proxy.count("GET", f"blobs/{second.layers[0].digest}") == 0
    assert proxy.count("GET", "/blobs/") == 2
    assert result.fetched_bytes == len(second.layers[1].data)
    proxy.asked.clear()
    assert not fetch(root, f"{proxy.host}/shared:v2").changed
    assert [(a.method, a.path.partition("/v2/")[2]) for a in proxy.asked] == [
        ("GET", ""),
        ("HEAD", "shared/manifests/v2"),
    ]


def test_a_tag_that_moved_leaves_the_old_image_dangling(registry: Registry, root: Root) -> None:
    old, new = make_image({"v": b"old"}), make_image({"v": b"new"})
    registry.put_image("moving", "v1", old)
    name = f"{registry.host}/moving:v1"
    fetch(root, name)
    registry.put_image("moving", "v1", new)
    assert fetch(root, name).changed
    assert root.images.get(name).id == new.config.digest
    assert root.images.get(old.config.digest).names == ()


def test_one_layer_twice_in_an_image(registry: Registry, root: Root, proxy: Proxy) -> None:
    image = make_image({"a": b"same" * 100}, {"a": b"same" * 100})
    registry.put_image("twice", "v1", image)
    record = fetch(root, f"{proxy.host}/twice:v1").record
    assert record.layers[0].digest == record.layers[1].digest
    assert proxy.count("GET", image.layers[0].digest) == 1


def test_progress_is_told_per_layer(registry: Registry, root: Root) -> None:
    image = make_image({"big": BIG})
    registry.put_image("progress", "v1", image)
    events: list[ProgressEvent] = []
    fetch(root, f"{registry.host}/progress:v1", progress=events.append)
    layer = [event for event in events if event.item == image.layers[0].digest]
    assert layer[0].phase == "downloading"
    assert layer[-1].phase == "done"
    assert layer[-1].done == layer[-1].total == len(image.layers[0].data)
    assert events[-1].phase == "complete"


def test_layers_lost_from_disk_come_back_from_their_blobs(registry: Registry, root: Root) -> None:
    registry.put_image("lost", "v1", make_image({"a": b"1"}, {"b": b"2"}))
    record = fetch(root, f"{registry.host}/lost:v1").record
    for chain_id in record.chain_ids:
        root.layers.remove(chain_id)
    ensure_unpacked(record, root.content, root.layers)
    assert content_of(root, record.layers[1], "b") == b"2"


# ---- interruptions -----------------------------------------------------------------------


def test_a_broken_blob_is_resumed_by_range(registry: Registry, root: Root, proxy: Proxy) -> None:
    image = make_image({"big": BIG}, how="")
    registry.put_image("cut", "v1", image)
    wanted = only_blob(image.layers[0].digest)
    cuts = iter([1_000_000, 1_000_000])

    def rule(asked: Asked) -> Fault | None:
        cut = next(cuts, None) if wanted(asked) else None
        return Fault(cut=cut) if cut is not None else None

    proxy.rule = rule
    result = fetch(root, f"{proxy.host}/cut:v1")
    assert content_of(root, result.record.layers[0], "big") == BIG
    ranges = [a.headers.get("range", "") for a in proxy.asked if wanted(a)]
    size = len(image.layers[0].data)
    assert ranges == ["", f"bytes=1000000-{size - 1}", f"bytes=2000000-{size - 1}"]


def test_a_registry_without_ranges_sends_all_again(
    registry: Registry, root: Root, proxy: Proxy
) -> None:
    image = make_image({"big": BIG})
    registry.put_image("noranges", "v1", image)
    wanted = only_blob(image.layers[0].digest)
    cuts = iter([1_500_000])

    def rule(asked: Asked) -> Fault | None:
        if not wanted(asked):
            return None
        return Fault(cut=next(cuts, None), drop_request_headers=("range",))

    proxy.rule = rule
    result = fetch(root, f"{proxy.host}/noranges:v1")
    assert content_of(root, result.record.layers[0], "big") == BIG


def test_the_next_pull_goes_on_where_one_broke_off(
    registry: Registry, root: Root, proxy: Proxy
) -> None:
    image = make_image({"big": BIG}, how="")
    registry.put_image("resume", "v1", image)
    wanted = only_blob(image.layers[0].digest)
    proxy.rule = lambda asked: (
        (Fault(hang_up=True) if "range" in asked.headers else Fault(cut=1_000_000))
        if wanted(asked)
        else None
    )
    with pytest.raises(Unavailable, match=r"connection (closed early|lost)"):
        fetch(root, f"{proxy.host}/resume:v1")
    assert nothing_recorded(root)
    proxy.rule = lambda asked: None
    proxy.asked.clear()
    fetch(root, f"{proxy.host}/resume:v1")
    assert [a.headers.get("range", "")[:14] for a in proxy.asked if wanted(a)] == ["bytes=1000000-"]


def test_a_spoilt_part_is_dropped_and_fetched_anew(registry: Registry, root: Root) -> None:
    image = make_image({"big": BIG}, how="")
    registry.put_image("spoilt", "v1", image)
    part = Path(root.content.part_path(image.layers[0].digest))
    part.parent.mkdir(parents=True)
    part.write_bytes(b"\xff" * 100_000)
    result = fetch(root, f"{registry.host}/spoilt:v1")
    assert content_of(root, result.record.layers[0], "big") == BIG


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_patience_with_a_busy_registry(
    registry: Registry, root: Root, proxy: Proxy, status: int
) -> None:
    registry.put_image(f"busy{status}", "v1", make_image({"a": b"busy"}))
    seen: dict[str, int] = {}

    def rule(asked: Asked) -> Fault | None:
        seen[asked.path] = seen.get(asked.path, 0) + 1
        busy = seen[asked.path] <= 2 and asked.path != "/v2/"
        return Fault(status=status, headers={"Retry-After": "0"}, body=b"x") if busy else None

    proxy.rule = rule
    assert fetch(root, f"{proxy.host}/busy{status}:v1").changed
    assert all(count == 3 for path, count in seen.items() if path != "/v2/")


def test_a_registry_that_asks_for_too_much_patience_is_left(
    registry: Registry, root: Root, proxy: Proxy
) -> None:
    proxy.rule = lambda asked: (
        Fault(status=429, headers={"Retry-After": "3600"}, body=b"")
        if asked.path != "/v2/"
        else None
    )
    with pytest.raises(Unavailable, match="429") as failure:
        fetch(root, f"{proxy.host}/toobusy:v1")
    assert failure.value.hint == "the registry asks to come back in 3600 s"


def test_the_callers_stop_ends_a_pull_and_leaves_a_part(
    registry: Registry, root: Root, proxy: Proxy
) -> None:
    image = make_image({"big": BIG}, how="")
    registry.put_image("stopped", "v1", image)
    wanted = only_blob(image.layers[0].digest)
    stop, release = threading.Event(), threading.Event()

    def pause() -> None:
        stop.set()
        release.wait(60)

    def rule(asked: Asked) -> Fault | None:
        if not wanted(asked):
            return None
        if "range" not in asked.headers:
            return Fault(cut=1_000_000)
        return Fault(before=pause)

    proxy.rule = rule
    try:
        with pytest.raises(Cancelled):
            # The stop comes while the answer to the second request is being waited for.
            fetch(root, f"{proxy.host}/stopped:v1", stop=stop)
        assert not release.is_set()
    finally:
        release.set()
    assert nothing_recorded(root)
    assert Path(root.content.part_path(image.layers[0].digest)).stat().st_size == 1_000_000
    assert list(root.leases.list()) == []


_PULLER = """
import sys
from pathlib import Path
from tests.image.registries import FAST, Root
from hutch.image.pull import pull
root = Root(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print(pull(sys.argv[2], config=FAST, **root.parts()).record.id)
root.close()
"""


def test_two_processes_pull_the_same_image_and_download_it_once(
    registry: Registry, root: Root, proxy: Proxy
) -> None:
    image = make_image({"big": BIG}, {"other": BIG[::-1]}, {"small": b"s"})
    registry.put_image("race", "v1", image)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PULLER, str(root.path), f"{proxy.host}/race:v1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert out.strip() == image.config.digest
    for layer in image.layers:
        assert proxy.count("GET", layer.digest) == 1


def start_puller(root: Root, name: str) -> subprocess.Popen[str]:
    """Run a pull in another process."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PULLER, str(root.path), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return process


def test_an_interrupt_ends_a_pull_at_once_and_leaves_a_part(
    registry: Registry, root: Root, proxy: Proxy
) -> None:
    image = make_image({"big": BIG}, how="")
    registry.put_image("interrupted", "v1", image)
    wanted = only_blob(image.layers[0].digest)
    reached, release = threading.Event(), threading.Event()

    def pause() -> None:
        reached.set()
        release.wait(60)

    def rule(asked: Asked) -> Fault | None:
        if not wanted(asked):
            return None
        return Fault(before=pause) if "range" in asked.headers else Fault(cut=1_000_000)

    proxy.rule = rule
    with start_puller(root, f"{proxy.host}/interrupted:v1") as process:
        assert reached.wait(60)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert not release.is_set()
    release.set()
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert nothing_recorded(root)
    assert Path(root.content.part_path(image.layers[0].digest)).stat().st_size == 1_000_000
    assert list(root.leases.list()) == []


def test_a_killed_pull_leaves_nothing_that_hinders_the_next(
    registry: Registry, root: Root, proxy: Proxy
) -> None:
    image = make_image({"big": BIG}, {"b": b"2"})
    registry.put_image("killed", "v1", image)
    wanted = only_blob(image.layers[0].digest)
    reached, release = threading.Event(), threading.Event()

    def pause() -> None:
        reached.set()
        release.wait(60)

    proxy.rule = lambda asked: Fault(before=pause) if wanted(asked) else None
    with start_puller(root, f"{proxy.host}/killed:v1") as process:
        assert reached.wait(60)
        process.kill()
    release.set()
    proxy.rule = lambda asked: None
    assert list(root.leases.list()) == []
    assert fetch(root, f"{proxy.host}/killed:v1").record.id == image.config.digest


def test_collection_beside_a_pull_takes_nothing_of_it(
    registry: Registry, root: Root, proxy: Proxy
) -> None:
    image = make_image({"one": b"1" * 1000}, {"two": b"2" * 1000})
    registry.put_image("collected", "v1", image)
    proxy.rule = lambda asked: (
        Fault(before=collect) if "/blobs/" in asked.path or "/manifests/" in asked.path else None
    )
    runs: list[int] = []

    def collect() -> None:
        runs.append(len(root.collector().collect().blobs))

    record = fetch(root, f"{proxy.host}/collected:v1").record
    assert len(runs) == 4
    collect()
    assert sum(runs) == 0
    assert all(root.content.has(each) for each in record.digests)
    assert all(root.layers.has(each) for each in record.chain_ids)
    root.images.remove(record.id)
    collect()
    assert not any(root.content.has(each) for each in record.digests)


# ---- lies and attacks --------------------------------------------------------------------


def lie(root: Root, proxy: Proxy, name: str, part: str, fault: Fault) -> HutchError:
    """Pull with a fault on every GET whose path holds `part`; return the error."""
    proxy.rule = lambda asked: fault if asked.method == "GET" and part in asked.path else None
    with pytest.raises(HutchError) as failure:
        fetch(root, f"{proxy.host}/{name}")
    assert nothing_recorded(root)
    return failure.value


def test_content_that_does_not_match_its_digest_is_refused(
    registry: Registry, root: Root, proxy: Proxy
) -> None:
    image = make_image({"a": b"truth"}, how="")
    registry.put_image("lies", "v1", image)
    forged = make_image({"a": b"false"}, how="")
    layer, config = image.layers[0], image.config
    assert len(forged.layers[0].data) == len(layer.data)
    for digest_, data in (
        (config.digest, b"{" + config.data[1:].replace(b"sh", b"ax")),
        (layer.digest, forged.layers[0].data),
        (layer.digest, os.urandom(len(layer.data))),
        (layer.digest, layer.data + b"x"),
        ("manifests/v1", forged.manifest.data),
    ):
        error = lie(root, proxy, "lies:v1", digest_, Fault(body=data))
        assert isinstance(error, IntegrityError), error
    assert not root.layers.has(digest(tar({"a": b"false"})))
    assert not Path(root.content.part_path(layer.digest)).exists()
    proxy.rule = lambda asked: None
    assert fetch(root, f"{proxy.host}/lies:v1").changed


def test_a_registry_that_never_sends_all_is_left(
    registry: Registry, root: Root, proxy: Proxy
) -> None:
    image = make_image({"a": b"short"})
    registry.put_image("short", "v1", image)
    part = image.layers[0].data[:50]
    error = lie(root, proxy, "short:v1", image.layers[0].digest, Fault(status=200, body=part))
    assert isinstance(error, Unavailable)


def put_raw(registry: Registry, repository: str, image: Image, manifest: object) -> None:
    """Store a manifest that docker-registry would not take, by way of the proxy's rule."""
    for blob in (*image.layers, image.config):
        registry.put_blob(repository, blob.data)


def serve_manifest(proxy: Proxy, data: bytes, media_type: str) -> None:
    proxy.rule = lambda asked: (
        Fault(
            status=200,
            body=data,
            headers={"content-type": media_type},
            drop_headers=("docker-content-digest",),
        )
        if "/manifests/" in asked.path
        else None
    )


@pytest.mark.parametrize(
    ("media_type", "kind"),
    [
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "may not be distributed"),
        (
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            "may not be distributed",
        ),
        ("application/octet-stream", "cannot be unpacked"),
    ],
)
def test_layers_that_cannot_be_had_are_refused(
    registry: Registry, root: Root, proxy: Proxy, media_type: str, kind: str
) -> None:
    image = make_image({"a": b"foreign"})
    put_raw(registry, "foreign", image, None)
    document = msgspec.json.decode(image.manifest.data)
    document["layers"][0]["mediaType"] = media_type
    serve_manifest(proxy, msgspec.json.encode(document), MediaType.OCI_MANIFEST)
    with pytest.raises(Unsupported, match=kind):
        fetch(root, f"{proxy.host}/foreign:v1")


def test_a_layer_count_that_does_not_match_is_refused(registry: Registry, root: Root) -> None:
    image = make_image({"a": b"1"}, {"b": b"2"}, diff_ids=[digest(b"x")])
    registry.put_image("count", "v1", image)
    with pytest.raises(InvalidArgument, match="2 layers in the manifest, 1 in the configuration"):
        fetch(root, f"{registry.host}/count:v1")


def test_a_diff_id_that_does_not_match_is_refused(registry: Registry, root: Root) -> None:
    image = make_image({"a": b"1"}, diff_ids=[digest(b"something else")])
    registry.put_image("diffid", "v1", image)
    with pytest.raises(IntegrityError, match="expected sha256"):
        fetch(root, f"{registry.host}/diffid:v1")
    assert nothing_recorded(root)
    assert list(root.layers.list()) == []


def test_a_bomb_is_stopped_at_the_limit(registry: Registry, root: Root) -> None:
    image = make_image({"bomb": bytes(64 << 20)})
    registry.put_image("bomb", "v1", image)
    limited = Layers(root.path, trash=root.trash, limits=UnpackLimits(max_bytes=1 << 20))
    with pytest.raises(Exhausted, match="limit max_bytes"):
        fetch(root, f"{registry.host}/bomb:v1", layers=limited)
    assert nothing_recorded(root)
    assert list(root.layers.list()) == []


def test_layers_small_each_and_large_together_meet_the_limit(
    registry: Registry, root: Root
) -> None:
    layers = [{f"zeros{n}": bytes(1 << 20)} for n in range(6)]
    registry.put_image("many-bombs", "v1", make_image(*layers))
    config = msgspec.structs.replace(FAST, max_unpacked_bytes=3 << 20, parallel=2)
    with pytest.raises(Exhausted, match="more than 3145728 bytes") as caught:
        pull(f"{registry.host}/many-bombs:v1", **root.parts(), config=config)
    assert "max_unpacked_bytes" in str(caught.value.hint)
    assert nothing_recorded(root)
    assert sum(layer.size for layer in root.layers.list()) < 6 << 20


def test_an_image_over_the_stated_size_is_not_begun(
    registry: Registry, root: Root, proxy: Proxy
) -> None:
    registry.put_image("large", "v1", make_image({"big": BIG}))
    with pytest.raises(Exhausted, match="more than the limit"):
        fetch(
            root,
            f"{proxy.host}/large:v1",
            config=msgspec.structs.replace(FAST, max_image_bytes=1 << 20),
        )
    assert proxy.count("GET", "/blobs/") == 0


def test_an_image_for_another_system_is_refused(registry: Registry, root: Root) -> None:
    image = make_image({"a": b"w"})
    config = Blob(image.config.data.replace(b'"linux"', b'"windows"'), image.config.media_type)
    document = msgspec.json.decode(image.manifest.data)
    document["config"] = config.descriptor()
    manifest = Blob(msgspec.json.encode(document), image.manifest.media_type)
    registry.put_image("windows", "v1", Image(manifest, config, image.layers))
    with pytest.raises(Unsupported, match="is for windows"):
        fetch(root, f"{registry.host}/windows:v1")


@pytest.mark.parametrize("platform", ["windows/amd64", "linux/arm64"])
def test_a_platform_that_is_asked_for_and_not_there_is_refused(
    platform: str, registry: Registry, root: Root
) -> None:
    registry.put_image("one-platform", "v1", make_image({"a": b"1"}))
    with pytest.raises(NotFound, match=f"not for {platform}"):
        fetch(root, f"{registry.host}/one-platform:v1", platform=platform)
    assert nothing_recorded(root)


def test_a_full_disk_is_exhausted_and_leaves_no_image(registry: Registry, tmp_path: Path) -> None:
    registry.put_image("full", "v1", make_image({"big": BIG}))
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "hutch-test", small], check=True)
    try:
        root = Root(small)
        with pytest.raises(Exhausted):
            fetch(root, f"{registry.host}/full:v1")
        assert nothing_recorded(root)
        assert list((small / "ingest").iterdir()) == []
        root.close()
    finally:
        subprocess.run(["umount", small], check=True)


def test_what_is_missing_or_private_is_told_apart(
    registry: Registry, root: Root, proxy: Proxy
) -> None:
    with pytest.raises(NotFound, match="nowhere:v1"):
        fetch(root, f"{registry.host}/nowhere:v1")
    proxy.rule = lambda asked: Fault(status=403, body=b"")
    with pytest.raises(Denied):
        fetch(root, f"{proxy.host}/nowhere:v1")
    with pytest.raises(Unavailable, match="refused"):
        fetch(root, "127.0.0.1:1/nowhere:v1")


# ---- mirrors and redirects ---------------------------------------------------------------


def test_a_mirror_is_asked_first_and_the_registry_where_it_fails(
    registry: Registry, root: Root, proxy: Proxy
) -> None:
    one, two = make_image({"m": b"mirror"}), make_image({"m": b"second"})
    registry.put_image("mirrored", "v1", one)
    registry.put_image("mirrored", "v2", two)
    with running_proxy(registry.host) as mirror:
        config = msgspec.structs.replace(FAST, mirrors={proxy.host: (mirror.host,)})
        fetch(root, f"{proxy.host}/mirrored:v1", config=config)
        assert proxy.asked == []
        forged = Fault(body=b"x" * len(two.layers[0].data))
        mirror.rule = lambda asked: forged if two.layers[0].digest in asked.path else None
        result = fetch(root, f"{proxy.host}/mirrored:v2", config=config)
    assert content_of(root, result.record.layers[0], "m") == b"second"
    assert proxy.count("GET", two.layers[0].digest) == 1
    dead = msgspec.structs.replace(FAST, mirrors={registry.host: ("127.0.0.1:1", mirror.host)})
    assert fetch(root, f"{registry.host}/mirrored:v1", config=dead)


def test_a_mirror_may_have_a_prefix(registry: Registry, root: Root) -> None:
    image = make_image({"p": b"prefix"})
    registry.put_image("cache/hub/thing", "v1", image)
    config = msgspec.structs.replace(
        FAST, mirrors={"example.invalid": (f"http://{registry.host}/cache/hub",)}
    )
    result = fetch(root, "example.invalid/thing:v1", config=config)
    assert result.record.names == ("example.invalid/thing:v1",)


def test_blobs_may_be_elsewhere(registry: Registry, root: Root, proxy: Proxy) -> None:
    image = make_image({"r": b"redirect"})
    registry.put_image("redirected", "v1", image)
    path = f"/v2/redirected/blobs/{image.layers[0].digest}"
    with running_proxy(registry.host) as storage:
        target = f"http://{storage.host}{path}?signature=secret"
        proxy.rule = lambda asked: (
            Fault(status=307, headers={"Location": target}, body=b"")
            if asked.path == path
            else None
        )
        fetch(root, f"{proxy.host}/redirected:v1")
        assert [a.path for a in storage.asked] == [f"{path}?signature=secret"]


def test_a_signed_address_is_not_told(registry: Registry, root: Root, proxy: Proxy) -> None:
    image = make_image({"r": b"signed"})
    registry.put_image("signed", "v1", image)
    with running_proxy(registry.host) as storage:
        storage.rule = lambda asked: Fault(hang_up=True)
        target = f"http://{storage.host}/blob?signature=secret"
        error = lie(
            root,
            proxy,
            "signed:v1",
            image.layers[0].digest,
            Fault(status=302, headers={"Location": target}, body=b""),
        )
    assert isinstance(error, Unavailable)
    assert "secret" not in str(error) + repr(error.__cause__)


@pytest.mark.parametrize("target", ["/v2/loop/manifests/v1", "file:///etc/passwd", "http://[::bad"])
def test_redirects_that_lead_nowhere_are_refused(
    registry: Registry, root: Root, proxy: Proxy, target: str
) -> None:
    fault = Fault(status=307, headers={"Location": target}, body=b"")
    assert isinstance(lie(root, proxy, "loop:v1", "manifests", fault), Unavailable)


# ---- other tools ------------------------------------------------------------------------


@requires("skopeo", "busybox")
def test_an_image_that_skopeo_pushed_is_pulled(
    registry: Registry, root: Root, busybox_rootfs: Path, tmp_path: Path
) -> None:
    image = make_image({"bin/busybox": (busybox_rootfs / "bin/busybox").read_bytes()})
    layout = tmp_path / "layout"
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True)
    for blob in (image.manifest, image.config, *image.layers):
        (blobs / blob.digest.removeprefix("sha256:")).write_bytes(blob.data)
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    annotations = {"org.opencontainers.image.ref.name": "v1"}
    index = {
        "schemaVersion": 2,
        "manifests": [image.manifest.descriptor(annotations=annotations)],
    }
    (layout / "index.json").write_bytes(msgspec.json.encode(index))
    for form, name in (("oci", "a"), ("v2s2", "b")):
        target = f"{registry.host}/skopeo:{name}"
        subprocess.run(
            ["skopeo", "copy", "-q", "--dest-tls-verify=false", "--format", form,
             f"oci:{layout}:v1", f"docker://{target}"],
            check=True,
            capture_output=True,
        )  # fmt: skip
        record = fetch(root, target).record
        busybox = Path(root.layers.path(record.layers[0].chain_id), "bin/busybox")
        done = subprocess.run([busybox, "echo", "hello"], check=True, capture_output=True)
        assert done.stdout == b"hello\n"
