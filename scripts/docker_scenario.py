"""What is asked of both daemons: one scenario through all of Docker's API on one host."""

from __future__ import annotations

import hashlib
import io
import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from scripts.docker_answers import Side
from scripts.docker_builds import dockerfiles
from scripts.docker_tars import tar_of

__all__ = ["image_archive", "scenario"]

IMAGE = "compare:one"
_CREATED = "2024-01-02T03:04:05Z"
_RICH: dict[str, Any] = {
    "Image": IMAGE,
    "Hostname": "rich",
    "Domainname": "example.org",
    "User": "1000:1000",
    "Env": ["A=1", "EMPTY="],
    "Cmd": ["sh", "-c", "sleep 300"],
    "WorkingDir": "/tmp",
    "Labels": {"of": "compare", "empty": ""},
    "StopSignal": "SIGKILL",
    "StopTimeout": 7,
    "ExposedPorts": {"81/udp": {}},
    "Volumes": {"/anonymous": {}},
    "Healthcheck": {"Test": ["CMD-SHELL", "true"], "Interval": 10**11, "Retries": 2},
    "HostConfig": {
        "Memory": 64 << 20,
        "MemoryReservation": 32 << 20,
        "NanoCpus": 500_000_000,
        "CpuShares": 512,
        "PidsLimit": 100,
        "OomScoreAdj": 100,
        "Binds": ["compare-data:/data:ro", "/etc:/host-etc:ro"],
        "Mounts": [{"Type": "tmpfs", "Target": "/scratch", "TmpfsOptions": {"SizeBytes": 1 << 20}}],
        "Tmpfs": {"/other": "size=64k"},
        "CapAdd": ["NET_ADMIN"],
        "CapDrop": ["MKNOD"],
        "Dns": ["9.9.9.9"],
        "DnsSearch": ["example.org"],
        "ExtraHosts": ["there:10.1.2.3"],
        "GroupAdd": ["44"],
        "Ulimits": [{"Name": "nofile", "Soft": 500, "Hard": 600}],
        "Sysctls": {"net.ipv4.ip_forward": "1"},
        "ReadonlyRootfs": True,
        "ShmSize": 8 << 20,
        "Init": True,
        "RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 3},
        "PortBindings": {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "18080"}]},
        "SecurityOpt": ["no-new-privileges"],
        "LogConfig": {"Type": "json-file", "Config": {"max-size": "1m", "max-file": "2"}},
    },
}


