"""The mount calls, each in a child with a mount namespace of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hutch.linux import mount, namespaces
from tests.requires import requires

pytestmark = [requires("root"), pytest.mark.integration]

SOURCE = str(Path(mount.__file__).parents[2])

PROLOGUE = """
import os, sys
sys.path.insert(0, {source!r})
from hutch.linux import files, mount as m, namespaces as ns
os.chdir({where!r})
ns.unshare(ns.CLONE_NEWNS)
m.mount("none", "/", None, m.MS_REC | m.MS_PRIVATE)
m.mount("scratch", ".", "tmpfs", 0, "size=8m")
os.chdir({where!r})
"""


def inside(where: Path, script: str) -> str:
    """Run a script in a new mount namespace, in a fresh tmpfs; return what it printed."""
    code = PROLOGUE.format(source=SOURCE, where=str(where)) + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_bind_mount_is_made_and_taken_away(tmp_path: Path) -> None:
    output = inside(
        tmp_path,
        """
        os.mkdir("a"); os.mkdir("b"); open("a/file", "w").close()
        m.mount("a", "b", None, m.MS_BIND)
        os.symlink("b", "link")
        print(os.listdir("b"), m.is_mount_point("b"), m.is_mount_point("a"))
        print(m.is_mount_point("b/"), m.is_mount_point("link"), m.is_mount_point("/"))
        m.umount2("b", m.UMOUNT_NOFOLLOW)
        print(os.listdir("b"), m.is_mount_point("b"))
        """,
    )
    assert output == "['file'] True False\nTrue False True\n[] False"


def test_a_file_system_is_configured_and_mounted_by_descriptors(tmp_path: Path) -> None:
    output = inside(
        tmp_path,
        """
        fs = m.fsopen("tmpfs")
        m.fsconfig_set_string(fs, "size", "1m")
        m.fsconfig_create(fs)
        fd = m.fsmount(fs, m.MOUNT_ATTR_NODEV | m.MOUNT_ATTR_NOSUID)
        print(os.get_inheritable(fs), os.get_inheritable(fd))
        os.mkdir("t")
        m.move_mount(fd, "", m.AT_FDCWD, "t")
        print(os.statvfs("t").f_blocks * os.statvfs("t").f_frsize)
        lines = [line.split() for line in open("/proc/self/mountinfo")]
        print([words[5] for words in lines if words[4].endswith("/t")])
        """,
    )
    assert output == "False False\n1048576\n['rw,nosuid,nodev,relatime']"


@requires("overlayfs")
def test_an_overlay_takes_its_layers_by_descriptor(tmp_path: Path) -> None:
    output = inside(
        tmp_path,
        """
        for name in ("low", "up", "work", "root"):
            os.mkdir(name)
        open("low/file", "w").close()
        fs = m.fsopen("overlay")
        fd = os.open("low", os.O_PATH)
        try:
            m.fsconfig_set_fd(fs, "lowerdir+", fd)
        except OSError:
            m.fsconfig_set_string(fs, "lowerdir+", os.path.abspath("low"))
        m.fsconfig_set_string(fs, "upperdir", os.path.abspath("up"))
        m.fsconfig_set_string(fs, "workdir", os.path.abspath("work"))
        m.fsconfig_create(fs)
        m.move_mount(m.fsmount(fs), "", m.AT_FDCWD, "root")
        open("root/new", "w").close()
        print(sorted(os.listdir("root")), os.listdir("up"))
        """,
    )
    assert output == "['file', 'new'] ['new']"


def test_a_cloned_tree_is_made_read_only_beneath_too(tmp_path: Path) -> None:
    output = inside(
        tmp_path,
        """
        os.makedirs("a/inner"); os.mkdir("b")
        m.mount("x", "a/inner", "tmpfs")
        fd = m.open_tree(m.AT_FDCWD, "a", m.OPEN_TREE_CLONE | m.AT_RECURSIVE)
        everywhere = m.AT_EMPTY_PATH | m.AT_RECURSIVE
        m.mount_setattr(fd, "", attr_set=m.MOUNT_ATTR_RDONLY, flags=everywhere)
        m.move_mount(fd, "", m.AT_FDCWD, "b")
        for name in ("b/f", "b/inner/f", "a/inner/f"):
            try:
                open(name, "w").close()
                print("written")
            except OSError as exc:
                print(exc.strerror)
        """,
    )
    assert output == "Read-only file system\nRead-only file system\nwritten"


@pytest.mark.parametrize(
    ("call", "number", "path"),
    [
        ('m.mount("/nope", "x", None, m.MS_BIND)', 2, "/nope"),
        ('m.umount2("/nope")', 2, "/nope"),
        ('m.open_tree(m.AT_FDCWD, "/nope", 0)', 2, "/nope"),
        ('m.fsopen("nofs")', 19, "nofs"),
        ('m.move_mount(m.AT_FDCWD, "/nope", m.AT_FDCWD, "/nope2", 0)', 2, "/nope"),
    ],
)
def test_a_failure_names_its_path(tmp_path: Path, call: str, number: int, path: str) -> None:
    output = inside(
        tmp_path,
        f"""
        try:
            {call}
        except OSError as exc:
            print(exc.errno, exc.filename)
        """,
    )
    assert output == f"{number} {path}"


def test_a_busy_mount_is_refused_and_detached_lazily(tmp_path: Path) -> None:
    output = inside(
        tmp_path,
        """
        os.mkdir("t"); m.mount("x", "t", "tmpfs"); held = open("t/file", "w")
        try:
            m.umount2("t")
        except OSError as exc:
            print(exc.strerror)
        m.umount2("t", m.MNT_DETACH)
        held.write("still there"); held.flush()
        print(os.listdir("t"))
        """,
    )
    assert output == "Device or resource busy\n[]"


def test_a_namespace_outlives_its_making_and_leaves_the_thread_where_it_was() -> None:
    before = os.readlink("/proc/thread-self/ns/net")
    fd = namespaces.new_namespace_fd(namespaces.CLONE_NEWNET)
    try:
        assert os.readlink("/proc/thread-self/ns/net") == before
        assert namespaces.namespace_type(fd) == namespaces.CLONE_NEWNET
        with namespaces.thread_in_namespace(fd, namespaces.CLONE_NEWNET):
            assert os.readlink("/proc/thread-self/ns/net") == os.readlink(f"/proc/self/fd/{fd}")
        assert os.readlink("/proc/thread-self/ns/net") == before
    finally:
        os.close(fd)
