"""Devices by a vendor's names: reading the files, and what a container gets of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hutch.errors import NotFound, Unsupported
from hutch.resources.cdi import Registry, load_registry


def gpu_file(**more: object) -> dict[str, object]:
    devices = [
        {"name": name, "containerEdits": {"deviceNodes": [{"path": f"/dev/{name}"}]}}
        for name in ("0", "1", "GPU-aa", "GPU-bb", "all")
    ]
    edits = {"env": ["DRIVER=1"], "mounts": [{"hostPath": "/usr", "containerPath": "/opt/drv"}]}
    return {
        "cdiVersion": "0.6.0",
        "kind": "nvidia.com/gpu",
        "annotations": {"a": "b"},
        "devices": devices,
        "containerEdits": edits,
        **more,
    }


def registry(directory: Path, **files: object) -> Registry:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return load_registry([str(directory)])


def test_a_devices_edits_come_with_those_of_its_file_once(tmp_path: Path) -> None:
    found = registry(tmp_path, nvidia=gpu_file())
    edits = found.resolve(["nvidia.com/gpu=0", "nvidia.com/gpu=1", "nvidia.com/gpu=0"])
    assert edits.env == ("DRIVER=1",)
    assert [node.path for node in edits.device_nodes] == ["/dev/0", "/dev/1"]
    assert [mount.container_path for mount in edits.mounts] == ["/opt/drv"]


@pytest.mark.parametrize(
    "version", ["0.3.0", "0.4.0", "0.5.0", "v0.6.0", "0.7.0", "0.8.0", "1.0.0"]
)
def test_versions_that_are_known(tmp_path: Path, version: str) -> None:
    assert not registry(tmp_path, a=gpu_file(cdiVersion=version)).problems


def test_yaml_says_the_same_as_json(tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text(
        "cdiVersion: '0.5.0'\nkind: vendor.com/net\ndevices:\n- name: a\n  containerEdits:\n"
        "    deviceNodes:\n    - {path: /dev/a, hostPath: /dev/null, type: c, major: 1, minor: 3,"
        " fileMode: 384, permissions: rw, uid: 7, gid: 8}\n    additionalGids: [44]\n"
    )
    found = load_registry([str(tmp_path)])
    edits = found.resolve(["vendor.com/net=a"])
    node = edits.device_nodes[0]
    assert (node.host_path, node.file_mode, node.uid) == ("/dev/null", 0o600, 7)
    assert edits.additional_gids == (44,)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "a.json"),
        ("[]", "a.json"),
        (json.dumps(gpu_file(cdiVersion="2.0.0")), "cdiVersion"),
        (json.dumps(gpu_file(kind="gpu")), "kind"),
        (json.dumps(gpu_file(devices=[{"name": "../x"}])), "devices[0].name"),
        (json.dumps(gpu_file(devices=[{"name": 1}])), "devices[0].name"),
        ("\udcff", "a.json"),
    ],
)
def test_a_bad_file_is_told_and_keeps_nobody_from_the_others(
    tmp_path: Path, content: str, why: str
) -> None:
    (tmp_path / "a.json").write_bytes(content.encode(errors="surrogateescape"))
    found = registry(tmp_path, b=gpu_file(kind="other.com/gpu"))
    assert "other.com/gpu=0" in found.devices
    path = str(tmp_path / "a.json")
    assert why in f"{path} {found.problems[path]}"
    with pytest.raises(NotFound) as caught:
        found.resolve(["nvidia.com/gpu=0"])
    assert path in str(caught.value)


def test_a_later_directory_goes_first_and_twins_cancel_each_other(tmp_path: Path) -> None:
    first, second = tmp_path / "etc", tmp_path / "run"
    registry(first, a=gpu_file(), b=gpu_file())
    both = load_registry([str(first)])
    with pytest.raises(NotFound, match="both have it"):
        both.resolve(["nvidia.com/gpu=0"])
    registry(second, a=gpu_file(containerEdits={"env": ["LATER=1"]}))
    assert load_registry([str(first), str(second)]).resolve(["nvidia.com/gpu=0"]).env == (
        "LATER=1",
    )


def test_hooks_and_what_is_not_done_here_are_refused(tmp_path: Path) -> None:
    hooks = {"hooks": [{"hookName": "createContainer", "path": "/bin/h", "args": ["h"]}]}
    found = registry(
        tmp_path,
        a=gpu_file(containerEdits=hooks),
        b=gpu_file(kind="b.com/x", containerEdits={"intelRdt": {"closID": "a"}}),
    )
    with pytest.raises(Unsupported, match="hook createContainer") as caught:
        found.resolve(["nvidia.com/gpu=0"])
    assert "disable-hook" in (caught.value.hint or "")
    with pytest.raises(Unsupported, match="intelRdt"):
        found.resolve(["b.com/x=0"])


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("all", ["nvidia.com/gpu=all"]),
        ("1", ["nvidia.com/gpu=0"]),
        ("2", ["nvidia.com/gpu=0", "nvidia.com/gpu=1"]),
        ("device=1,gpu-aa", ["nvidia.com/gpu=1", "nvidia.com/gpu=GPU-aa"]),
    ],
)
def test_gpus_are_chosen_as_docker_does(tmp_path: Path, wanted: str, names: list[str]) -> None:
    assert list(registry(tmp_path, a=gpu_file()).choose_gpus(wanted)) == names


def test_gpus_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no CDI file") as caught:
        registry(tmp_path).choose_gpus("all")
    assert "nvidia-ctk" in (caught.value.hint or "")
    found = registry(tmp_path, a=gpu_file())
    with pytest.raises(NotFound, match="3 wanted, there are 2"):
        found.choose_gpus("3")
    with pytest.raises(NotFound, match="device 9"):
        found.choose_gpus("device=9")