def image_archive(directory: Path) -> bytes:
    """Return an image as `docker save` writes it, the same for both: busybox."""
    from hutch.image.busybox import busybox_program, write_busybox_tar

    layer = io.BytesIO()
    write_busybox_tar(layer, busybox_program(directory), mtime=0)
    data = layer.getvalue()
    config = {
        "architecture": "amd64",
        "os": "linux",
        "created": _CREATED,
        "author": "compare",
        "config": {
            "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "Cmd": ["sh"],
            "Labels": {"image": "label"},
            "ExposedPorts": {"8000/tcp": {}},
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(data).hexdigest()}"]},
        "history": [{"created": _CREATED, "created_by": "ADD busybox"}],
    }
    encoded = json.dumps(config).encode()
    name = f"{hashlib.sha256(encoded).hexdigest()}.json"
    manifest = [{"Config": name, "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]
    return tar_of(
        {name: encoded, "layer.tar": data, "manifest.json": json.dumps(manifest).encode()}
    )


def scenario(side: Side, archive: bytes) -> None:
    """Ask one daemon everything."""
    began = int(time.time())
    _system(side)
    _images(side, archive)
    for part in (_networks, _volumes, _rich, _errors, _life, _streams, _execs, _files, _lists):
        part(side)
    _commands(side)
    _builds(side)
    _events(side, began)
    dockerfiles(side, IMAGE)  # last: dockerd remembers 256 events


def _filters(**filters: list[str]) -> str:
    return "filters=" + quote(json.dumps(filters))


# ---- server, images -----------------------------------------------------------------------


def _system(side: Side) -> None:
    side.ask("ping", "GET", "/_ping")
    side.ask("version", "GET", "/version")
    side.ask("info", "GET", "/info")
    side.ask("df empty", "GET", "/system/df")
    for path in ("/swarm", "/nodes", "/services", "/tasks", "/secrets", "/configs", "/plugins"):
        side.ask(f"list {path}", "GET", path)
    side.ask("auth without a name", "POST", "/auth", {"serveraddress": "127.0.0.1:1"})
    side.ask("no such page", "GET", "/nonsense")
    side.ask("no such method", "PUT", "/containers/json")


def _images(side: Side, archive: bytes) -> None:
    side.ask("load", "POST", "/images/load?quiet=1", archive)
    side.ask("load nothing", "POST", "/images/load", b"nothing")
    side.ask("images", "GET", "/images/json")
    for number, chosen in enumerate(
        (
            {"reference": ["compare"]},
            {"reference": ["other"]},
            {"label": ["image=label"]},
            {"dangling": ["true"]},
            {"nonsense": ["1"]},
            {"before": ["none"]},
        )
    ):
        side.ask(f"images filtered {number}", "GET", f"/images/json?{_filters(**chosen)}")
    side.ask("image inspected", "GET", f"/images/{IMAGE}/json")
    side.ask("image history", "GET", f"/images/{IMAGE}/history")
    side.ask("image tagged", "POST", f"/images/{IMAGE}/tag?repo=compare&tag=two")
    side.ask("image tagged wrongly", "POST", f"/images/{IMAGE}/tag?repo=BAD&tag=two")
    side.ask("image tagged without", "POST", f"/images/{IMAGE}/tag")
    side.ask("none tagged", "POST", "/images/nonesuch/tag?repo=compare")
    side.ask("image untagged", "DELETE", "/images/compare:two")
    for path in ("/images/nonesuch/json", "/images/nonesuch/history", "/images/BAD/json"):
        side.ask(f"none {path}", "GET", path)
    side.ask("none removed", "DELETE", "/images/nonesuch")
    side.ask("none saved", "GET", "/images/nonesuch/get")
    side.ask("none pushed", "POST", "/images/nonesuch/push", None, {"X-Registry-Auth": "e30="})
    side.ask("images pruned", "POST", "/images/prune")
    side.ask("search without a term", "GET", "/images/search")


# ---- networks and volumes -----------------------------------------------------------------


def _networks(side: Side) -> None:
    body = {
        "Name": "compare-net",
        "Labels": {"of": "compare"},
        "Internal": True,
        "Attachable": True,
        "IPAM": {
            "Driver": "default",
            "Config": [
                {
                    "Subnet": "10.77.0.0/24",
                    "Gateway": "10.77.0.1",
                    "IPRange": "10.77.0.128/25",
                    "AuxiliaryAddresses": {"router": "10.77.0.9"},
                }
            ],
        },
        "Options": {
            "com.docker.network.bridge.name": "cmp0",
            "com.docker.network.bridge.host_binding_ipv4": "127.0.0.1",
        },
    }
    side.ask("network made", "POST", "/networks/create", body)
    side.ask("network made twice", "POST", "/networks/create", body | {"CheckDuplicate": True})
    side.ask("network made without a name", "POST", "/networks/create", {})
    side.ask("network of no driver", "POST", "/networks/create", {"Name": "x", "Driver": "none5"})
    wrong = {"Name": "y", "IPAM": {"Config": [{"Subnet": "nonsense"}]}}
    side.ask("network of no subnet", "POST", "/networks/create", wrong)
    side.ask("network inspected", "GET", "/networks/compare-net")
    side.ask("network verbose", "GET", "/networks/compare-net?verbose=1")
    for name in ("bridge", "host", "none"):
        side.ask(f"network {name}", "GET", f"/networks/{name}")
    for number, chosen in enumerate(
        (
            {"name": ["compare"]},
            {"driver": ["host"]},
            {"label": ["of=compare"]},
            {"type": ["custom"]},
            {"scope": ["swarm"]},
            {"dangling": ["true"]},
            {"nonsense": ["1"]},
            {"type": ["nonsense"]},
        )
    ):
        side.ask(f"networks filtered {number}", "GET", f"/networks?{_filters(**chosen)}")
    side.ask("none inspected", "GET", "/networks/nonesuch")
    side.ask("none removed", "DELETE", "/networks/nonesuch")
    side.ask("bridge removed", "DELETE", "/networks/bridge")
    side.ask("none joined", "POST", "/networks/nonesuch/connect", {"Container": "nonesuch"})
    side.ask("joined by none", "POST", "/networks/compare-net/connect", {"Container": "nonesuch"})
    side.ask("left by none", "POST", "/networks/compare-net/disconnect", {"Container": "nonesuch"})


def _volumes(side: Side) -> None:
    body = {"Name": "compare-data", "Labels": {"of": "compare"}}
    side.ask("volume made", "POST", "/volumes/create", body)
    side.ask("volume made twice", "POST", "/volumes/create", body)
    side.ask("volume without a name", "POST", "/volumes/create", {"Labels": {"nameless": "1"}})
    side.ask("volume of no driver", "POST", "/volumes/create", {"Name": "v", "Driver": "none5"})
    side.ask("volume of no name", "POST", "/volumes/create", {"Name": "a/b"})
    side.ask(
        "volume of no option", "POST", "/volumes/create", {"Name": "w", "DriverOpts": {"x": "y"}}
    )
    side.ask("volume inspected", "GET", "/volumes/compare-data")
    for number, chosen in enumerate(
        (
            {"name": ["compare"]},
            {"driver": ["local"]},
            {"label": ["of=compare"]},
            {"dangling": ["false"]},
            {"nonsense": ["1"]},
        )
    ):
        side.ask(f"volumes filtered {number}", "GET", f"/volumes?{_filters(**chosen)}")
    side.ask("no volume", "GET", "/volumes/nonesuch")
    side.ask("no volume removed", "DELETE", "/volumes/nonesuch")
    side.ask("no volume removed by force", "DELETE", "/volumes/nonesuch?force=1")
    side.ask("", "POST", f"/volumes/prune?{_filters(label=['nameless'])}")


# ---- containers ---------------------------------------------------------------------------


def _make(side: Side, name: str, *command: str, **more: Any) -> None:
    body = {"Image": IMAGE, "Cmd": list(command), **more}
    side.ask("", "POST", f"/containers/create?name={name}", body)


def _rich(side: Side) -> None:
    side.ask("rich made", "POST", "/containers/create?name=rich", _RICH)
    side.ask("rich inspected, made", "GET", "/containers/rich/json")
    side.ask("rich started", "POST", "/containers/rich/start")
    side.ask("rich started twice", "POST", "/containers/rich/start")
    side.ask("rich inspected, running", "GET", "/containers/rich/json?size=1")
    side.ask("rich in the list", "GET", "/containers/json")
    side.ask("rich top", "GET", "/containers/rich/top?ps_args=-o+pid,user,args")
    side.ask("rich top without PID", "GET", "/containers/rich/top?ps_args=-o+user,args")
    side.ask("rich stats", "GET", "/containers/rich/stats?stream=0&one-shot=1")
    side.ask("volume in use removed", "DELETE", "/volumes/compare-data")
    side.ask("image in use removed", "DELETE", f"/images/{IMAGE}")
    side.ask("running removed", "DELETE", "/containers/rich")
    update = {"Memory": 128 << 20, "MemorySwap": -1, "RestartPolicy": {"Name": "no"}}
    side.ask("rich updated", "POST", "/containers/rich/update", update)
    side.ask("rich inspected, updated", "GET", "/containers/rich/json")
    joining = {
        "Container": "rich",
        "EndpointConfig": {"Aliases": ["again"], "IPAMConfig": {"IPv4Address": "10.77.0.200"}},
    }
    side.ask("network joined", "POST", "/networks/compare-net/connect", joining)
    side.ask("network joined twice", "POST", "/networks/compare-net/connect", joining)
    side.ask("network with one", "GET", "/networks/compare-net")
    side.ask("network in use removed", "DELETE", "/networks/compare-net")
    side.ask("rich inspected, joined", "GET", "/containers/rich/json")
    side.ask("network left", "POST", "/networks/compare-net/disconnect", {"Container": "rich"})
    side.ask(
        "network left twice", "POST", "/networks/compare-net/disconnect", {"Container": "rich"}
    )
    side.ask("rich renamed", "POST", "/containers/rich/rename?name=richer")
    side.ask("rich stopped", "POST", "/containers/richer/stop")
    side.ask("rich stopped twice", "POST", "/containers/richer/stop")
    side.ask("rich inspected, stopped", "GET", "/containers/richer/json")
    side.ask("rich removed", "DELETE", "/containers/richer?v=1")
    side.ask("network removed", "DELETE", "/networks/compare-net")
    side.ask("volume removed", "DELETE", "/volumes/compare-data")


def _errors(side: Side) -> None:
    refused: dict[str, Any] = {
        "nothing": {},
        "no image": {"Image": "nonesuch"},
        "a bad image": {"Image": "BAD:name:x"},
        "too little memory": {"Image": IMAGE, "HostConfig": {"Memory": 1000}},
        "swap below memory": {"Image": IMAGE, "HostConfig": {"Memory": 9 << 20, "MemorySwap": 1}},
        "too many processors": {"Image": IMAGE, "HostConfig": {"NanoCpus": 10**15}},
        "a bad bind": {"Image": IMAGE, "HostConfig": {"Binds": ["a:b:c:d"]}},
        "a relative target": {"Image": IMAGE, "HostConfig": {"Binds": ["/etc:there"]}},
        "a target twice": {"Image": IMAGE, "HostConfig": {"Binds": ["/etc:/a", "/usr:/a"]}},
        "a bad port": {"Image": IMAGE, "HostConfig": {"PortBindings": {"x/tcp": [{}]}}},
        "a bad host port": {
            "Image": IMAGE,
            "HostConfig": {"PortBindings": {"80/tcp": [{"HostPort": "x"}]}},
        },
        "a bad policy": {"Image": IMAGE, "HostConfig": {"RestartPolicy": {"Name": "often"}}},
        "a bad runtime": {"Image": IMAGE, "HostConfig": {"Runtime": "nonesuch"}},
        "a bad capability": {"Image": IMAGE, "HostConfig": {"CapAdd": ["NONESUCH"]}},
        "a bad log driver": {"Image": IMAGE, "HostConfig": {"LogConfig": {"Type": "nonesuch"}}},
        "a bad signal": {"Image": IMAGE, "StopSignal": "NONESUCH"},
        "a bad mount": {
            "Image": IMAGE,
            "HostConfig": {"Mounts": [{"Type": "odd", "Target": "/a"}]},
        },
        "an absent source": {
            "Image": IMAGE,
            "HostConfig": {"Mounts": [{"Type": "bind", "Source": "/nonesuch", "Target": "/a"}]},
        },
        "a relative directory": {"Image": IMAGE, "WorkingDir": "there"},
        "remove and restart": {
            "Image": IMAGE,
            "HostConfig": {"AutoRemove": True, "RestartPolicy": {"Name": "always"}},
        },
        "a short interval": {"Image": IMAGE, "Healthcheck": {"Test": ["CMD", "x"], "Interval": 1}},
        "a bad environment": {"Image": IMAGE, "Env": ["=x"]},
        "nothing to run": {"Image": IMAGE, "Entrypoint": [""], "Cmd": []},
        "a wrong type": {"Image": 5},
    }
    for name, body in refused.items():
        side.ask(f"refused: {name}", "POST", "/containers/create?name=refused", body)
        side.ask("", "DELETE", "/containers/refused?force=1")
    side.ask(
        "refused: no JSON", "POST", "/containers/create", b"{", {"Content-Type": "application/json"}
    )
    side.ask("refused: a bad name", "POST", "/containers/create?name=-a/b", {"Image": IMAGE})
    _make(side, "taken", "true")
    side.ask("refused: a taken name", "POST", "/containers/create?name=taken", {"Image": IMAGE})
    side.ask("", "DELETE", "/containers/taken")
    for method, path in (
        *(("GET", f"/containers/nonesuch/{what}") for what in ("json", "logs?stdout=1", "top")),
        *(("GET", f"/containers/nonesuch/{what}") for what in ("stats", "changes", "export")),
        *(("POST", f"/containers/nonesuch/{what}") for what in ("start", "stop", "kill", "wait")),
        *(("POST", f"/containers/nonesuch/{what}") for what in ("pause", "unpause", "restart")),
        *(("POST", f"/containers/nonesuch/{what}") for what in ("rename?name=x", "attach")),
        ("DELETE", "/containers/nonesuch"),
        ("GET", "/containers/nonesuch/archive?path=/"),
        ("GET", "/exec/nonesuch/json"),
        ("POST", "/exec/nonesuch/resize?h=1&w=1"),
        ("POST", "/commit?container=nonesuch"),
    ):
        side.ask(f"none: {method} {path}", method, path)
    side.ask("none: exec", "POST", "/containers/nonesuch/exec", {"Cmd": ["true"]})
    side.ask("none: exec started", "POST", "/exec/nonesuch/start", {})
    side.ask("none: updated", "POST", "/containers/nonesuch/update", {})


def _wait_for(side: Side, name: str, word: str, *, times: int) -> None:
    """Return when a container has written a word so often."""
    deadline = time.monotonic() + 60
    while str(side.ask("", "GET", f"/containers/{name}/logs?stdout=1")).count(word) < times:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name} has not written {word!r} {times} times")
        time.sleep(0.05)


def _life(side: Side) -> None:
    _make(side, "life", "sh", "-c", "trap 'exit 3' TERM; echo caught; while :; do sleep 0.1; done")
    for what in ("stop", "kill", "pause", "unpause", "resize?h=1&w=1", "top"):
        method = "GET" if what == "top" else "POST"
        side.ask(f"made: {what}", method, f"/containers/life/{what}")
    side.ask("made: stats", "GET", "/containers/life/stats?stream=0")
    side.ask("made: exec", "POST", "/containers/life/exec", {"Cmd": ["true"]})
    side.ask("started", "POST", "/containers/life/start")
    side.ask("paused", "POST", "/containers/life/pause")
    side.ask("paused twice", "POST", "/containers/life/pause")
    side.ask("paused: inspected", "GET", "/containers/life/json")
    side.ask("paused: exec", "POST", "/containers/life/exec", {"Cmd": ["true"]})
    side.ask("paused: removed", "DELETE", "/containers/life")
    side.ask("unpaused", "POST", "/containers/life/unpause")
    side.ask("unpaused twice", "POST", "/containers/life/unpause")
    side.ask("a bad signal", "POST", "/containers/life/kill?signal=NONESUCH")
    side.ask("restarted", "POST", "/containers/life/restart?t=5")
    _wait_for(side, "life", "caught", times=2)  # the first process ignores what it has no trap for
    side.ask("killed", "POST", "/containers/life/kill?signal=TERM")
    side.ask("waited", "POST", "/containers/life/wait")
    side.ask("a bad condition", "POST", "/containers/life/wait?condition=nonsense")
    side.ask("life inspected", "GET", "/containers/life/json")
    side.ask("no new name", "POST", "/containers/life/rename")
    side.ask("life removed", "DELETE", "/containers/life")
    _make(side, "absent", "/nonesuch")
    side.ask("no program", "POST", "/containers/absent/start")
    side.ask("no program: inspected", "GET", "/containers/absent/json")
    side.ask("", "DELETE", "/containers/absent")
    _make(side, "denied", "/etc")
    side.ask("a directory run", "POST", "/containers/denied/start")
    side.ask("", "DELETE", "/containers/denied")
    _make(side, "nowhere", "true", WorkingDir="/etc/passwd")
    side.ask("a file as directory", "POST", "/containers/nowhere/start")
    side.ask("", "DELETE", "/containers/nowhere")
    _make(side, "nobody", "true", User="nonesuch")
    side.ask("no user", "POST", "/containers/nobody/start")
    side.ask("", "DELETE", "/containers/nobody")


def _streams(side: Side) -> None:
    _make(side, "streams", "sh", "-c", "echo one; sleep 0.3; echo two >&2; sleep 0.3; echo three")
    side.ask("", "POST", "/containers/streams/start")
    side.ask("streams waited", "POST", "/containers/streams/wait")
    for query in (
        "stdout=1&stderr=1",
        "stdout=1",
        "stderr=1&timestamps=1",
        "stdout=1&tail=1",
        "stdout=1&tail=0",
        "stdout=1&since=9999999999",
        "stdout=1&until=1",
        "stdout=1&follow=1",
        "",
        "stdout=1&since=nonsense",
        "stdout=1&tail=nonsense",
    ):
        side.ask(f"logs {query}", "GET", f"/containers/streams/logs?{query}")
    side.ask("attached with logs", "POST", "/containers/streams/attach?logs=1&stdout=1&stderr=1")
    side.ask("attached badly", "POST", "/containers/streams/attach?detachKeys=nonsense-x")
    side.ask("", "DELETE", "/containers/streams")
    _make(side, "terminal", "sh", "-c", "echo one; tty", Tty=True)
    side.ask("", "POST", "/containers/terminal/start")
    side.ask("terminal waited", "POST", "/containers/terminal/wait")
    side.ask("terminal logs", "GET", "/containers/terminal/logs?stdout=1")
    side.ask("", "DELETE", "/containers/terminal")


def _execs(side: Side) -> None:
    _make(side, "execs", "sleep", "300", HostConfig={"NetworkMode": "none"})
    side.ask("", "POST", "/containers/execs/start")
    where = "/containers/execs/exec"
    both = {"AttachStdout": True, "AttachStderr": True}
    for name, body in {
        "plain": {**both, "Cmd": ["sh", "-c", "echo out; echo err >&2; exit 4"]},
        "rich": {
            **both,
            "Cmd": ["sh", "-c", "id -u; pwd; echo $A"],
            "User": "1000",
            "WorkingDir": "/tmp",
            "Env": ["A=b"],
            "Privileged": True,
        },
        "terminal": {**both, "Tty": True, "Cmd": ["echo", "hello"]},
        "absent": {**both, "Cmd": ["/nonesuch"]},
        "nobody": {**both, "Cmd": ["true"], "User": "nonesuch"},
    }.items():
        made = side.ask(f"exec {name}", "POST", where, body).get("Id", "")
        side.ask(f"exec {name} before", "GET", f"/exec/{made}/json")
        side.ask(f"exec {name} started", "POST", f"/exec/{made}/start", {"Tty": body.get("Tty")})
        side.ask(f"exec {name} after", "GET", f"/exec/{made}/json")
        side.ask(f"exec {name} again", "POST", f"/exec/{made}/start", {})
        side.ask(f"exec {name} resized", "POST", f"/exec/{made}/resize?h=1&w=1")
    side.ask("exec of nothing", "POST", where, {"Cmd": []})
    made = side.ask("", "POST", where, {"Cmd": ["sleep", "300"]})["Id"]
    side.ask("exec detached", "POST", f"/exec/{made}/start", {"Detach": True})
    side.ask("exec detached, running", "GET", f"/exec/{made}/json")
    side.ask("execs of a container", "GET", "/containers/execs/json")
    side.ask("", "DELETE", "/containers/execs?force=1")


def _files(side: Side) -> None:
    script = "echo new > /tmp/new; rm /etc/group; echo more >> /etc/passwd; mkdir /made"
    _make(side, "files", "sh", "-c", script)
    side.ask("", "POST", "/containers/files/start")
    side.ask("", "POST", "/containers/files/wait")
    side.ask("changes", "GET", "/containers/files/changes")
    archive = tar_of({"in": b"content", "deep/in": b"more"})
    put = "/containers/files/archive?path="
    side.ask("archive put", "PUT", f"{put}/made", archive)
    side.ask("archive put nowhere", "PUT", f"{put}/nonesuch", archive)
    side.ask("archive put on a file", "PUT", f"{put}/etc/passwd", archive)
    side.ask("archive put without a path", "PUT", "/containers/files/archive", archive)
    side.ask("no archive put", "PUT", f"{put}/made", b"nonsense" * 200)
    for path in ("/made", "/made/", "/made/.", "/made/in", "/nonesuch", "", "/made/in/"):
        side.ask(f"archive got {path}", "GET", f"/containers/files/archive?path={path}")
        side.ask(f"archive told {path}", "HEAD", f"/containers/files/archive?path={path}")
    side.ask("changes later", "GET", "/containers/files/changes")
    query = urlencode(
        {
            "container": "files",
            "repo": "compare",
            "tag": "committed",
            "comment": "what for",
            "author": "who",
        }
    )
    changes = "".join(f"&changes={quote(c)}" for c in ('CMD ["true"]', "ENV B=2", "LABEL c=d"))
    side.ask("committed", "POST", f"/commit?{query}{changes}")
    side.ask("committed badly", "POST", "/commit?container=files&changes=NONSENSE")
    side.ask("committed: inspected", "GET", "/images/compare:committed/json")
    side.ask("committed: history", "GET", "/images/compare:committed/history")
    side.ask("", "DELETE", "/containers/files")
    side.ask("committed: removed", "DELETE", "/images/compare:committed")


def _lists(side: Side) -> None:
    for number in range(3):
        _make(side, f"list{number}", "true", Labels={"n": str(number)})
    _make(side, "list-run", "sleep", "300", HostConfig={"NetworkMode": "none"})
    side.ask("", "POST", "/containers/list-run/start")
    side.ask("", "POST", "/containers/list0/start")
    side.ask("", "POST", "/containers/list0/wait")
    for number, (query, chosen) in enumerate(
        (
            ("", {}),
            ("all=1", {}),
            ("limit=2", {}),
            ("all=1&size=1", {"name": ["list0"]}),
            ("all=1", {"name": ["^/list1$"]}),
            ("all=1", {"label": ["n=1", "n"]}),
            ("all=1", {"status": ["exited", "running"]}),
            ("", {"status": ["created"]}),
            ("all=1", {"exited": ["0"]}),
            ("all=1", {"ancestor": [IMAGE]}),
            ("all=1", {"ancestor": ["nonesuch"]}),
            ("all=1", {"before": ["list1"]}),
            ("all=1", {"since": ["list1"]}),
            ("all=1", {"network": ["none"]}),
            ("all=1", {"expose": ["8000"]}),
            ("all=1", {"health": ["none"]}),
            ("all=1", {"volume": ["nonesuch"]}),
            ("all=1", {"status": ["nonsense"]}),
            ("all=1", {"exited": ["x"]}),
            ("all=1", {"health": ["x"]}),
            ("all=1", {"nonsense": ["x"]}),
            ("all=1", {"before": ["nonesuch"]}),
            ("limit=x", {}),
            ("all=1&filters=nonsense", {}),
        )
    ):
        more = f"&{_filters(**chosen)}" if chosen else ""
        side.ask(f"list {number}", "GET", f"/containers/json?{query}{more}")
    side.ask("df", "GET", "/system/df")
    side.ask("pruned", "POST", f"/containers/prune?{_filters(label=['n'])}")
    side.ask("pruned again", "POST", f"/containers/prune?{_filters(label=['n'])}")
    side.ask("pruned badly", "POST", f"/containers/prune?{_filters(nonsense=['n'])}")
    side.ask("volumes pruned badly", "POST", f"/volumes/prune?{_filters(nonsense=['n'])}")
    side.ask("networks pruned", "POST", "/networks/prune")
    side.ask("", "DELETE", "/containers/list-run?force=1")


# ---- the command line, builds, events -----------------------------------------------------


def _commands(side: Side) -> None:
    side.run("run", "run", "--rm", IMAGE, "echo", "hello")
    side.run("run, exit code", "run", "--rm", IMAGE, "sh", "-c", "exit 7")
    side.run("run, input", "run", "--rm", "-i", IMAGE, "cat", input=b"input\n")
    side.run("run, no program", "run", "--rm", IMAGE, "nonesuch")
    side.run("run, two streams", "run", "--rm", IMAGE, "sh", "-c", "echo a; echo b >&2")
    side.run("run, limits", "run", "--rm", "-m", "64m", "--cpus", "0.5", IMAGE, "true")
    side.run(
        "run detached", "run", "-d", "--name", "cli", "--network", "none", IMAGE, "sleep", "99"
    )
    table = ("--format", "{{.Names}} {{.Image}} {{.Command}} {{.State}} {{.Ports}} {{.Mounts}}")
    side.run("ps", "ps", *table)
    side.run("exec", "exec", "cli", "sh", "-c", "echo in; exit 5")
    side.run("exec, input", "exec", "-i", "cli", "cat", input=b"input\n")
    side.run("top", "top", "cli", "-o", "pid,args")
    side.run("port", "port", "cli")
    side.run("diff", "diff", "cli")
    side.run("inspect", "inspect", "-f", "{{.State.Status}} {{.HostConfig.NetworkMode}}", "cli")
    side.run("inspect none", "inspect", "nonesuch")
    side.run("rm, running", "rm", "cli")
    side.run("stop", "stop", "-t", "0", "cli")
    side.run("ps, all", "ps", "-a", *table)
    side.run("start", "start", "cli")
    side.run("rm", "rm", "-f", "cli")
    side.run("rm none", "rm", "nonesuch")
    side.run("images", "images", "--format", "{{.Repository}} {{.Tag}} {{.ID}}")
    side.run("history", "history", "--format", "{{.CreatedBy}} {{.Size}}", IMAGE)
    side.run("rmi none", "rmi", "nonesuch")


def _builds(side: Side) -> None:
    lines = (f"FROM {IMAGE}", "RUN echo built > /built", "ENV A=b", "LABEL c=d", 'CMD ["true"]')
    context = tar_of({"Dockerfile": "\n".join(lines).encode(), "file": b"content"})
    kind = {"Content-Type": "application/x-tar"}
    side.ask("built", "POST", "/build?t=compare:built", context, kind)
    side.ask("built: inspected", "GET", "/images/compare:built/json")
    side.ask("built: history", "GET", "/images/compare:built/history")
    side.ask("built quietly", "POST", "/build?q=1", context, kind)
    for name, text in {
        "nothing": "",
        "no such instruction": f"FROM {IMAGE}\nNONSENSE x",
        "no stage": "RUN true",
        "a failing step": f"FROM {IMAGE}\nRUN exit 3",
        "an absent file": f"FROM {IMAGE}\nCOPY nonesuch /",
    }.items():
        context = tar_of({"Dockerfile": text.encode()})
        side.ask(f"build of {name}", "POST", "/build", context, kind)
    side.ask("build without a Dockerfile", "POST", "/build", tar_of({"x": b""}), kind)
    side.ask("build, bad arguments", "POST", "/build?buildargs=x", context, kind)
    side.ask("built: removed", "DELETE", "/images/compare:built?force=1")
    side.ask("build cache pruned", "POST", "/build/prune")


def _events(side: Side, began: int) -> None:
    _make(side, "eventful", "true", Labels={"seen": "yes"}, HostConfig={"NetworkMode": "none"})
    side.ask("", "POST", "/containers/eventful/start")
    side.ask("", "POST", "/containers/eventful/wait")
    side.ask("", "DELETE", "/containers/eventful")
    now = int(time.time()) + 1
    when = f"since={began}&until={now}"
    only = _filters(container=["eventful"], event=["create", "start", "die", "destroy"])
    side.ask("events of a container", "GET", f"/events?{when}&{only}")
    for kind in ("network", "volume", "image"):
        told = side.ask("", "GET", f"/events?{when}&{_filters(type=[kind])}") or []
        told = told if isinstance(told, list) else [told]
        side.steps[f"events of kind {kind}"] = {str(e["Action"]): "told" for e in told}
    told = side.ask("", "GET", f"/events?{when}&{_filters(type=['container'])}") or []
    side.steps["events of containers"] = {str(e["Action"]): "told" for e in told}
    side.ask("events, wrong order", "GET", f"/events?since={now}&until={began}")
    side.ask("events, bad filter", "GET", f"/events?until=1&{_filters(nonsense=['x'])}")
    side.ask("events, bad time", "GET", "/events?since=nonsense&until=1")
