"""What bootstrap reads of the host's apt: places and keys, and never its passwords."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hutch.image.apt import (
    Source,
    acquire_options,
    distribution_of,
    load_sources,
    sources_for,
    without_credentials,
)

DEB822 = """\
Types: deb deb-src
# a comment
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
 -----END PGP PUBLIC KEY BLOCK-----

Types: deb
Enabled: no
URIs: http://mirror.example/off
Suites: bookworm
Components: main
"""


@pytest.fixture
def etc_apt(tmp_path: Path) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


def test_a_deb822_stanza_is_read(etc_apt: Path) -> None:
    (etc_apt / "sources.list.d/debian.sources").write_text(DEB822)
    main, security = load_sources(etc_apt)
    assert main.uri == "http://mirror.example/debian"
    assert main.suites == ("bookworm", "bookworm-updates")
    assert main.components == ("main", "contrib")
    assert main.signed_by == "/usr/share/keyrings/debian-archive-keyring.gpg"
    assert security.signed_by == ""


def test_a_line_is_read_with_its_options(etc_apt: Path) -> None:
    (etc_apt / "sources.list").write_text(
        "# deb http://no.example/ x main\n"
        "deb-src http://mirror.example/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/k.gpg trusted=yes] http://mirror.example/debian sid main\n"
    )
    (source,) = load_sources(etc_apt)
    assert source.suites == ("sid",)
    assert source.signed_by == "/k.gpg"
    assert source.trusted


def test_no_apt_is_no_sources(tmp_path: Path) -> None:
    assert load_sources(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("suite", "components", "distribution"),
    [
        ("bookworm", ("main",), "debian"),
        ("bookworm-security", ("main",), "debian"),
        ("trixie-backports", ("main",), "debian"),
        ("noble", ("main", "universe"), "ubuntu"),
        ("bookworm", ("stable",), ""),
        ("bookworm-pgdg", ("main",), ""),
        ("nodistro", ("main",), ""),
    ],
)
def test_an_archive_is_told_by_its_suite(
    suite: str, components: tuple[str, ...], distribution: str
) -> None:
    source = Source(uri="http://mirror.example/x", suites=(suite,), components=components)
    assert distribution_of(source) == distribution


def test_another_suite_comes_from_the_same_places(etc_apt: Path) -> None:
    (etc_apt / "sources.list.d/debian.sources").write_text(DEB822)
    main, security = sources_for("debian", "trixie", load_sources(etc_apt))
    assert main.suites == ("trixie", "trixie-updates")
    assert main.components == ("main",)
    assert security.suites == ("trixie-security",)
    assert security.uri.endswith("/debian-security")


def test_the_unstable_suite_has_no_updates(etc_apt: Path) -> None:
    (etc_apt / "sources.list.d/debian.sources").write_text(DEB822)
    (main,) = sources_for("debian", "sid", load_sources(etc_apt))
    assert main.suites == ("sid",)


def test_a_distribution_the_host_does_not_know_has_no_place(etc_apt: Path) -> None:
    (etc_apt / "sources.list.d/debian.sources").write_text(DEB822)
    assert sources_for("ubuntu", "noble", load_sources(etc_apt)) == []


@pytest.mark.parametrize(
    ("uri", "clean"),
    [
        ("http://mirror.example/debian", "http://mirror.example/debian"),
        ("https://me:secret@mirror.example:8443/x", "https://mirror.example:8443/x"),
        ("https://token@mirror.example/x?y=1", "https://mirror.example/x?y=1"),
        ("file:///srv/mirror", "file:///srv/mirror"),
    ],
)
def test_credentials_are_taken_out_of_a_uri(uri: str, clean: str) -> None:
    assert without_credentials(uri) == clean


def test_only_the_way_to_the_mirror_is_taken_from_apts_configuration(tmp_path: Path) -> None:
    dump = (
        'APT::Architecture "amd64";\n'
        'Acquire::http::Proxy "http://proxy.example:3128";\n'
        'Acquire::https::CaInfo "/etc/ssl/own.pem";\n'
        'Acquire::Retries "3";\n'
        'Acquire::cdrom "";\n'
        'DPkg::Post-Invoke:: "rm -f /var/cache/apt/*.bin";\n'
    )
    assert acquire_options(dump, tmp_path) == [
        'Acquire::http::Proxy "http://proxy.example:3128";',
        'Acquire::https::CaInfo "/etc/ssl/own.pem";',
        'Acquire::Retries "3";',
    ]


def test_passwords_are_pointed_at_and_not_copied(tmp_path: Path) -> None:
    (tmp_path / "auth.conf").write_text("machine mirror.example login me password secret\n")
    (line,) = acquire_options("", tmp_path)
    assert "secret" not in line
    assert str(tmp_path / "auth.conf") in line


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=300))
@example("no colon\n continued")
def test_no_sources_file_breaks_the_reader(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "sources.list.d").mkdir()
        (Path(directory) / "sources.list.d/a.sources").write_text(text)
        (Path(directory) / "sources.list.d/b.list").write_text(text)
        for source in load_sources(Path(directory)):
            distribution_of(source)
            list(source.lines())
