"""The files of an instance: read, written, listed, copied, compared, made an image of."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hutch.engine import Engine, Instance
from hutch.errors import HutchError, InvalidArgument, NotFound
from tests.engine.behaviours.conftest import Maker, Sh
from tests.engine.behaviours.waiting import DEADLINE_S


def test_what_is_written_is_read(box: Instance, inside: Sh) -> None:
    box.files.write("/data/deep/file", b"content\n", mode=0o640, owner=(5, 6))
    assert box.files.read("/data/deep/file") == b"content\n"
    assert inside("stat -c %a:%u:%g /data/deep/file; cat /data/deep/file") == "640:5:6\ncontent"
    box.files.write("/data/deep/file", b"more\n", append=True)
    assert box.files.read_text("/data/deep/file") == "content\nmore\n"


def test_a_listing_names_what_is_there(box: Instance, inside: Sh) -> None:
    inside("mkdir -p /list/sub; echo 12345 > /list/file; ln -sf file /list/link")
    found = {entry.name: entry for entry in box.files.list("/list")}
    assert sorted(found) == ["file", "link", "sub"]
    assert stat.S_ISDIR(found["sub"].mode) and stat.S_ISLNK(found["link"].mode)
    assert (found["file"].size, found["link"].link_target) == (6, "file")
    assert box.files.stat("/list/link").size == 6


def test_directories_are_made_and_trees_removed(box: Instance, inside: Sh) -> None:
    box.files.mkdir("/tree/a/b", mode=0o700)
    assert inside("stat -c %a /tree/a/b") == "700"
    with pytest.raises(HutchError):
        box.files.remove("/tree")
    box.files.remove("/tree", recursive=True)
    assert not box.files.exists("/tree")


def test_what_is_not_there_is_told(box: Instance) -> None:
    with pytest.raises(NotFound):
        box.files.read("/no/such/file")
    with pytest.raises(NotFound):
        box.files.list("/no/such")
    with pytest.raises(NotFound):
        box.files.copy_out("/no/such", "/tmp")


def test_links_stay_inside(box: Instance, inside: Sh) -> None:
    inside("ln -sf /../../../../etc/hostname /out; ln -sfn ../../../../../etc /up")
    assert box.files.read("/out") == b"shared\n"
    assert box.files.read("/up/hostname") == b"shared\n"


def test_a_tree_is_copied_in_and_out_as_it_is(box: Instance, inside: Sh, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub/data").write_bytes(bytes(range(256)) * 1000)
    (source / "run").write_text("#!/bin/sh\necho ran\n")
    (source / "run").chmod(0o755)
    (source / "link").symlink_to("sub/data")
    box.files.copy_in(source, "/copied")
    assert inside("/copied/run; readlink /copied/link; wc -c < /copied/sub/data") == (
        "ran\nsub/data\n256000"
    )
    box.files.copy_out("/copied", tmp_path / "back")
    assert (tmp_path / "back/sub/data").read_bytes() == (source / "sub/data").read_bytes()
    assert os.readlink(tmp_path / "back/link") == "sub/data"
    assert (tmp_path / "back/run").stat().st_mode & 0o777 == 0o755


def test_tar_streams_go_both_ways(box: Instance, inside: Sh) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        member = tarfile.TarInfo("streamed/file")
        member.size, member.mode = 4, 0o600
        tar.addfile(member, io.BytesIO(b"data"))
    box.files.mkdir("/tars")
    assert box.files.copy_in_tar("/tars", [archive.getvalue()]) >= 1
    assert inside("cat /tars/streamed/file; stat -c %a /tars/streamed/file") == "data600"
    _, chunks = box.copy_out("/tars/streamed")
    with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as tar:
        assert sorted(tar.getnames()) == ["streamed", "streamed/file"]
        extracted = tar.extractfile("streamed/file")
        assert extracted is not None and extracted.read() == b"data"


def test_a_tar_that_leads_out_is_kept_in(box: Instance, inside: Sh) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        link = tarfile.TarInfo("way")
        link.type, link.linkname = tarfile.SYMTYPE, "/proc/1/root/../../.."
        tar.addfile(link)
        member = tarfile.TarInfo("../../escaped")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    box.files.mkdir("/hostile")
    with pytest.raises(HutchError):
        box.files.copy_in_tar("/hostile", [archive.getvalue()])
    assert inside("ls /escaped 2>/dev/null") == ""
    assert not os.path.exists("/escaped")


def test_a_directory_is_not_removed_for_a_file_nor_the_other_way_round(
    box: Instance, tmp_path: Path
) -> None:
    box.files.mkdir("/kinds/thing/kept")
    box.files.write("/kinds/plain", b"kept")
    (tmp_path / "thing").write_text("a file")
    (tmp_path / "plain").mkdir()
    for name in ("thing", "plain"):
        with pytest.raises(HutchError):
            box.files.copy_in(tmp_path / name, "/kinds/")
        with pytest.raises(HutchError):
            box.files.copy_out(f"/kinds/{name}", tmp_path)
    assert box.files.stat("/kinds/thing/kept").name == "kept"
    assert box.files.read("/kinds/plain") == b"kept"
    assert (tmp_path / "thing").read_text() == "a file"
    assert (tmp_path / "plain").is_dir()


# ---- an instance that has changed things ----


@pytest.fixture(scope="module")
def changed(home: Engine, kind: str, shared: set[str]) -> Iterator[Instance]:
    """A running instance that has added, changed and deleted files."""
    script = (
        "echo new > /added; mkdir -p /dir/sub; echo deep > /dir/sub/file; chown 3:4 /dir/sub;"
        "echo changed >> /etc/passwd; rm /etc/group; ln -s added /link; touch /ready; sleep 1000"
    )
    with Maker(home, kind).start(script) as made:
        shared.add(made.id)
        while not made.files.exists("/ready"):
            assert made.info().pid
        yield made
        shared.remove(made.id)


def _expected(found: dict[str, str]) -> None:
    assert found["/added"] == found["/dir/sub/file"] == found["/link"] == "A"
    assert found["/etc/passwd"] == found["/etc"] == "C"
    assert found["/etc/group"] == "D"
    assert not {"/etc/hosts", "/etc/resolv.conf", "/proc", "/dev"} & set(found)


def test_diff_tells_what_was_added_changed_and_deleted(changed: Instance) -> None:
    _expected({change.path: change.kind for change in changed.diff()})


def test_export_is_the_whole_tree(changed: Instance) -> None:
    with tarfile.open(fileobj=io.BytesIO(b"".join(changed.export()))) as tar:
        names = {name.removeprefix("./").rstrip("/") for name in tar.getnames()}
        owner = next(m for m in tar.getmembers() if m.name.rstrip("/").endswith("dir/sub"))
        assert (owner.uid, owner.gid) == (3, 4)
    assert {"added", "dir/sub/file", "bin/busybox", "etc/passwd"} <= names
    assert "etc/group" not in names


def test_commit_makes_an_image_that_has_it(changed: Instance, make: Maker, kind: str) -> None:
    image = f"committed:{kind}"
    changed.commit(image, author="somebody", changes=["ENV SEASON=spring"])
    assert changed.exec(["true"]).exit_code == 0
    script = "cat /added /dir/sub/file; ls /etc/group; readlink /link; echo $SEASON"
    options = make.options({"network": "none"})
    done = make.engine.run(image, ["sh", "-c", script], **options)
    assert done.text.split() == ["new", "deep", "added", "spring"]
    assert b"No such file" in done.stderr
    make.engine.images.remove(image)


def test_a_stopped_instance_still_has_its_files(make: Maker, tmp_path: Path) -> None:
    with make.start("echo kept > /kept; rm /etc/group") as one:
        one.wait(timeout=DEADLINE_S)
        assert one.files.read("/kept") == b"kept\n"
        found = {change.path: change.kind for change in one.diff()}
        assert (found["/kept"], found["/etc/group"]) == ("A", "D")
        (tmp_path / "given").write_text("given\n")
        one.files.copy_in(tmp_path / "given", "/given")
        one.files.copy_out("/kept", tmp_path / "out")
        assert (tmp_path / "out").read_text() == "kept\n"
        one.files.write("/etc/motd", b"hello\n")
        one.restart(timeout=DEADLINE_S)
        one.wait(timeout=DEADLINE_S)
        assert one.files.read("/given") == b"given\n"
        assert one.files.read("/etc/motd") == b"hello\n"


@pytest.mark.parametrize("path", [5, None, b"/etc"])
def test_what_is_no_path_is_refused_by_name(box: Instance, path: object) -> None:
    files: Any = box.files
    for call in (files.read, files.list, files.stat, files.mkdir, files.remove):
        with pytest.raises(InvalidArgument, match="path: expected a path"):
            call(path)
    with pytest.raises(InvalidArgument, match="path: expected a path"):
        files.write(path, b"")
    with pytest.raises(InvalidArgument, match="data: expected bytes or text, got 5"):
        files.write("/x", 5)


def test_a_path_may_be_a_path_object(box: Instance) -> None:
    files: Any = box.files
    files.write(Path("/from-path"), b"x")
    assert files.read(Path("/from-path")) == b"x"
