"""Finding the host's virtiofsd and telling the two programs of that name apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from hutch.errors import Unsupported
from hutch.host import virtiofsd


@pytest.mark.parametrize(("content", "flavor"), [(b"..shared-dir..", "rust"), (b"-o source", "c")])
def test_a_program_is_told_by_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, flavor: str
) -> None:
    program = tmp_path / "virtiofsd"
    program.write_bytes(content)
    program.chmod(0o755)
    monkeypatch.setattr(virtiofsd, "_PLACES", (str(program),))
    found = virtiofsd.find_virtiofsd()
    assert (found.path, found.flavor) == (str(program), flavor)


def test_a_host_without_one_is_told_which_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtiofsd, "_PLACES", ())
    monkeypatch.setattr(virtiofsd, "find_program", lambda name: None)
    with pytest.raises(Unsupported, match="virtiofsd") as caught:
        virtiofsd.find_virtiofsd()
    assert "apt-get install" in (caught.value.hint or "")
