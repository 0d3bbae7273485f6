"""The root that a plan builds: overlay, mounts, masks, nodes; links of an image lead nowhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hutch.plan import flags, ops
from hutch.process import LaunchFailed
from tests.native.boxes import NAMESPACES, PLAIN, Runner, box, shell
from tests.requires import requires

pytestmark = [requires("root", "busybox", "cc"), pytest.mark.integration]


@contextmanager
def directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def overlay_on(rootfs: Path, tmp_path: Path, slot: int = 5) -> ops.Overlay:
    layer = tmp_path / "layer"
    layer.mkdir()
    (layer / "from-layer").write_text("layer")
    for name in ("upper", "work"):
        (tmp_path / name).mkdir()
    return ops.Overlay(
        slot=slot,
        lower=(str(layer), str(rootfs)),
        upper=str(tmp_path / "upper"),
        work=str(tmp_path / "work"),
    )


@pytest.mark.parametrize("where", ["prepare", "child"])
@requires("overlayfs")
def test_an_overlay_root_keeps_what_is_written(
    overlay_runner: Runner, rootfs: Path, tmp_path: Path, where: str
) -> None:
    overlay = overlay_on(rootfs, tmp_path)
    move = ops.MoveMount(slot=5, target="")
    plan = shell(
        rootfs,
        "cat /from-layer; echo new >/made; rm /etc/group",
        prepare=[overlay] if where == "prepare" else [],
        root=[move] if where == "prepare" else [overlay, move],
    )
    status, out, err = overlay_runner.run(plan)
    assert (status.code, out, err) == (0, b"layer", b"")
    assert (tmp_path / "upper/made").read_text() == "new\n"
    assert (rootfs / "etc/group").exists()


@requires("overlayfs")
def test_layers_of_any_path_length(overlay_runner: Runner, rootfs: Path, tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(4):
        deep = deep / ("d" * 100)
    deep.mkdir(parents=True)
    (deep / "deep-file").write_text("deep")
    overlay = ops.Overlay(slot=1, lower=(str(deep), str(rootfs)))
    move = ops.MoveMount(slot=1, target="")
    # Read-only: the mount points are in the image.
    _, out, err = overlay_runner.run(
        box(rootfs, ["cat", "/deep-file"], prepare=[overlay], root=[move])
    )
    assert (out, err) == (b"deep", b"")


@requires("overlayfs")
def test_an_overlay_leaves_no_descriptor_on_its_layers(
    overlay_runner: Runner, rootfs: Path, tmp_path: Path
) -> None:
    plan = box(
        rootfs,
        ["sleep", "100"],
        prepare=[overlay_on(rootfs, tmp_path)],
        root=[ops.MoveMount(slot=5, target="")],
    )
    with overlay_runner.running(plan) as supervisor:
        held = Path(f"/proc/{supervisor.supervisor_pid}/fd")
        targets = [os.readlink(link) for link in held.iterdir()]
        assert not [target for target in targets if target.startswith(str(tmp_path))]
        assert "/" in targets  # the overlay itself


@requires("overlayfs")
def test_an_overlay_of_many_layers(overlay_runner: Runner, rootfs: Path, tmp_path: Path) -> None:
    layers = []
    for number in range(120):
        layer = tmp_path / f"layer,with:odd={number}"
        layer.mkdir()
        (layer / f"file{number}").touch()
        layers.append(str(layer))
    overlay = ops.Overlay(slot=0, lower=(*layers, str(rootfs)))
    plan = shell(
        rootfs, "ls / | grep -c ^file", prepare=[overlay], root=[ops.MoveMount(slot=0, target="")]
    )
    _, out, err = overlay_runner.run(plan)
    assert (out, err) == (b"120\n", b"")


def test_a_bind_mount_is_put_in_place(runner: Runner, rootfs: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("bound")
    plan = shell(
        rootfs,
        "cat /mnt/a/b/file /etc/new; touch /mnt/a/b/x; echo $?",
        prepare=[
            ops.OpenTree(slot=0, path=str(source), attr=flags.MOUNT_ATTR_RDONLY),
            ops.OpenTree(slot=1, path=str(source / "file")),
        ],
        before_pivot=[
            ops.MoveMount(slot=0, target="/mnt/a/b", create="dir"),
            ops.MoveMount(slot=1, target="/etc/new", create="file"),
        ],
    )
    _, out, err = runner.run(plan)
    assert out == b"boundbound1\n"
    assert b"Read-only file system" in err


def test_a_bind_source_may_be_a_descriptor(runner: Runner, rootfs: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("by descriptor")
    plan = box(
        rootfs,
        ["cat", "/mnt/file"],
        slots=1,
        prepare=[ops.OpenTree(slot=1, source=0)],
        before_pivot=[ops.MoveMount(slot=1, target="/mnt", create="dir")],
    )
    with directory(source) as fd:
        assert runner.run(plan, [fd])[1] == b"by descriptor"


def test_mounts_are_made_with_their_options(runner: Runner, rootfs: Path) -> None:
    plan = shell(
        rootfs,
        "grep ' /x/y ' /proc/mounts; stat -c %a /x/y",
        before_pivot=[
            ops.Mount(
                fstype="tmpfs",
                target="/x/y",
                source="name",
                options=("mode=1770", "size=1m"),
                attr=PLAIN | flags.MOUNT_ATTR_RDONLY,
            )
        ],
    )
    _, out, _ = runner.run(plan)
    mount, mode = out.splitlines()
    assert mount.startswith(b"name /x/y tmpfs ro,nosuid,nodev,noexec")
    assert b"size=1024k" in mount
    assert mode == b"1770"


def test_copy_up_brings_the_images_content(runner: Runner, rootfs: Path) -> None:
    inside = rootfs / "data" / "sub"
    inside.mkdir(parents=True)
    (inside / "file").write_bytes(b"x" * 10000)
    os.chown(inside / "file", 7, 8)
    (inside / "file").chmod(0o4751)
    (rootfs / "data/link").symlink_to("/etc/passwd")
    os.mkfifo(rootfs / "data/fifo")
    plan = shell(
        rootfs,
        "cd /data; stat -c '%a %u %g %s' sub/file; readlink link; ls | wc -l; stat -f -c %T /data",
        before_pivot=[
            ops.Mount(fstype="tmpfs", target="/data", source="tmpfs", copy_up=True, attr=1)
        ],
    )
    _, out, err = runner.run(plan)
    assert out.splitlines() == [b"4751 7 8 10000", b"/etc/passwd", b"2", b"tmpfs"]
    assert err == b""


def test_masked_paths_are_empty_and_read_only(runner: Runner, rootfs: Path) -> None:
    for name in ("secret-dir", "other-dir"):
        (rootfs / name).mkdir()
        (rootfs / name / "file").write_text("secret")
    (rootfs / "secret-file").write_text("secret")
    plan = shell(
        rootfs,
        "ls -A /secret-dir /other-dir; cat /secret-file; touch /secret-dir/x /other-dir/x; echo $?",
        before_pivot=[ops.Mask(paths=("/secret-dir", "/other-dir", "/secret-file", "/missing"))],
    )
    _, out, err = runner.run(plan)
    assert out == b"/other-dir:\n\n/secret-dir:\n1\n"
    assert err.count(b"Read-only file system") == 2


def test_read_only_paths_refuse_writes(runner: Runner, rootfs: Path) -> None:
    plan = shell(
        rootfs,
        "echo 1 >/proc/sys/kernel/hostname; echo x >/etc/passwd; echo fine >/tmp/x && cat /tmp/x",
        before_pivot=[ops.ReadOnly(paths=("/proc/sys", "/etc", "/missing"))],
    )
    _, out, err = runner.run(plan)
    assert out == b"fine\n"
    assert err.count(b"Read-only file system") == 2


def test_a_read_only_root(runner: Runner, rootfs: Path) -> None:
    plan = shell(
        rootfs,
        "touch /x; touch /dev/x && echo dev",
        before_pivot=[ops.Remount(target="", attr_set=flags.MOUNT_ATTR_RDONLY)],
    )
    _, out, err = runner.run(plan)
    assert (out, err.count(b"Read-only")) == (b"dev\n", 1)


def test_nodes_directories_links_and_files(runner: Runner, rootfs: Path) -> None:
    (rootfs / "etc/kept").symlink_to("original")
    plan = shell(
        rootfs,
        "stat -c '%F %a %u:%g %t,%T' /dev/made; stat -c '%F %a %u' /d/e/f;"
        "readlink /d/l; readlink /etc/kept; cat /n/file; stat -c %a /n/file",
        before_pivot=[
            ops.Mknod(path="/dev/made", mode=0o020622, major=1, minor=7, uid=3, gid=4),
            ops.Mkdir(path="/d/e/f", mode=0o777, uid=9),
            ops.Symlink(target="to", path="/d/l"),
            ops.Symlink(target="new", path="/etc/kept"),
            ops.WriteFile(path="/n/file", content=b"one\0", mode=0o666),
            ops.WriteFile(path="/n/file", content=b"two", append=True),
        ],
    )
    _, out, err = runner.run(plan)
    assert err == b""
    assert out.splitlines() == [
        b"character special file 622 3:4 1,7",
        b"directory 777 9",
        b"to",
        b"original",
        b"one\0two666",
    ]


def test_hostname_sysctl_and_loopback(runner: Runner, rootfs: Path) -> None:
    plan = shell(
        rootfs,
        "hostname; cat /proc/sys/kernel/domainname /proc/sys/net/ipv4/ip_forward;"
        "ip -o link show lo | grep -o ',UP' ",
        before_pivot=[
            ops.Hostname(name="box", domain="example"),
            ops.Sysctl(key="net/ipv4/ip_forward", value="1"),
            ops.LinkUp(),
        ],
    )
    _, out, _ = runner.run(plan)
    assert out.split() == [b"box", b"example", b"1", b",UP"]


def test_the_hosts_mounts_are_out_of_reach(runner: Runner, rootfs: Path) -> None:
    _, out, _ = runner.run(box(rootfs, ["cat", "/proc/self/mountinfo"]))
    targets = [line.split()[4] for line in out.splitlines()]
    assert sorted(targets) == [b"/", b"/dev", b"/dev/pts", b"/proc"]


def test_nothing_is_mounted_on_the_host(runner: Runner, rootfs: Path, tmp_path: Path) -> None:
    with runner.running(box(rootfs, ["sleep", "100"])):
        assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.parametrize(
    "op",
    [
        ops.Mount(fstype="tmpfs", target="/trap/made", source="tmpfs"),
        ops.Mkdir(path="/trap/made"),
        ops.Mknod(path="/trap/made", mode=0o020666, major=1, minor=3),
        ops.Symlink(target="x", path="/trap/made"),
        ops.WriteFile(path="/trap/made", content=b"x"),
        ops.WriteFile(path="/trap", content=b"x"),
        ops.MoveMount(slot=0, target="/trap/made", create="dir"),
        ops.MoveMount(slot=0, target="/trap/made", create="file"),
        ops.Chdir(path="/trap/made", create=True),
    ],
    ids=lambda op: type(op).__name__,
)
@pytest.mark.parametrize("link", ["{out}", "../../../../../../../..{out}"])
def test_a_link_in_the_image_does_not_lead_to_the_host(
    runner: Runner, rootfs: Path, tmp_path: Path, op: ops.AnyOp, link: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (rootfs / "trap").symlink_to(link.format(out=outside))
    plan = box(rootfs, ["true"], prepare=[ops.OpenTree(slot=0, path="/usr")], before_pivot=[op])
    with runner.start(plan) as supervisor:
        try:
            supervisor.wait(60)
        except LaunchFailed:
            pass  # refused is as good as led elsewhere
    assert list(outside.iterdir()) == []


def test_a_magic_link_is_not_followed(runner: Runner, rootfs: Path) -> None:
    (rootfs / "trap").symlink_to("/proc/1/root/tmp")
    plan = box(rootfs, ["true"], before_pivot=[ops.Mkdir(path="/trap/made")])
    with runner.start(plan) as supervisor, pytest.raises(LaunchFailed) as failure:
        supervisor.wait_started(20)
    assert failure.value.errno == 40  # ELOOP


def test_the_launcher_cannot_be_written_to_from_inside(runner: Runner, rootfs: Path) -> None:
    plan = shell(rootfs, "echo bad >/proc/1/exe; echo $?", init=True)
    _, out, err = runner.run(plan)
    assert out == b"1\n"
    assert b"Operation not permitted" in err or b"Text file busy" in err


@requires("userns", "idmapped-mounts", "overlayfs")
def test_a_user_namespace_on_idmapped_layers(
    overlay_runner: Runner, rootfs: Path, tmp_path: Path
) -> None:
    maps = (ops.Idmap(inside=0, outside=100000, size=65536),)
    for path in (tmp_path, *list(tmp_path.parents)[:-2]):
        path.chmod(path.stat().st_mode | 0o011)
    for name in ("upper", "work"):
        (tmp_path / name).mkdir()
        os.chown(tmp_path / name, 100000, 100000)
    userns = _user_namespace(100000)
    plan = shell(
        rootfs,
        "id -u; stat -c %u /etc/passwd; touch /made; cat /proc/self/uid_map; echo x >/dev/null",
        slots=1,
        clone_flags=NAMESPACES | flags.CLONE_NEWUSER,
        prepare=[
            ops.IdMap(uids=maps, gids=maps),
            ops.OpenTree(slot=1, path=str(rootfs), recursive=False, userns=0),
            ops.Overlay(
                slot=2,
                lower=("@1",),
                upper=str(tmp_path / "upper"),
                work=str(tmp_path / "work"),
            ),
        ],
        root=[ops.MoveMount(slot=2, target="")],
    )
    try:
        _, out, err = overlay_runner.run(plan, [userns])
    finally:
        os.close(userns)
    assert err == b""
    assert out.split() == [b"0", b"0", b"0", b"100000", b"65536"]
    assert (tmp_path / "upper/made").stat().st_uid == 100000


def _user_namespace(outside: int) -> int:
    """Return a descriptor of a user namespace that maps 0 to `outside`."""
    import subprocess

    holder = subprocess.Popen(
        ["unshare", "--user", "sh", "-c", "echo; read x"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    for kind in ("uid", "gid"):
        Path(f"/proc/{holder.pid}/{kind}_map").write_text(f"0 {outside} 65536\n")
    fd = os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    holder.communicate(b"\n")
    return fd
