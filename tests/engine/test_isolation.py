"""What a container sees and may do, asked from inside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hutch.engine import Engine, Instance
from hutch.errors import HutchError, InvalidArgument, NotFound
from tests.requires import requires

pytestmark = requires("root", "cgroup", "overlayfs", "seccomp", "busybox")

Sh = Callable[..., str]


@pytest.fixture
def sh(engine: Engine) -> Sh:
    """Run a shell line in a new container without network; return what it wrote."""

    def run(line: str, **options: object) -> str:
        options.setdefault("network", "none")
        done = engine.run("busybox", ["sh", "-c", line], **options)  # type: ignore[arg-type]
        return (done.stdout + done.stderr).decode().strip()

    return run


# ---- namespaces ----


@pytest.mark.parametrize("kind", ["mnt", "uts", "ipc", "pid", "net", "cgroup"])
def test_every_namespace_is_its_own(sh: Sh, kind: str) -> None:
    assert sh(f"readlink /proc/self/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")


@pytest.mark.parametrize(
    ("option", "kind"), [("uts", "uts"), ("ipc", "ipc"), ("pid", "pid"), ("cgroupns", "cgroup")]
)
def test_a_namespace_of_the_host_can_be_asked_for(sh: Sh, option: str, kind: str) -> None:
    inside = sh(f"readlink /proc/self/ns/{kind}", **{option: "host"})
    assert inside == os.readlink(f"/proc/self/ns/{kind}")


def test_the_hosts_network_can_be_asked_for(sh: Sh) -> None:
    assert sh("readlink /proc/self/ns/net", network="host") == os.readlink("/proc/self/ns/net")


@pytest.mark.parametrize(("option", "kind"), [("network", "net"), ("pid", "pid"), ("ipc", "ipc")])
def test_a_namespace_of_another_container_is_joined(
    engine: Engine, sh: Sh, option: str, kind: str
) -> None:
    with engine.start("busybox", ["sleep", "100"], network="none") as other:
        theirs = other.exec(["readlink", f"/proc/self/ns/{kind}"]).text.strip()
        assert sh(f"readlink /proc/self/ns/{kind}", **{option: f"container:{other.name}"}) == theirs


def test_joining_a_container_that_does_not_run_is_refused(engine: Engine) -> None:
    with (
        engine.create("busybox", ["true"]) as other,
        pytest.raises(HutchError, match="not running"),
    ):
        engine.run("busybox", ["true"], network=f"container:{other.name}")


# ---- the file system ----


def test_the_default_devices_are_dockers(sh: Sh) -> None:
    assert sh("ls /dev").split() == [
        "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm",
        "stderr", "stdin", "stdout", "tty", "urandom", "zero",
    ]  # fmt: skip


@pytest.mark.parametrize("path", ["/proc/keys", "/proc/timer_list", "/proc/interrupts"])
def test_masked_files_are_empty(sh: Sh, path: str) -> None:
    assert sh(f"test -e {path} || exit; cat {path} | wc -c") in ("0", "")


@pytest.mark.parametrize("path", ["/proc/sys/kernel/hostname", "/proc/irq/default_smp_affinity"])
def test_kernel_settings_cannot_be_written(sh: Sh, path: str) -> None:
    assert "Read-only file system" in sh(f"echo x > {path}")


def test_sysfs_and_cgroups_cannot_be_written(sh: Sh) -> None:
    out = sh("mkdir /sys/fs/cgroup/memory/x /sys/kernel/x; echo 1 > /sys/kernel/profiling")
    assert out.count("Read-only file system") == 3


def test_a_read_only_root_refuses_writes_but_not_tmpfs(sh: Sh) -> None:
    out = sh("echo a > /x; echo b > /tmp/y && cat /tmp/y", read_only=True, tmpfs="/tmp")
    assert "/x: Read-only file system" in out and out.startswith("b")


def test_tmpfs_has_the_size_and_flags_asked_for(sh: Sh) -> None:
    line = sh("grep ' /t ' /proc/mounts", tmpfs="/t:size=1m,mode=700,exec")
    assert "size=1024k" in line and "mode=700" in line
    assert "nosuid" in line and "nodev" in line and "noexec" not in line


def test_a_bind_is_seen_and_a_read_only_one_is_not_written(sh: Sh, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("from outside")
    assert sh("cat /m/a; echo in > /m/b", volumes=f"{tmp_path}:/m") == "from outside"
    assert (tmp_path / "b").read_text() == "in\n"
    assert "Read-only" in sh("echo x > /m/c", volumes=f"{tmp_path}:/m:ro")


def test_a_bind_of_a_file_is_a_file(sh: Sh, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("one")
    assert sh("cat /etc/one", volumes=f"{tmp_path}/f:/etc/one") == "one"


def test_mount_refuses_a_missing_source(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no such file"):
        engine.run("busybox", ["true"], mounts=f"type=bind,source={tmp_path}/nope,target=/m")


def test_a_named_volume_takes_the_images_content_once(engine: Engine, sh: Sh) -> None:
    try:
        assert "passwd" in sh("ls /etc; rm /etc/group", volumes="copied:/etc")
        assert "group" not in sh("ls /etc", volumes="copied:/etc").split()
    finally:
        engine.volumes.remove("copied", force=True)


def test_a_volume_subpath_is_mounted_and_cannot_leave(engine: Engine, sh: Sh) -> None:
    try:
        sh("mkdir /v/sub; echo deep > /v/sub/f; ln -s / /v/out", volumes="subs:/v")
        assert sh("cat /m/f", mounts="type=volume,source=subs,target=/m,volume-subpath=sub") == (
            "deep"
        )
        with pytest.raises(InvalidArgument):
            sh("true", mounts="type=volume,source=subs,target=/m,volume-subpath=../x")
        # A link in the volume is resolved in the volume: `out` is its root, not the host's.
        assert sh("ls /m", mounts="type=volume,source=subs,target=/m,volume-subpath=out") == (
            "out\nsub"
        )
    finally:
        engine.volumes.remove("subs", force=True)


def test_volumes_from_gives_the_mounts_of_another(engine: Engine, sh: Sh, tmp_path: Path) -> None:
    with engine.create("busybox", ["true"], volumes=f"{tmp_path}:/shared") as other:
        assert "Read-only" in sh("echo x > /shared/x", volumes_from=f"{other.name}:ro")
        assert sh("echo y > /shared/y && echo ok", volumes_from=other.name) == "ok"


def test_shm_has_the_size_asked_for(sh: Sh) -> None:
    assert "size=2048k" in sh("grep /dev/shm /proc/mounts", shm_size="2m")


# ---- privileges ----


def caps(text: str) -> dict[str, int]:
    pairs = (line.split(":") for line in text.splitlines() if line.startswith("Cap"))
    return {name: int(value, 16) for name, value in pairs}


def test_capabilities_are_dockers_defaults(sh: Sh) -> None:
    found = caps(sh("cat /proc/self/status"))
    assert found["CapEff"] == found["CapBnd"] == 0xA80425FB
    assert found["CapInh"] == found["CapAmb"] == 0


def test_capabilities_are_added_and_dropped(sh: Sh) -> None:
    assert caps(sh("cat /proc/self/status", cap_drop="ALL"))["CapBnd"] == 0
    assert caps(sh("cat /proc/self/status", cap_drop="ALL", cap_add="KILL"))["CapEff"] == 1 << 5


def test_another_user_keeps_no_capability(sh: Sh) -> None:
    found = caps(sh("cat /proc/self/status", user="1000:1000"))
    assert found["CapEff"] == found["CapPrm"] == 0


def test_no_new_privileges_is_on_and_can_be_turned_off(sh: Sh) -> None:
    line = "grep NoNewPrivs /proc/self/status"
    assert sh(line).endswith("1")
    assert sh(line, security_opt="no-new-privileges=false").endswith("0")


def test_a_filter_is_loaded_unless_unconfined(sh: Sh) -> None:
    line = "grep Seccomp: /proc/self/status"
    assert sh(line).endswith("2")
    assert sh(line, security_opt="seccomp=unconfined").endswith("0")


def test_denied_calls_are_denied(sh: Sh) -> None:
    assert "permission denied" in sh("mount -t tmpfs t /mnt")
    assert "not permitted" in sh("unshare -U true")
    assert "not permitted" in sh("hostname other")
    assert "not permitted" in sh("date -s 2001-01-01")


def test_a_profile_of_ones_own_with_an_argument_condition(engine: Engine, tmp_path: Path) -> None:
    profile = tmp_path / "p.json"
    # kill with signal 10 is refused with ENOTTY (25), another signal is not.
    profile.write_text(
        '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["kill"],'
        ' "action": "SCMP_ACT_ERRNO", "errnoRet": 25,'
        ' "args": [{"index": 1, "value": 10, "op": "SCMP_CMP_EQ"}]}]}'
    )
    done = engine.run(
        "busybox",
        ["sh", "-c", "sleep 9 & kill -10 $!; kill -15 $! && echo ended"],
        network="none",
        security_opt=f"seccomp={profile.read_text()}",
    )
    assert b"Not a tty" in done.stderr or b"ioctl" in done.stderr
    assert done.stdout == b"ended\n"


def test_a_bad_profile_is_refused_naming_the_place(engine: Engine) -> None:
    with pytest.raises(InvalidArgument, match="defaultAction"):
        engine.run("busybox", ["true"], security_opt='seccomp={"defaultAction": "NONE"}')


def test_privileged_lifts_it_all(sh: Sh) -> None:
    out = sh(
        "grep -E 'Seccomp:|NoNewPrivs' /proc/self/status; ls /dev | wc -l;"
        " mount -t tmpfs t /mnt && echo mounted",
        privileged=True,
    )
    assert "Seccomp:\t0" in out and "NoNewPrivs:\t0" in out and out.endswith("mounted")


# Opening /dev/fuse needs nothing but the device itself to be allowed.
OPEN_FUSE = "mknod /tmp/f c 10 229; (exec 3</tmp/f) 2>&1 | grep -c permitted"


def test_a_device_must_be_given_to_be_opened(sh: Sh) -> None:
    assert sh(OPEN_FUSE) == "1"
    assert sh("(exec 3</dev/fuse) && echo open", devices="/dev/fuse") == "open"
    assert sh("(exec 3</dev/x) && echo open", devices="/dev/fuse:/dev/x:r") == "open"


def test_a_device_given_by_the_name_of_a_default_one_takes_its_place(sh: Sh) -> None:
    assert sh("echo x >/dev/null && echo open", devices="/dev/null") == "open"
    assert sh("ls -l /dev/zero | grep -c '1,  *3'", devices="/dev/null:/dev/zero") == "1"


def test_device_rules_open_more(sh: Sh) -> None:
    assert sh(OPEN_FUSE, device_cgroup_rules="c 10:229 rw") == "0"


# ---- users, environment, identity ----


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", "uid=0(root) gid=0(root)"),
        ("nobody", "uid=65534(nobody) gid=65534"),
        ("12:34", "uid=12 gid=34"),
        ("0:34", "uid=0(root) gid=34"),
    ],
)
def test_a_user_is_found_by_name_or_number(sh: Sh, user: str, expected: str) -> None:
    assert sh("id", user=user or None).startswith(expected)


def test_an_unknown_user_is_refused(sh: Sh) -> None:
    with pytest.raises(NotFound, match="no user 'nosuch'"):
        sh("id", user="nosuch")


def test_groups_are_added(sh: Sh) -> None:
    assert "groups=13,34,35" in sh("id", user="12:13", group_add=["34", "35"]).replace("(", "=(")


def test_the_working_directory_is_made(sh: Sh) -> None:
    assert sh("pwd", workdir="/a/b/c") == "/a/b/c"


def test_the_environment_is_dockers(sh: Sh) -> None:
    out = sh("env", env={"A": "1", "PATH": "/bin"}, hostname="here").splitlines()
    assert {"A=1", "PATH=/bin", "HOSTNAME=here", "HOME=/root"} <= set(out)


def test_hostname_and_domain(sh: Sh) -> None:
    out = sh("hostname; cat /etc/hostname; cat /proc/sys/kernel/domainname", hostname="h",
             domainname="example.org")  # fmt: skip
    assert out.split() == ["h", "h", "example.org"]


def test_the_hostname_is_the_short_identifier(engine: Engine) -> None:
    with engine.start("busybox", ["sleep", "100"], network="none") as box:
        assert box.exec(["hostname"]).text.strip() == box.id[:12]


def test_sysctls_and_ulimits_are_set(sh: Sh) -> None:
    out = sh(
        "cat /proc/sys/net/ipv4/ip_unprivileged_port_start; ulimit -n; ulimit -Hc",
        sysctls={"net.ipv4.ip_unprivileged_port_start": "7"},
        ulimits=["nofile=100:200", "core=0"],
    )
    assert out.split() == ["7", "100", "0"]


def test_init_reaps_orphans_and_is_the_first_process(sh: Sh) -> None:
    # One that nobody reaps stays in the list for ever.
    script = "(sleep 0.01 &); until ! ps -o comm | grep -q ^sleep; do usleep 10000; done; echo none"
    assert sh(f"timeout 60 sh -c '{script}'", init=True) == "none"
    assert sh("echo $$", init=True) != "1"


def test_init_passes_signals_on(engine: Engine) -> None:
    script = "trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done"
    with engine.start("busybox", ["sh", "-c", script], init=True, network="none") as box:
        next(iter(box.logs(follow=True)))
        box.stop(timeout=60)
        assert box.info().exit_code == 9


# ---- limits ----


def inside_v1(box: Instance, controller: str, name: str) -> str:
    return box.exec(["cat", f"/sys/fs/cgroup/{controller}/{name}"]).text.strip()


@pytest.mark.skipif(not Path("/sys/fs/cgroup/memory").is_dir(), reason="needs cgroup v1")
def test_limits_are_in_the_cgroup_and_seen_inside(engine: Engine) -> None:
    with engine.start(
        "busybox",
        ["sleep", "100"],
        network="none",
        memory="32m",
        cpus=0.5,
        pids_limit=17,
        cpuset_cpus="0",
    ) as box:
        assert inside_v1(box, "memory", "memory.limit_in_bytes") == str(32 << 20)
        assert inside_v1(box, "cpu", "cpu.cfs_quota_us") == "50000"
        assert inside_v1(box, "pids", "pids.max") == "17"
        assert inside_v1(box, "cpuset", "cpuset.cpus") == "0"


def test_a_fork_bomb_is_held(engine: Engine) -> None:
    script = "for i in $(seq 40); do sleep 5 & done; echo $(ls /proc | grep -c '^[0-9]')"
    done = engine.run("busybox", ["sh", "-c", script], network="none", pids_limit=20, init=True)
    assert b"fork" in done.stderr


def test_running_out_of_memory_is_told(engine: Engine) -> None:
    done = engine.run(
        "busybox",
        ["sh", "-c", "dd if=/dev/zero of=/dev/null bs=200M count=1"],
        network="none",
        memory="16m",
        memory_swap="16m",
    )
    assert done.exit_code == 137 and done.oom_killed


# ---- another user's ids ----


@requires("idmapped-mounts")
def test_remapped_ids_are_others_outside(engine: Engine) -> None:
    with engine.start(
        "busybox",
        ["sh", "-c", "touch /mine /v/shared; sleep 100"],
        network="none",
        userns="remap",
        volumes="remapped:/v",
    ) as box:
        pid = box.info().pid
        assert os.stat(f"/proc/{pid}").st_uid >= 65536
        out = box.exec(["sh", "-c", "until test -e /v/shared; do :; done; id -u; ls -ln /mine /v"])
        lines = out.text.splitlines()
        assert lines[0] == "0" and all(line.split()[2] == "0" for line in lines if "-rw" in line)
        upper = engine.root / "instances" / box.id / "upper" / "mine"
        assert upper.stat().st_uid >= 65536
        assert (Path(engine.volumes.get("remapped").path) / "shared").stat().st_uid == 0
    engine.volumes.remove("remapped")


def test_modes_of_the_image_are_kept(sh: Sh) -> None:
    assert sh("stat -c %a /tmp /root /bin").split() == ["1777", "700", "755"]


@requires("idmapped-mounts")
def test_copies_of_a_remapped_container_have_the_ids_inside(engine: Engine, tmp_path: Path) -> None:
    with engine.start("busybox", ["sleep", "100"], network="none", userns="remap") as box:
        (tmp_path / "in").write_text("x")
        box.files.copy_in(tmp_path / "in", "/in")
        assert box.exec(["stat", "-c", "%u:%g", "/in"]).text == "0:0\n"
        box.exec(["chown", "7:8", "/in"])
        box.files.copy_out("/in", tmp_path / "out")
        assert (tmp_path / "out").stat().st_uid == 7
        image = box.commit("committed")
    done = engine.run("committed", ["stat", "-c", "%u:%g", "/in"], network="none")
    engine.images.remove(image.id, force=True)
    assert done.text == "7:8\n"


def test_more_processors_than_the_host_has_are_refused(engine: Engine) -> None:
    with pytest.raises(InvalidArgument, match=f"cpus.*this host has {os.cpu_count()}"):
        engine.create("busybox", ["true"], cpus=(os.cpu_count() or 1) + 1)


def test_an_image_for_another_platform_is_not_taken_for_the_one_asked_for(engine: Engine) -> None:
    with pytest.raises(NotFound, match="here it is for amd64, not for arm64"):
        engine.run("busybox", ["true"], network="none", pull="never", platform="linux/arm64")
    done = engine.run("busybox", ["true"], network="none", pull="never", platform="linux/amd64")
    assert done.exit_code == 0
