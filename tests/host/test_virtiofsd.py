"""Finding the host's virtiofsd and telling the two programs of that name apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from hutch.errors import Unsupported
from hutch.host import virtiofsd


@pytest.fixture(autouse=True)
def not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HUTCH_VIRTIOFSD", raising=False)


@pytest.mark.parametrize(
    ("content", "flavor", "moves"),
    [
        (b"..shared-dir..", "rust", False),
        (b"shared-dir migration-mode", "rust", True),
        (b"-o source", "c", False),
    ],
)
def test_a_program_is_told_by_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, flavor: str, moves: bool
) -> None:
    program = tmp_path / "virtiofsd"
    program.write_bytes(content)
    program.chmod(0o755)
    monkeypatch.setattr(virtiofsd, "_PLACES", (str(program),))
    found = virtiofsd.find_virtiofsd()
    assert (found.path, found.flavor, found.moves) == (str(program), flavor, moves)


def test_one_that_is_named_comes_before_the_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "another"
    program.write_bytes(b"shared-dir")
    program.chmod(0o755)
    monkeypatch.setenv("HUTCH_VIRTIOFSD", str(program))
    assert virtiofsd.find_virtiofsd().path == str(program)
    monkeypatch.setenv("HUTCH_VIRTIOFSD", str(tmp_path / "none"))
    with pytest.raises(Unsupported, match="virtiofsd"):
        virtiofsd.find_virtiofsd()


def test_a_host_without_one_is_told_which_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtiofsd, "_PLACES", ())
    monkeypatch.setattr(virtiofsd, "find_program", lambda name: None)
    with pytest.raises(Unsupported, match="virtiofsd") as caught:
        virtiofsd.find_virtiofsd()
    assert "apt-get install" in (caught.value.hint or "")
