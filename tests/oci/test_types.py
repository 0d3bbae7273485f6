"""Image documents: what is read, what is refused and where, and that nothing else happens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hutch.errors import HutchError, IntegrityError, InvalidArgument, NotFound, Unsupported
from hutch.image.register import build_record, runtime_config
from hutch.oci.digest import Verifier, chain_ids, check_digest, digest_of, is_digest
from hutch.oci.platform import choose, normalize, parse_platform
from hutch.oci.types import (
    Index,
    MediaType,
    ProcessConfig,
    decode_config,
    decode_index,
    decode_manifest,
    manifest_kind,
)

D = digest_of(b"x")


def manifest(**changes: Any) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": MediaType.OCI_MANIFEST,
        "config": {"mediaType": MediaType.OCI_CONFIG, "digest": D, "size": 10},
        "layers": [{"mediaType": MediaType.OCI_LAYER_GZIP, "digest": D, "size": 5}],
        **changes,
    }


def encoded(value: object) -> bytes:
    return json.dumps(value).encode()


def layer(**changes: Any) -> dict[str, Any]:
    return {"mediaType": MediaType.OCI_LAYER, "digest": D, "size": 1, **changes}


@pytest.mark.parametrize(
    ("document", "kind", "said"),
    [
        (manifest(schemaVersion=1), Unsupported, "schema version 1"),
        (manifest(config=5), InvalidArgument, "$.config"),
        (manifest(layers=[layer(size=-1)]), InvalidArgument, "$.layers[0].size"),
        (manifest(layers=[layer(), layer(size=1 << 60)]), InvalidArgument, "$.layers[1].size"),
        (manifest(layers=[layer(digest="sha256:../../x")]), InvalidArgument, "$.layers[0].digest"),
        (manifest(layers=[layer(digest="md5:" + "0" * 32)]), InvalidArgument, "$.layers[0].digest"),
        (manifest(layers=[layer()] * 600), InvalidArgument, "more than 512 layers"),
        (manifest(mediaType=MediaType.OCI_INDEX), InvalidArgument, "$.mediaType"),
        (
            manifest(
                config={"mediaType": "application/vnd.cncf.helm.config", "digest": D, "size": 1}
            ),
            Unsupported,
            "not a container image",
        ),
        ([], InvalidArgument, "object"),
        ({}, InvalidArgument, "schemaVersion"),
    ],
)
def test_a_bad_manifest_is_refused_by_its_place(
    document: object, kind: type[HutchError], said: str
) -> None:
    with pytest.raises(kind) as failure:
        decode_manifest(encoded(document))
    assert said in str(failure.value)


def test_a_manifest_must_be_what_the_registry_said() -> None:
    decode_manifest(encoded(manifest()), MediaType.OCI_MANIFEST)
    with pytest.raises(InvalidArgument, match="where the registry said"):
        decode_manifest(encoded(manifest()), MediaType.DOCKER_MANIFEST)


def test_a_large_document_is_not_read() -> None:
    with pytest.raises(InvalidArgument, match="larger than"):
        decode_manifest(b" " * (5 << 20))
    with pytest.raises(InvalidArgument, match="larger than"):
        decode_config(b" " * (17 << 20))


def test_what_is_no_json_is_said_so() -> None:
    with pytest.raises(InvalidArgument, match="manifest: not JSON: JSON is malformed"):
        decode_manifest(b"<html>")


def test_a_deep_document_is_refused() -> None:
    for deep in (b"[" * 100_000, b'{"a":' * 100_000, b'{"manifests":' + b"[" * 100_000):
        for decode in (decode_manifest, decode_index, decode_config):
            with pytest.raises(InvalidArgument):
                decode(deep)


@pytest.mark.parametrize(
    ("media_type", "document", "expected"),
    [
        (MediaType.OCI_INDEX + "; charset=utf-8", {}, MediaType.OCI_INDEX),
        ("application/json", {"mediaType": MediaType.DOCKER_LIST}, MediaType.DOCKER_LIST),
        ("", {"schemaVersion": 2, "layers": []}, MediaType.OCI_MANIFEST),
        ("text/plain", {"schemaVersion": 2, "manifests": []}, MediaType.OCI_INDEX),
    ],
)
def test_a_manifests_kind_comes_from_the_header_or_itself(
    media_type: str, document: object, expected: str
) -> None:
    assert manifest_kind(encoded(document), media_type) == expected


@pytest.mark.parametrize(
    ("media_type", "document"),
    [
        (MediaType.DOCKER_V1_SIGNED, {}),
        ("", {"schemaVersion": 1}),
        ("", {}),
        ("", {"layers": [], "manifests": []}),
    ],
)
def test_what_is_no_image_is_unsupported(media_type: str, document: object) -> None:
    with pytest.raises(Unsupported):
        manifest_kind(encoded(document), media_type)


# ---- fuzz --------------------------------------------------------------------------------

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=20,
)
_config_keys = st.sampled_from(
    ["User", "Env", "Cmd", "Entrypoint", "Volumes", "ExposedPorts", "Labels", "WorkingDir",
     "Healthcheck", "StopSignal", "Shell", "OnBuild", "ArgsEscaped"]
)  # fmt: skip


@given(st.binary(max_size=300) | _json.map(encoded))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for decode in (decode_manifest, decode_index, decode_config):
        try:
            decode(data)
        except HutchError:
            pass
    try:
        manifest_kind(data, "")
    except HutchError:
        pass


@given(
    st.dictionaries(_config_keys, _json),
    st.dictionaries(
        st.sampled_from(["os", "architecture", "variant", "created", "history", "author"]), _json
    ),
    st.sampled_from(["config", "layers", "mediaType", "annotations"]),
    _json,
)
def test_any_configuration_gives_a_record_or_an_error(
    process: dict[str, Any], more: dict[str, Any], key: str, value: object
) -> None:
    config = encoded({**more, "config": process, "rootfs": {"type": "layers", "diff_ids": [D]}})
    document = manifest()
    document["config"] = {
        "mediaType": MediaType.OCI_CONFIG,
        "digest": digest_of(config),
        "size": len(config),
    }
    for data in (encoded(document), encoded({**document, key: value})):
        try:
            record = build_record(manifest=data, media_type=MediaType.OCI_MANIFEST, config=config)
        except HutchError:
            continue
        assert record.id == digest_of(config)
        assert all("\0" not in text for text in (*record.config.env, *record.config.cmd))


# ---- the configuration -------------------------------------------------------------------


def test_null_stands_for_nothing_as_in_go() -> None:
    nothing = dict.fromkeys(
        ["User", "Env", "Cmd", "Entrypoint", "Volumes", "ExposedPorts", "Labels", "WorkingDir",
         "Healthcheck", "StopSignal", "Shell", "OnBuild", "ArgsEscaped"]
    )  # fmt: skip
    outer = dict.fromkeys(["os", "architecture", "variant", "created", "history", "author"])
    config = decode_config(
        encoded({**outer, "config": nothing, "rootfs": {"type": "layers", "diff_ids": []}})
    )
    assert runtime_config(config.config) == runtime_config(None)


def test_a_plain_text_command_is_for_the_shell() -> None:
    run = runtime_config(ProcessConfig(cmd="echo $HOME", shell=["/bin/bash", "-c"]))
    assert run.cmd == ("/bin/bash", "-c", "echo $HOME")
    assert runtime_config(ProcessConfig(cmd="x")).cmd == ("/bin/sh", "-c", "x")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (ProcessConfig(env=["=x"]), "$.config.Env"),
        (ProcessConfig(env=["A=\0"]), "NUL"),
        (ProcessConfig(cmd=["a\0b"]), "$.config.Cmd"),
        (ProcessConfig(user="\0"), "$.config.User"),
        (ProcessConfig(volumes={"/": {}}), "$.config.Volumes"),
        (ProcessConfig(volumes={"..": {}}), "$.config.Volumes"),
        (ProcessConfig(exposed_ports={"http": {}}), "$.config.ExposedPorts"),
        (ProcessConfig(exposed_ports={"70000": {}}), "out of range"),
        (ProcessConfig(exposed_ports={"80/icmp": {}}), "$.config.ExposedPorts"),
        (ProcessConfig(exposed_ports={"9-8/tcp": {}}), "out of range"),
        (ProcessConfig(exposed_ports={"1-65535/tcp": {}, "9/udp": {}}), "more than 65535 ports"),
        (ProcessConfig(exposed_ports={"²": {}}), "$.config.ExposedPorts"),
    ],
)
def test_a_hostile_configuration_is_refused_by_its_place(config: ProcessConfig, said: str) -> None:
    with pytest.raises(InvalidArgument) as failure:
        runtime_config(config)
    assert said in str(failure.value)


@pytest.mark.parametrize(
    ("name", "most"), [("Cmd", 1 << 18), ("Entrypoint", 1 << 18), ("Env", 8192), ("Shell", 8192)]
)
def test_a_list_of_a_configuration_is_limited_by_its_name(name: str, most: int) -> None:
    def decode(count: int) -> None:
        rootfs = {"type": "layers", "diff_ids": []}
        decode_config(encoded({"config": {name: ["a"] * count}, "rootfs": rootfs}))

    decode(most)
    with pytest.raises(InvalidArgument) as failure:
        decode(most + 1)
    assert f"more than {most} entries - at `$.config.{name}`" in str(failure.value)


def test_an_image_may_expose_a_wide_range() -> None:
    ports: dict[str, Any] = {f"{port}/udp": {} for port in range(10_000, 20_001)}
    rootfs = {"type": "layers", "diff_ids": []}
    config = decode_config(encoded({"config": {"ExposedPorts": ports}, "rootfs": rootfs}))
    assert len(runtime_config(config.config).exposed_ports) == 10_001


def test_volumes_and_ports_have_one_form() -> None:
    config = ProcessConfig(
        volumes={"/b/../c//": {}, "rel/ative": {}},
        exposed_ports={"8001-8002": {}, "53/UDP": {}},
    )
    run = runtime_config(config)
    assert run.volumes == ("/c", "/rel/ative")
    assert run.exposed_ports == ("53/udp", "8001/tcp", "8002/tcp")


# ---- platforms ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("linux/amd64", "linux/amd64"),
        ("x86_64", "linux/amd64"),
        ("linux/aarch64", "linux/arm64/v8"),
        ("arm64", "linux/arm64/v8"),
        ("linux/arm", "linux/arm/v7"),
        ("linux/arm/6", "linux/arm/v6"),
        ("armhf", "linux/arm/v7"),
        ("linux/amd64/v1", "linux/amd64"),
        ("Linux/AMD64", "linux/amd64"),
    ],
)
def test_platforms_have_one_form(text: str, expected: str) -> None:
    assert str(parse_platform(text)) == expected


@pytest.mark.parametrize("text", ["", "/", "linux/", "a/b/c/d", "linux/amd 64", "linux//v7"])
def test_what_is_no_platform_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_platform(text)


def index(*platforms: dict[str, Any] | None) -> Index:
    entries = []
    for number, platform in enumerate(platforms):
        entry = {"mediaType": MediaType.OCI_MANIFEST, "digest": D, "size": number}
        entries.append(entry if platform is None else {**entry, "platform": platform})
    return decode_index(encoded({"schemaVersion": 2, "manifests": entries}))


def test_the_nearest_variant_is_chosen() -> None:
    v5, v6, v7 = ({"os": "linux", "architecture": "arm", "variant": v} for v in ("v5", "v6", "v7"))
    arm64 = {"os": "linux", "architecture": "arm64"}
    amd64 = {"os": "linux", "architecture": "amd64"}
    assert choose(index(v5, v7, v6), parse_platform("linux/arm/v7")).size == 1
    assert choose(index(v5, v6), parse_platform("linux/arm/v7")).size == 1
    assert choose(index(v7, arm64), parse_platform("arm64")).size == 1
    assert choose(index(v7), parse_platform("arm64")).size == 0
    assert choose(index(arm64, amd64, amd64), parse_platform("amd64")).size == 1
    with pytest.raises(NotFound):
        choose(index(v7), parse_platform("linux/arm/v6"))


def test_attestations_are_no_images() -> None:
    unknown = {"os": "unknown", "architecture": "unknown"}
    amd64 = {"os": "linux", "architecture": "amd64"}
    assert choose(index(unknown, amd64), parse_platform("amd64")).size == 1
    with pytest.raises(NotFound):
        choose(index(unknown), parse_platform("amd64"))


def test_an_index_that_states_no_platform_has_one_image_or_none() -> None:
    assert choose(index(None), parse_platform("amd64")).size == 0
    with pytest.raises(NotFound):
        choose(index(None, None), parse_platform("amd64"))
    with pytest.raises(NotFound):
        choose(index(), parse_platform("amd64"))


def test_windows_is_not_linux() -> None:
    windows = {"os": "windows", "architecture": "amd64", "os.version": "10.0"}
    with pytest.raises(NotFound, match="no image for linux/amd64"):
        choose(index(windows), normalize("linux", "amd64", None))


# ---- digests -----------------------------------------------------------------------------


def test_a_stream_is_verified_by_digest_and_size() -> None:
    good = Verifier(digest_of(b"hello"), 5)
    good.update(b"he")
    good.update(memoryview(b"llo"))
    good.finish()
    Verifier(digest_of(b"", "sha512")).finish()
    with pytest.raises(IntegrityError, match="longer than"):
        Verifier(D, 1).update(b"xy")
    with pytest.raises(IntegrityError, match="0 bytes where 1"):
        Verifier(D, 1).finish()
    wrong = Verifier(D, 1, what="blob")
    wrong.update(b"y")
    with pytest.raises(IntegrityError, match="blob: digest is"):
        wrong.finish()


def test_chain_ids_follow_the_specification() -> None:
    one, two, three = (digest_of(name) for name in (b"1", b"2", b"3"))
    first = digest_of(f"{one} {two}".encode())
    assert chain_ids([one, two, three]) == (one, first, digest_of(f"{first} {three}".encode()))
    assert chain_ids([]) == ()


@given(st.text(max_size=140))
def test_a_digest_is_its_own_file_name(text: str) -> None:
    if is_digest(text):
        assert check_digest(text) == text
        assert "/" not in text
    else:
        with pytest.raises(InvalidArgument):
            check_digest(text, "f")
