"""Instances at rest go to another hutch whole, or stay as they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from hutch.engine import Engine
from hutch.errors import (
    InvalidArgument,
    OperationTimeout,
    Unavailable,
    Unsupported,
    WrongState,
)
from hutch.migration import links
from hutch.records import ProgressEvent
from tests.migration.conftest import Other
from tests.requires import requires

pytestmark = [
    requires("root", "cgroup", "overlayfs", "seccomp", "netns", "nftables", "busybox"),
    pytest.mark.integration,
    pytest.mark.timeout(600),
]

CHANGES = """
echo one > /root/file; ln /root/file /root/same; chown 7:8 /root/file; chmod 4711 /root/file
rm /etc/group; rm -r /var; mkdir /var; echo new > /var/only
mkfifo /tmp/fifo; truncate -s 100M /root/sparse; echo end >> /root/sparse
echo said
"""
STATE = """
stat -c '%a %u %g %h' /root/file; cat /root/same; ls /etc/group 2>&1; ls /var
stat -c %F /tmp/fifo; stat -c %s /root/sparse; du -k /root/sparse | cut -f1; tail -c 4 /root/sparse
"""


def test_a_container_comes_with_its_image_files_log_and_specification(
    source: Engine, target: Other
) -> None:
    box = source.create(
        "busybox", ["sh", "-c", CHANGES], name="moved", env={"A": "b"}, labels={"k": "v"}
    )
    box.start()
    assert box.wait() == 0
    done = source.migrate("moved", target.destination)
    assert done.name == "moved"
    with target.engine() as there:
        info = there.get("moved").info()
        assert info.id == done.id
        assert info.state == "exited"
        assert [record.data for record in there.get("moved").logs()] == [b"said\n"]
        assert there._context.images.get("busybox").id == source.images.get("busybox").id
    seen = json.loads(target.hutch("-o", "json", "inspect", "moved"))[0]
    assert "A=b" in seen["Config"]["Env"]
    assert seen["Config"]["Labels"]["k"] == "v"
    target.hutch("commit", "moved", "committed")
    shown = target.hutch("run", "--rm", "committed", "sh", "-c", STATE).splitlines()
    assert shown[0] == "4711 7 8 2"
    assert shown[1] == "one"
    assert "No such file" in shown[2]
    assert shown[3:5] == ["only", "fifo"]
    assert shown[5] == str((100 << 20) + 4)
    assert int(shown[6]) < 1024
    assert shown[7] == "end"
    target.hutch("start", "moved")
    target.hutch("wait", "moved")
    target.hutch("rm", "moved")
    target.hutch("rmi", "committed")


def test_a_second_instance_brings_no_layer_twice(source: Engine, target: Other) -> None:
    sent = []
    for name in ("first", "second"):
        source.create("busybox", ["true"], name=name)
        sent.append(source.migrate(name, target.destination).sent)
        target.hutch("rm", name)
    layers = source.images.get("busybox").compressed_size
    assert sent[1] < layers


def test_named_volumes_come_along_when_asked_and_anonymous_ones_always(
    source: Engine, target: Other
) -> None:
    fill = "echo kept > /data/file; chown 5:6 /data/file; chmod 1770 /data; echo mine > /own/file"
    box = source.create(
        "busybox", ["sh", "-c", fill], name="moved", volumes=["moving:/data", "/own"]
    )
    box.start()
    assert box.wait() == 0
    with pytest.raises(WrongState, match="volume moving is not at the target"):
        source.migrate("moved", target.destination)
    source.migrate("moved", target.destination, with_volumes=True)
    try:
        script = "cat /data/file /own/file; stat -c '%u %g' /data/file; stat -c %a /data"
        run = ("run", "--rm", "--volumes-from", "moved", "busybox", "sh", "-c", script)
        assert target.hutch(*run).splitlines() == ["kept", "mine", "5 6", "1770"]
        assert [volume.name for volume in source.volumes.list()] == ["moving"]
    finally:
        target.hutch("rm", "-v", "moved")
        target.hutch("volume", "rm", "moving")
        source.volumes.remove("moving")


def test_every_obstacle_is_named_at_once(source: Engine, target: Other, tmp_path: object) -> None:
    host = f"{tmp_path}/only-here"
    os.mkdir(host)
    source.networks.create("only-here")
    source.networks.create("elsewhere", subnets=["10.211.7.0/24"])
    target.hutch("network", "create", "--subnet", "10.211.8.0/24", "elsewhere")
    box = source.create(
        "busybox",
        ["true"],
        name="held",
        volumes=["absent:/a", f"{host}:/b"],
        network=["only-here", "name=elsewhere,ip=10.211.7.9"],
    )
    source.create("busybox", ["true"], name="other")
    source.migrate("other", target.destination)
    os.rmdir(host)
    target.hutch("rename", "other", "held")
    try:
        with pytest.raises(WrongState) as caught:
            source.migrate("held", target.destination)
        for part in (
            "name 'held' is taken",
            "volume absent is not at the target",
            f"directory {host} of the host",
            "network only-here is not at the target",
            "address 10.211.7.9 is not one of network elsewhere",
        ):
            assert part in caught.value.message
        assert box.info().state == "created"
    finally:
        target.hutch("rm", "held")
        box.remove()
        source.volumes.remove("absent")
        source.networks.remove("only-here")
        source.networks.remove("elsewhere")
        target.hutch("network", "rm", "elsewhere")


@pytest.mark.parametrize(
    ("destination", "error", "told"),
    [
        ("nowhere", InvalidArgument, "expected another hutch"),
        ("ssh://u:secret@host", InvalidArgument, "expected another hutch"),
        ("exec:", InvalidArgument, "no command"),
        ("unix:///nowhere/sock", Unavailable, "no such file"),
        ("exec:true", Unavailable, "is no hutch"),
        ("exec:echo hello, world", Unavailable, "does not speak"),
        ("exec:/nowhere/hutch", Unsupported, "program not found"),
    ],
)
def test_a_bad_destination_is_told_and_changes_nothing(
    source: Engine, destination: str, error: type[Exception], told: str
) -> None:
    box = source.create("busybox", ["true"])
    with pytest.raises(error, match=told):
        source.migrate(box.id, destination)
    assert box.info().state == "created"
    box.remove()


def test_a_command_that_waits_for_us_to_speak_is_given_up(
    source: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "_GREETING_S", 0.1)
    box = source.create("busybox", ["true"])
    with pytest.raises(OperationTimeout, match="nothing came"):
        source.migrate(box.id, "exec:cat")
    assert box.info().state == "created"
    box.remove()


def test_a_running_container_is_refused_naming_criu(source: Engine, target: Other) -> None:
    with (
        source.start("busybox", ["sleep", "1000"], init=True) as box,
        pytest.raises(Unsupported, match="CRIU"),
    ):
        source.migrate(box.id, target.destination)


def test_bandwidth_bounds_what_is_sent(source: Engine, target: Other) -> None:
    from hutch.migration.wire import Wire

    slept: list[float] = []
    reading, writing = os.pipe()
    try:
        wire = Wire(
            reading,
            writing,
            peer="test",
            timeout_s=5,
            bandwidth=1000,
            clock=lambda: 0.0,
            sleep=slept.append,
        )
        wire.send_stream([b"x" * 500, b"x" * 500, b"x"])
    finally:
        os.close(reading)
        os.close(writing)
    assert slept == [0.5, 1.0]


def test_the_command_line_shows_progress_and_json(source: Engine, target: Other) -> None:
    events: list[ProgressEvent] = []
    source.create("busybox", ["true"], name="moved")
    source.migrate("moved", target.destination, progress=events.append)
    assert next(e.phase for e in events if e.item == "moved") == "checking"
    assert events[-1].phase == "done"
    target.hutch("rm", "moved")
    source.create("busybox", ["true"], name="moved")
    here = [sys.executable, "-m", "hutch", "--root", str(source.root)]
    done = subprocess.run(
        [*here, "-o", "json", "migrate", "moved", target.destination],
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout)
    assert told["Name"] == "moved"
    assert told["Sent"] > 0
    target.hutch("rm", told["Id"])
