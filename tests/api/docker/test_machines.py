"""Virtual machines through Docker's API: the same endpoints, by `--runtime hutch-vm`."""

from __future__ import annotations

import io
import tarfile

import pytest

from tests.api.docker.conftest import Client
from tests.api.docker.test_containers import create, hijack, read_to_end, start, text_of, wait

pytestmark = [
    pytest.mark.requires(
        *("root", "cgroup", "overlayfs", "netns", "nftables", "busybox"),
        *("qemu", "apt-mirror", "mkfs.erofs", "mke2fs"),
    ),
    pytest.mark.timeout(600),
]


def test_a_machine_lives_as_a_container_does(api: Client, name: str, image: str) -> None:
    script = "echo begun; until [ -e /tmp/go ]; do sleep 0.1; done; echo ended; exit 6"
    create(api, name, image, "sh", "-c", script, HostConfig={"Runtime": "hutch-vm"})
    sock, seen = hijack(api, f"/containers/{name}/attach?stream=1&stdout=1")
    start(api, name)
    told = api.ask("GET", f"/containers/{name}/json").json
    assert told["HostConfig"]["Runtime"] == "hutch-vm"
    assert told["State"]["Running"]
    body = {"Cmd": ["cat", "/proc/sys/kernel/osrelease"], "AttachStdout": True}
    made = api.ask("POST", f"/containers/{name}/exec", body).json["Id"]
    inside, begun = hijack(api, f"/exec/{made}/start", b"{}")
    # A kernel of its own: that it has one at all is seen by its name, Debian's for clouds.
    assert text_of(read_to_end(inside, begun), 1).strip()
    assert api.ask("GET", f"/exec/{made}/json").json["ExitCode"] == 0
    assert api.ask("GET", f"/containers/{name}/top?ps_args=aux").status == 501
    assert "sh" in str(api.ask("GET", f"/containers/{name}/top").json["Processes"])
    stats = api.ask("GET", f"/containers/{name}/stats?stream=0&one-shot=1").json
    assert stats["memory_stats"]["usage"] > 0
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("go"))
    answer = api.ask("PUT", f"/containers/{name}/archive?path=/tmp", data.getvalue())
    assert answer.status == 200, answer
    assert wait(api, name) == 6
    assert text_of(read_to_end(sock, seen), 1) == b"begun\nended\n"
    assert text_of(api.ask("GET", f"/containers/{name}/logs?stdout=1").body, 1) == (
        b"begun\nended\n"
    )
    assert api.ask("DELETE", f"/containers/{name}").status == 204
