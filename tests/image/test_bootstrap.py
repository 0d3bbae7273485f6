"""Base images made on this host: what is in them, that they are the same each time, and errors."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.errors import InvalidArgument, Unavailable, Unsupported
from hutch.image import bootstrap, busybox
from hutch.image.bootstrap import bootstrap_tar, parse_base
from tests.requires import requires
from tests.rootless.conftest import installed_with_range


@pytest.mark.parametrize(
    "what",
    ["", "debian", "debian:", "debian:Book Worm", "fedora:40", "debian:../x", "busybox:1.36"],
)
def test_a_request_that_names_no_suite_is_refused(what: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_base(what)


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("variant", "huge", "variant"),
        ("packages", ["--option"], "packages[0]"),
        ("packages", ["python3", "a b"], "packages[1]"),
        ("mirror", "no-uri", "mirror"),
        ("keyring", "/no/such/keyring", "keyring"),
    ],
)
def test_a_bad_option_is_named(option: str, value: object, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_base("debian:bookworm", **{option: value})  # type: ignore[arg-type]
    assert caught.value.field == field


def entries(tar: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(tar) as archive:
        return {e.name.removeprefix("./"): e for e in archive.getmembers()}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    path = tmp_path / "workspace"
    path.mkdir()
    return path


def save(what: str, workspace: Path, target: Path, **options: str) -> Path:
    with bootstrap_tar(parse_base(what, **options), workspace) as tar:
        target.write_bytes(tar.read())
    return target


@requires("busybox")
def test_busybox_has_its_applets_and_the_usual_files(workspace: Path, tmp_path: Path) -> None:
    found = entries(save("busybox", workspace, tmp_path / "out.tar"))
    assert found["bin/busybox"].mode & stat.S_IXOTH
    assert found["bin/sh"].issym()
    assert found["usr/bin/env"].linkname == "/bin/busybox"
    assert found["tmp"].mode == 0o1777
    assert {"etc/passwd", "etc/group", "etc/nsswitch.conf", "proc", "dev", "root"} <= set(found)


@requires("busybox")
def test_busybox_is_the_same_each_time(tmp_path: Path) -> None:
    digests = set()
    for number in range(2):
        (tmp_path / f"w{number}").mkdir()
        tar = save("busybox", tmp_path / f"w{number}", tmp_path / f"{number}.tar")
        digests.add(hashlib.sha256(tar.read_bytes()).hexdigest())
    assert len(digests) == 1


@requires("busybox")
def test_the_callers_epoch_is_used(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1234567890")
    found = entries(save("busybox", workspace, tmp_path / "out.tar"))
    assert {int(e.mtime) for e in found.values()} == {1234567890}


@requires("busybox")
def test_a_static_program_is_told_from_one_that_needs_a_loader(tmp_path: Path) -> None:
    assert busybox.is_static(busybox.busybox_program(tmp_path))
    assert not busybox.is_static(Path(os.path.realpath("/bin/ls")))
    (tmp_path / "text").write_text("#!/bin/sh\n")
    assert not busybox.is_static(tmp_path / "text")


@requires("root", "apt-mirror")
def test_a_host_without_busybox_gets_it_from_its_mirror(workspace: Path) -> None:
    assert busybox.is_static(busybox.fetch_busybox(workspace))


def test_without_mmdebstrap_the_cure_is_named(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hutch.host.programs.find_program", lambda name: None)
    with (
        pytest.raises(Unsupported) as caught,
        bootstrap_tar(parse_base("debian:bookworm"), workspace),
    ):
        pass
    assert "apt-get install mmdebstrap" in (caught.value.hint or "")


@pytest.mark.integration
@requires("root", "mmdebstrap", "apt-mirror")
def test_a_suite_that_does_not_exist_is_reported_and_leaves_nothing(
    workspace: Path, tmp_path: Path
) -> None:
    base = parse_base("debian:nosuchsuite")
    with pytest.raises(Unavailable) as caught, bootstrap_tar(base, workspace, epoch=1):
        pass
    assert "nosuchsuite" in str(caught.value)
    assert not list((workspace / "build").iterdir())


AS_USER = """
import pathlib, shutil, tempfile
from hutch.image.bootstrap import bootstrap_tar, parse_base
work = pathlib.Path(tempfile.mkdtemp(dir=pathlib.Path.home()))
with bootstrap_tar(parse_base("debian:bookworm", variant="essential"), work) as tar:
    with open(work / "made.tar", "wb") as made:
        shutil.copyfileobj(tar, made)
print(work / "made.tar")
"""


@pytest.fixture(scope="module")
def essential(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """The smallest Debian, made by root and by an ordinary user, whose directory is private."""
    base = tmp_path_factory.mktemp("essential")
    (base / "work").mkdir()
    tars = [save("debian:bookworm", base / "work", base / "root.tar", variant="essential")]
    with installed_with_range(base, timeout_s=3600) as python:
        done = python("-c", AS_USER)
        assert done.returncode == 0, done.stderr
        tars.append(Path(shutil.move(done.stdout.strip(), base / "user.tar")))
    yield tars
    for tar in tars:
        tar.unlink()


@pytest.mark.slow
@pytest.mark.timeout(900)  # two whole bootstraps before the first of them
@requires("root", "userns", "mmdebstrap", "newuidmap", "apt-mirror")
class TestDebian:
    def test_it_is_the_same_each_time_whoever_makes_it(self, essential: list[Path]) -> None:
        first, second = (hashlib.sha256(p.read_bytes()).hexdigest() for p in essential)
        assert first == second

    def test_it_has_what_a_base_image_needs(self, essential: list[Path]) -> None:
        found = entries(essential[0])
        assert {"etc/passwd", "usr/bin/bash", "usr/bin/dpkg", "dev", "proc", "tmp"} <= set(found)

    def test_nothing_of_the_host_is_in_it(self, essential: list[Path]) -> None:
        found = entries(essential[0])
        assert not {"etc/hostname", "etc/resolv.conf"} & set(found)
        assert "etc/apt/apt.conf.d/99mmdebstrap" not in found
        assert not [name for name in found if name.endswith("hutch.list")]

    def test_it_holds_no_device_nodes(self, essential: list[Path]) -> None:
        assert not [e.name for e in entries(essential[0]).values() if e.isdev()]


def test_the_metadata_of_a_base_image_names_no_mirror() -> None:
    base = parse_base("debian:bookworm", mirror="http://me:secret@mirror.example/debian")
    assert "mirror" not in repr(base.config)
    assert "mirror" not in base.reference


def test_a_mirrors_password_stays_out_of_the_image(workspace: Path) -> None:
    base = parse_base("debian:bookworm", mirror="http://me:secret@mirror.example/debian")
    sources = bootstrap._sources(base)
    arguments = bootstrap._mmdebstrap("mmdebstrap", base, sources, workspace)
    assert "secret" not in " ".join(arguments)
    assert "secret" not in (workspace / "clean.list").read_text()
    assert stat.S_IMODE((workspace / "hutch.list").stat().st_mode) == 0o600
