"""Backups of volumes: whole, checked, in constant memory; and plain tars."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from hutch.engine import Engine
from hutch.errors import AlreadyExists, HutchError, IntegrityError, NotFound, Unavailable
from hutch.storage.volume_backup import BackupHead, pack_backup
from tests.requires import requires

MIB = 1 << 20


@pytest.fixture
def tree(hutch_root: Path) -> tuple[Engine, Path]:
    """A volume `data` with one of each kind of file."""
    engine = Engine(hutch_root)
    path = Path(engine.volumes.create("data", labels={"k": "v"}).path)
    path.chmod(0o2750)
    (path / "dir").mkdir()
    (path / "dir/f").write_text("text")
    os.setxattr(path / "dir/f", "user.colour", b"red")
    os.link(path / "dir/f", path / "link")
    (path / "sym").symlink_to("data/../../etc/passwd")
    os.mkfifo(path / "fifo")
    with open(path / "sparse", "wb") as file:
        file.truncate(64 * MIB)
        file.seek(32 * MIB)
        file.write(b"island")
    os.utime(path / "dir/f", ns=(1, 1_234_567_890_123_456_789))
    (path / ("n" * 200)).write_text("long")
    return engine, path


def _same(one: Path, other: Path) -> None:
    names = sorted(p.relative_to(one) for p in one.rglob("*"))
    assert names == sorted(p.relative_to(other) for p in other.rglob("*"))
    for name in [Path(), *names]:
        a, b = (one / name).lstat(), (other / name).lstat()
        assert (a.st_mode, a.st_uid, a.st_gid, a.st_nlink) == (
            b.st_mode,
            b.st_uid,
            b.st_gid,
            b.st_nlink,
        ), name
        if (one / name).is_file() and not (one / name).is_symlink():
            assert (a.st_size, a.st_mtime_ns) == (b.st_size, b.st_mtime_ns), name
            assert (one / name).read_bytes() == (other / name).read_bytes()


def test_a_restored_volume_is_the_one_that_was_backed_up(
    tree: tuple[Engine, Path], tmp_path: Path
) -> None:
    engine, path = tree
    with engine:
        engine.volumes.backup("data", tmp_path / "b.tar")
        assert os.stat(tmp_path / "b.tar").st_size < MIB
        with pytest.raises(AlreadyExists, match="data"):
            engine.volumes.restore(tmp_path / "b.tar")
        volume = engine.volumes.restore(tmp_path / "b.tar", "again")
        assert volume.labels == {"k": "v"}
        _same(path, Path(volume.path))
        found = Path(volume.path)
        assert os.getxattr(found / "dir/f", "user.colour") == b"red"
        assert (found / "dir/f").stat().st_ino == (found / "link").stat().st_ino
        assert (found / "sparse").stat().st_blocks * 512 < MIB
        assert os.readlink(found / "sym") == "data/../../etc/passwd"


def test_the_same_volume_gives_the_same_backup_and_any_tar_reads_it(
    tree: tuple[Engine, Path],
) -> None:
    engine, _ = tree
    with engine:
        one, other = io.BytesIO(), io.BytesIO()
        engine.volumes.backup("data", one)
        engine.volumes.backup("data", other)
        assert one.getvalue() == other.getvalue()
        with tarfile.open(fileobj=io.BytesIO(one.getvalue())) as tar:
            names = tar.getnames()
    assert names[0] == "hutch-volume.json" and names[-1] == "hutch-digest"
    assert "data/dir/f" in names


def test_a_changed_backup_is_refused_and_nothing_is_left(tree: tuple[Engine, Path]) -> None:
    engine, _ = tree
    with engine:
        whole = io.BytesIO()
        engine.volumes.backup("data", whole)
        good = whole.getvalue()
        at = good.index(b"island")
        damaged = {
            "changed": good[:at] + b"Island" + good[at + 6 :],
            "short": good[: len(good) // 2],
            "no digest": good[:-2048] + bytes(1024),
            "another end": good[:-2048] + good[-2048:].replace(b"sha256:", b"sha255:"),
            "more": good + b"x" * 512,
            "nothing": b"",
            "no tar": b"x" * 4096,
        }
        for what, data in damaged.items():
            with pytest.raises(IntegrityError):
                engine.volumes.restore(io.BytesIO(data), "again")
            assert [v.name for v in engine.volumes.list()] == ["data"], what
            assert not (engine.root / "volumes/again").exists(), what
        with pytest.raises(NotFound):
            engine.volumes.restore(engine.root / "missing", "again")
        with pytest.raises(NotFound):
            engine.volumes.backup("missing", io.BytesIO())


def test_a_hostile_backup_stays_inside(tree: tuple[Engine, Path], tmp_path: Path) -> None:
    engine, _ = tree
    with engine:
        good = io.BytesIO()
        engine.volumes.backup("data", good)
        for name in ("data/../../../evil", "../evil", "evil"):
            made = io.BytesIO()
            with tarfile.open(fileobj=made, mode="w") as tar:
                with tarfile.open(fileobj=io.BytesIO(good.getvalue())) as source:
                    head = source.next()
                    assert head is not None
                    tar.addfile(head, source.extractfile(head))
                entry = tarfile.TarInfo(name)
                entry.size = 4
                tar.addfile(entry, io.BytesIO(b"evil"))
            with pytest.raises(IntegrityError):
                engine.volumes.restore(io.BytesIO(made.getvalue()), "again")
        engine._context.trash.drain()
    # What is thrown away goes meanwhile: os.walk passes over it.
    places = [place for place, _, names in os.walk(tmp_path) if "evil" in names]
    assert not [place for place in places if "/volumes" in place or place == str(tmp_path)]


@pytest.mark.parametrize(
    "options",
    [
        {"type": "none", "o": "bind", "device": "/etc"},
        {"pool": "theirs"},
        {"encrypted": "true", "key-file": "/etc/hostname"},
    ],
)
def test_a_hostile_backup_names_nothing_of_the_host(
    tree: tuple[Engine, Path], options: dict[str, str]
) -> None:
    engine, path = tree
    made = b"".join(pack_backup(str(path), BackupHead(name="x", created_at=0.0, options=options)))
    with engine:
        volume = engine.volumes.restore(io.BytesIO(made), encrypted=False)
        assert volume.options == {} and volume.path == str(engine.root / "volumes/x/_data")
        _same(path, Path(volume.path))


class _Broken(io.RawIOBase):
    def read(self, size: int = -1, /) -> bytes:
        raise OSError(5, "Input/output error")


def test_a_stream_that_breaks_is_told(tree: tuple[Engine, Path]) -> None:
    engine, _ = tree
    with engine, pytest.raises(Unavailable, match="cannot be read"):
        engine.volumes.restore(_Broken(), "again")  # type: ignore[arg-type]


def test_a_file_that_cannot_be_written_is_told(tree: tuple[Engine, Path]) -> None:
    engine, _ = tree
    with engine, pytest.raises(HutchError, match="/dev/full"):
        engine.volumes.backup("data", "/dev/full")


@requires("root", "loop", "zstd")
@pytest.mark.integration
def test_a_compressed_backup_goes_into_a_volume_of_another_size(
    tree: tuple[Engine, Path],
) -> None:
    engine, path = tree
    with engine:
        whole = io.BytesIO()
        engine.volumes.backup("data", whole)
        packed = subprocess.run(
            ["zstd", "-q"], input=whole.getvalue(), capture_output=True, check=True
        ).stdout
        volume = engine.volumes.restore(io.BytesIO(packed), "sized", size="128M")
        _same(path, Path(volume.path))
        engine.volumes.backup("sized", io.BytesIO())  # frozen, and not for ever
        Path(volume.path, "more").write_text("x")
        with pytest.raises(HutchError, match="space"):
            Path(path, "big").write_bytes(os.urandom(80 * MIB))
            more = io.BytesIO()
            engine.volumes.backup("data", more)
            engine.volumes.restore(io.BytesIO(more.getvalue()), "small", size="64M")
        assert not (engine.root / "volumes/small").exists()
        engine.volumes.remove("sized")


@requires("root", "loop")
@pytest.mark.integration
def test_writers_go_on_after_a_backup_was_killed(hutch_root: Path) -> None:
    with Engine(hutch_root) as engine:
        path = Path(engine.volumes.create("sized", size="64M").path)
        (path / "f").write_bytes(os.urandom(8 * MIB))
        command = [sys.executable, "-m", "hutch", "--root", str(hutch_root)]
        backup = [*command, "volume", "backup", "sized"]
        with subprocess.Popen(backup, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(1)  # it has begun, and nobody reads on: the volume is frozen
            process.kill()
        writer = subprocess.Popen(["touch", str(path / "g")])
        try:
            engine.reconcile()
        finally:
            assert writer.wait(60) == 0
        (path / "h").write_text("goes on")
        engine.volumes.remove("sized")


def test_a_plain_tar_goes_out_and_in(tree: tuple[Engine, Path], tmp_path: Path) -> None:
    engine, path = tree
    with engine:
        engine.volumes.export("data", tmp_path / "t.tar")
        volume = engine.volumes.create("other")
        Path(volume.path, "kept").touch()
        engine.volumes.import_("other", tmp_path / "t.tar")
        assert Path(volume.path, "kept").exists()
        Path(volume.path, "kept").unlink()
        Path(volume.path).chmod(0o2750)
        _same(path, Path(volume.path))
        with pytest.raises(NotFound):
            engine.volumes.import_("missing", tmp_path / "t.tar")


def test_a_backup_takes_memory_that_does_not_grow_with_the_volume(hutch_root: Path) -> None:
    import tracemalloc

    with Engine(hutch_root) as engine:
        path = Path(engine.volumes.create("data").path)
        with open(path / "big", "wb") as file:
            for _ in range(64):
                file.write(os.urandom(MIB))
        tracemalloc.start()
        with open(os.devnull, "wb") as out:
            engine.volumes.backup("data", out)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most < 16 * MIB
