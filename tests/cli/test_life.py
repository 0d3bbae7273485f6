"""Commands on existing instances, and what they print."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import wait_until
from tests.requires import requires

pytestmark = [requires("root", "overlayfs", "cgroup", "busybox"), pytest.mark.integration]

LOOP = "trap 'exit 0' TERM; echo out; echo err >&2; while :; do sleep 0.05; done"


def start(cli: Any, name: str, *options: str) -> str:
    args = ("run", "-d", "--network", "none", "--name", name, *options, "busybox")
    return str(cli.out(*args, "sh", "-c", LOOP)).strip()


def test_ps_lists_in_dockers_columns_and_formats(cli: Any, name: str) -> None:
    identifier = start(cli, name, "-l", "job=x y")
    header = cli.out("ps").splitlines()[0]
    assert header.split("   ")[0] == "CONTAINER ID"
    assert [word for word in header.split("  ") if word][-1].strip() == "NAMES"
    by_name = ("--filter", f"name={name}")
    assert cli.out("ps", "-q", *by_name).strip() == identifier[:12]
    assert cli.out("ps", "-q", "--no-trunc", *by_name).strip() == identifier
    assert cli.out("ps", *by_name, "--format", '{{.Names}}|{{.State}}|{{.Label "job"}}') == (
        f"{name}|running|x y\n"
    )
    table = cli.out("ps", *by_name, "--format", "table {{.Names}}\\t{{.ID}}").splitlines()
    assert [line.split() for line in table] == [
        ["NAMES", "CONTAINER", "ID"],
        [name, identifier[:12]],
    ]
    (row,) = json.loads(cli.out("-o", "json", "ps", *by_name))
    assert (row["ID"], row["Labels"]) == (identifier, "job=x y")
    assert cli.out("ps", "-o", "json", "--filter", "name=no-such-thing") == "[]\n"
    assert cli("ps", "--filter", "colour=red").returncode == 1


def test_stop_start_restart_kill_and_rm(cli: Any, name: str) -> None:
    start(cli, name)
    state = ("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", name)
    wait_until(lambda: "out" in cli.out("logs", name))
    assert cli.out("stop", "-t", "20", name) == f"{name}\n"
    assert cli.out(*state) == "exited 0\n"
    assert cli.out("wait", name) == "0\n"
    assert cli("exec", name, "true").returncode == 1
    assert cli.out("start", name) == f"{name}\n"
    assert cli.out("restart", "-t", "1", name) == f"{name}\n"
    assert cli.out("kill", "-s", "KILL", name) == f"{name}\n"
    wait_until(lambda: cli.out(*state) == "exited 137\n")
    assert cli("kill", name).returncode == 1
    assert cli.out("rm", name) == f"{name}\n"
    missing = cli("rm", name)
    assert (missing.returncode, missing.stderr.startswith(b"hutch: no such instance")) == (1, True)
    assert cli("rm", "-f", name).returncode == 0


def test_a_failure_among_several_is_told_and_the_rest_is_done(cli: Any, name: str) -> None:
    cli.out("create", "--name", name, "busybox", "true")
    done = cli("rm", "no-such-thing", name)
    assert (done.returncode, done.stdout) == (1, f"{name}\n".encode())


def test_pause_freezes_and_rm_of_a_running_one_needs_force(cli: Any, name: str) -> None:
    start(cli, name)
    cli.out("pause", name)
    assert "(Paused)" in cli.out("ps", "--filter", f"name={name}")
    cli.out("unpause", name)
    done = cli("rm", name)
    assert done.returncode == 1
    assert b"hint: " in done.stderr
    cli.out("rm", "-f", name)


def test_logs_are_split_tailed_stamped_and_followed(cli: Any, name: str) -> None:
    cli.out("run", "--network", "none", "--name", name, "busybox", "sh", "-c",
            "for i in 1 2 3; do echo $i; done; echo e >&2")  # fmt: skip
    done = cli("logs", name)
    assert (done.stdout, done.stderr) == (b"1\n2\n3\n", b"e\n")
    assert cli("logs", "-n", "2", name).stdout == b"3\n"
    stamped = cli("logs", "-t", name).stdout.decode().splitlines()
    assert [line.split(" ")[1] for line in stamped] == ["1", "2", "3"]
    assert stamped[0].split("T")[0].count("-") == 2
    assert cli("logs", "-f", "--since", "1h", name).stdout == b"1\n2\n3\n"
    assert cli("logs", "--until", "1h", name).stdout == b""
    lines = cli("logs", "-o", "json", name).stdout.splitlines()
    assert json.loads(lines[0])["log"] == "1\n"
    assert cli("logs", "--since", "yesterday", name).returncode == 1
    for line in stamped:  # no nanosecond is lost on the way
        moment = line.split(" ")[0]
        found = cli("logs", "-t", "--since", moment, "--until", moment, name).stdout.decode()
        expected = [one for one in stamped if one.startswith(moment)]
        assert found.splitlines() == expected


def test_follow_ends_with_the_instance(cli: Any, name: str) -> None:
    start(cli, name)
    follower = cli.spawn("logs", "-f", name)
    assert follower.stdout.readline() == b"out\n"
    cli.out("stop", "-t", "20", name)
    follower.communicate(timeout=60)
    assert follower.returncode == 0


def test_inspect_has_dockers_shape(cli: Any, name: str) -> None:
    options = ("-e", "A=1", "-m", "64m", "--tmpfs", "/t", "-w", "/tmp", "--restart", "on-failure:2")
    identifier = start(cli, name, *options)
    (shape,) = json.loads(cli.out("inspect", name))
    assert shape["Id"] == identifier
    assert shape["Name"] == f"/{name}"
    assert shape["State"]["Running"] is True
    assert shape["State"]["Pid"] > 0
    assert "A=1" in shape["Config"]["Env"]
    assert shape["Config"]["Image"] == "busybox"
    assert shape["HostConfig"]["Memory"] == 64 << 20
    assert shape["HostConfig"]["RestartPolicy"] == {"Name": "on-failure", "MaximumRetryCount": 2}
    assert shape["HostConfig"]["NetworkMode"] == "none"
    assert [mount["Destination"] for mount in shape["Mounts"]] == ["/t"]
    assert shape["Config"]["WorkingDir"] == "/tmp"
    assert json.loads(cli.out("inspect", "--type", "image", "busybox"))[0]["RepoTags"]
    both = cli("inspect", name, "no-such-thing")
    assert both.returncode == 1
    assert len(json.loads(both.stdout)) == 1


def test_update_rename_top_and_stats(cli: Any, name: str) -> None:
    start(cli, name, "-m", "64m")
    cli.out("update", "-m", "96m", "--restart", "always", name)
    memory = cli.out("inspect", "-f", "{{.HostConfig.Memory}}", name)
    assert memory == f"{96 << 20}\n"
    assert cli("update", name).returncode == 1
    cli.out("rename", name, f"{name}-new")
    titles, *rows = cli.out("top", f"{name}-new").splitlines()
    assert titles.split()[:2] == ["UID", "PID"]
    assert any("trap 'exit 0' TERM" in row for row in rows)
    policy = cli.out("inspect", "-f", "{{.HostConfig.RestartPolicy.Name}}", f"{name}-new")
    assert policy == "always\n"
    (row,) = json.loads(cli.out("stats", "-o", "json", f"{name}-new"))
    assert row["Name"] == f"{name}-new"
    assert "96MiB" in row["MemUsage"]


def test_files_are_copied_both_ways(cli: Any, name: str, tmp_path: Path) -> None:
    start(cli, name)
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/sub/f").write_text("content")
    cli.out("cp", str(tmp_path / "tree"), f"{name}:/tmp")
    assert cli.out("exec", name, "cat", "/tmp/tree/sub/f") == "content"
    cli.out("cp", f"{name}:/tmp/tree/sub/f", str(tmp_path / "back"))
    assert (tmp_path / "back").read_text() == "content"
    archive = cli("cp", f"{name}:/tmp/tree", "-").stdout
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        assert "tree/sub/f" in tar.getnames()
    cli.out("exec", name, "mkdir", "/into")
    cli.out("cp", "-", f"{name}:/into", input=archive)
    assert cli.out("exec", name, "cat", "/into/tree/sub/f") == "content"
    assert cli("cp", "a", "b").returncode == 1
    assert "A /into/tree/sub/f" in cli.out("diff", name).splitlines()
    cli.out("export", "-o", str(tmp_path / "x.tar"), name)
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert "into/tree/sub/f" in [member.removeprefix("./") for member in tar.getnames()]


def test_commit_save_load_tag_history_and_rmi(cli: Any, name: str, tmp_path: Path) -> None:
    start(cli, name)
    cli.out("exec", name, "touch", "/made")
    image = f"{name}:1"
    made = cli.out("commit", "-m", "why", "-c", 'CMD ["ls", "/made"]', name, image).strip()
    assert made.startswith("sha256:")
    assert cli.out("run", "--rm", "--network", "none", image) == "/made\n"
    assert cli.out("images", "-q", "--no-trunc", name).strip() == made
    assert "why" in cli.out("history", image)
    cli.out("tag", image, f"{name}:2")
    archive = tmp_path / "image.tar"
    cli.out("save", "-o", str(archive), image)
    assert f"Deleted: {made}" in cli.out("rmi", image, f"{name}:2")
    assert cli.out("load", "-i", str(archive)) == f"Loaded image: {image}\n"
    assert [p.name for p in tmp_path.iterdir()] == ["image.tar"]
    cli.out("rmi", image)


def test_volumes_and_networks(cli: Any, name: str) -> None:
    assert cli.out("volume", "create", "--label", "a=b", name) == f"{name}\n"
    assert name in cli.out("volume", "ls", "-q").split()
    assert json.loads(cli.out("volume", "inspect", name))[0]["Labels"] == {"a": "b"}
    cli.out("run", "--rm", "--network", "none", "-v", f"{name}:/d", "busybox", "touch", "/d/f")
    assert cli.out(
        "run", "--rm", "--network", "none", "-v", f"{name}:/d", "busybox", "ls", "/d"
    ) == ("f\n")
    cli.out("volume", "rm", name)
    assert cli("volume", "rm", name).returncode == 1


@requires("nftables", "netns")
def test_networks_and_ports(cli: Any, name: str) -> None:
    made = cli.out("network", "create", "--label", "a=b", name).strip()
    try:
        assert made[:12] in cli.out("network", "ls", "-q", "--filter", f"name={name}")
        args = ("run", "-d", "--name", name, "--network", f"name={name},alias=other", "-p", "80")
        cli.out(*args, "busybox", "sleep", "1000")
        shape = json.loads(cli.out("network", "inspect", name))[0]
        assert [member["Name"] for member in shape["Containers"].values()] == [name]
        template = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        address = cli.out("inspect", "-f", template, name).strip()
        assert address.count(".") == 3
        assert cli.out("port", name, "80").startswith("0.0.0.0:")
        assert cli("port", name, "81").returncode == 1
        (told,) = json.loads(cli.out("-o", "json", "port", name, "80")).items()
        assert told[0] == "80/tcp" and told[1][0].startswith("0.0.0.0:")
        assert cli("network", "rm", name).returncode == 1
        cli.out("network", "disconnect", name, name)
        cli.out("network", "connect", name, name)
        cli.out("rm", "-f", name)
    finally:
        cli("rm", "-f", name)
        assert cli("network", "rm", name).returncode == 0


def test_the_rest_of_the_host_is_described(cli: Any, name: str) -> None:
    cli.out("create", "--name", name, "busybox", "true")
    assert json.loads(cli.out("-o", "json", "info"))["instances"] >= 1
    assert "Images" in cli.out("df")
    events = cli.out("events", "--since", "1h", "--no-follow", "--filter", f"container={name}")
    assert "container create" in events
    line = cli.out("events", "--since", "1h", "--no-follow", "--format", "json").splitlines()[-1]
    moment = json.loads(line)["timeNano"]
    seconds = f"{moment // 10**9}.{moment % 10**9:09d}"
    exact = cli.out("events", "--since", seconds, "--until", seconds, "--format", "json")
    assert {json.loads(one)["timeNano"] for one in exact.splitlines()} == {moment}
    assert "exits booked" in cli.out("system", "reconcile")
    assert name in cli.out("_complete", "--", "rm", "").split()


def test_prune_asks_first(cli: Any, name: str) -> None:
    cli.out("create", "--name", name, "--label", f"mine={name}", "busybox", "true")
    refused = cli("prune", "--filter", f"label=mine={name}", input=b"n\n")
    assert refused.returncode == 1
    assert b"Are you sure" in refused.stderr
    pruned = cli.out("prune", "--filter", f"label=mine={name}", input=b"y\n")
    assert len(pruned.split()) == 1
    assert cli("inspect", name).returncode == 1


def test_an_interrupted_pull_leaves_no_image(cli: Any) -> None:
    done = cli("pull", "localhost:1/no/such:image")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith((b"hutch: ", b"hint: "))
    assert "no/such" not in cli.out("images")


def test_sizes_are_shown_where_asked_for(cli: Any, name: str) -> None:
    start(cli, name)
    cli.out("exec", name, "sh", "-c", "head -c 100000 /dev/urandom > /x")
    line = cli.out("ps", "-s", "--filter", f"name={name}").splitlines()[1]
    assert "(virtual " in line
    (shape,) = json.loads(cli.out("inspect", "-s", name))
    assert shape["SizeRw"] >= 100000
    assert shape["SizeRootFs"] > shape["SizeRw"]


def test_restart_takes_a_signal(cli: Any, name: str) -> None:
    script = "trap 'echo asked; exit 0' USR1; echo ready; while :; do sleep 0.05; done"
    args = ("run", "-d", "--network", "none", "--name", name, "busybox", "sh", "-c", script)
    cli.out(*args)
    wait_until(lambda: "ready" in cli.out("logs", name))
    cli.out("restart", "-s", "USR1", "-t", "20", name)
    assert "asked" in cli.out("logs", name)


@pytest.mark.parametrize(("options", "is_link"), [((), True), (("-L",), False)])
def test_a_link_is_copied_as_one_or_followed(
    cli: Any, name: str, tmp_path: Path, options: tuple[str, ...], is_link: bool
) -> None:
    start(cli, name)
    (tmp_path / "file").write_text("here")
    (tmp_path / "link").symlink_to("file")
    cli.out("cp", *options, str(tmp_path / "link"), f"{name}:/tmp/link")
    kind = "symbolic link" if is_link else "regular file"
    assert kind in cli.out("exec", name, "stat", "-c", "%F", "/tmp/link")
    cli.out("exec", name, "sh", "-c", "echo there > /file; ln -s /file /link")
    cli.out("cp", *options, f"{name}:/link", str(tmp_path / "out"))
    assert (tmp_path / "out").is_symlink() == is_link


def test_names_that_are_no_utf8_are_refused_by_their_field_or_shown(cli: Any, name: str) -> None:
    start(cli, name)
    bad = "\udcff"  # how Python hands on the byte 255
    wrong: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("spec.process.argv[1]", ("run", "--rm", "--network", "none", "busybox", "echo", bad)),
        ("spec.labels.a", ("create", "-l", f"a={bad}", "busybox")),
        ("labels.a", ("volume", "create", "--label", f"a={bad}", f"{name}-v")),
        ("history", ("commit", "-m", bad, name)),
    )
    for field, args in wrong:
        done = cli(*args)
        assert done.returncode in (1, 125)
        assert field in done.stderr.decode()
        assert "is not UTF-8" in done.stderr.decode()
    assert cli("volume", "inspect", f"{name}-v").returncode == 1
    assert cli("exec", name, "touch", f"/x{bad}").returncode == 0
    assert b"A /x\xff\n" in cli("diff", name).stdout
    assert {"kind": "A", "path": "/x�"} in json.loads(cli.out("diff", "-o", "json", name))


def test_objects_are_completed_where_they_belong(cli: Any, name: str) -> None:
    start(cli, name)

    def offered(*words: str) -> list[str]:
        return str(cli.out("_complete", "--", *words)).splitlines()

    assert name in offered("rm", "-f", "")
    assert "busybox:latest" in offered("run", "--rm", "--name", "x", "-it", "")
    assert offered("run", "busybox", "") == []
    assert "none" in offered("run", "--network", "")
    assert "none" in offered("network", "connect", "")
    assert name in offered("network", "connect", "bridge", "")
    assert name in offered("inspect", "")
    assert offered("exec", "-it", name, "") == []
    assert offered("exec", name, "ls", "-") == []
    assert offered("network", "create", "") == []


@pytest.mark.parametrize("shell", [s for s in ("bash", "zsh", "fish") if shutil.which(s)])
def test_a_completion_script_is_good_syntax(cli: Any, shell: str, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(cli.out("completion", shell))
    done = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_program_is_called_does_not_act_on_the_terminal(
    cli: Any, name: str, terminal: Any
) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\r\u202e"
    script = f": '{evil}'; touch \"/tmp/$1\"; echo made; exec sleep 1000"
    cli.out(
        *("run", "-d", "--network", "none", "--name", name, "busybox"),
        *("sh", "-c", script, "sh", evil),
    )
    wait_until(lambda: cli.out("logs", name) == "made\n")
    shown = cli.out("ps", "--no-trunc", "--filter", f"name={name}")
    assert r"\x1b]0;owned\x07\x1b[2J\r\u202e" in shown
    assert len(shown.splitlines()) == 2
    assert f"A /tmp/{evil}\n" in cli.out("diff", name)
    screen = terminal("diff", name)
    assert screen.wait() == 0
    assert rb"A /tmp/\x1b]0;owned\x07\x1b[2J\r\u202e" in screen.seen
    failed = cli("exec", name, evil)
    assert failed.returncode == 127
    assert b"\x1b" not in failed.stderr
