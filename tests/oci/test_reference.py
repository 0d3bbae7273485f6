"""References: Docker's grammar, its defaults, and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hutch.errors import InvalidArgument
from hutch.oci.reference import Reference, is_hex, parse

A = "sha256:" + "a" * 64
B = "sha512:" + "b" * 128


@pytest.mark.parametrize(
    ("text", "canonical", "familiar"),
    [
        ("debian", "docker.io/library/debian:latest", "debian:latest"),
        ("debian:12", "docker.io/library/debian:12", "debian:12"),
        ("library/debian", "docker.io/library/debian:latest", "debian:latest"),
        ("docker.io/debian", "docker.io/library/debian:latest", "debian:latest"),
        ("index.docker.io/debian", "docker.io/library/debian:latest", "debian:latest"),
        ("user/tool", "docker.io/user/tool:latest", "user/tool:latest"),
        ("docker.io/user/tool", "docker.io/user/tool:latest", "user/tool:latest"),
        ("ghcr.io/x/y:t", "ghcr.io/x/y:t", "ghcr.io/x/y:t"),
        (f"ghcr.io/x/y:t@{A}", f"ghcr.io/x/y:t@{A}", f"ghcr.io/x/y:t@{A}"),
        (f"debian@{A}", f"docker.io/library/debian@{A}", f"debian@{A}"),
        (f"debian@{B}", f"docker.io/library/debian@{B}", f"debian@{B}"),
        ("localhost/x", "localhost/x:latest", "localhost/x:latest"),
        ("localhost:5000/x", "localhost:5000/x:latest", "localhost:5000/x:latest"),
        ("127.0.0.1:5000/a/b:c", "127.0.0.1:5000/a/b:c", "127.0.0.1:5000/a/b:c"),
        ("[::1]/x", "[::1]/x:latest", "[::1]/x:latest"),
        ("[fe80::1]:5000/x:t", "[fe80::1]:5000/x:t", "[fe80::1]:5000/x:t"),
        ("EXAMPLE/x", "EXAMPLE/x:latest", "EXAMPLE/x:latest"),
        ("a.b", "docker.io/library/a.b:latest", "a.b:latest"),
        ("docker.io/a.b/c", "docker.io/a.b/c:latest", "docker.io/a.b/c:latest"),
        ("a__b/c---d:V_1.-x", "docker.io/a__b/c---d:V_1.-x", "a__b/c---d:V_1.-x"),
        ("x:" + "t" * 128, "docker.io/library/x:" + "t" * 128, "x:" + "t" * 128),
        ("deadbeef", "docker.io/library/deadbeef:latest", "deadbeef:latest"),
    ],
)
def test_a_reference_has_dockers_defaults(text: str, canonical: str, familiar: str) -> None:
    reference = parse(text)
    assert reference.canonical() == canonical
    assert reference.familiar() == str(reference) == familiar
    assert parse(familiar) == parse(canonical) == reference


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "debian ",
        "Debian",
        "a/B",
        ":tag",
        "x:",
        "x:-t",
        "x:.t",
        "x:t/",
        "x@",
        "x@sha256:",
        "x@sha256:" + "a" * 63,
        "x@sha256:" + "A" * 64,
        "x@md5:" + "a" * 32,
        f"x@{A}@{A}",
        f"@{A}",
        "x:" + "t" * 129,
        "a" * 300,
        "a/" * 200 + "a",
        "a" * 2000,
        "f" * 64,
        "a//b",
        "/a",
        "a/",
        "a..b",
        "a___b",
        "a._b",
        "-a",
        "a-",
        "a.",
        "http://x/y",
        "x.com:99999/y",
        "x.com:/y",
        "x.com:12a/y",
        "-x.com/y",
        "x-.com/y",
        "x..com/y",
        "[::1/x",
        "[zz]/x",
        "[::1]x/y",
        "[]/x",
        "x\0y",
        "x\ny",
        "é",
        "x:é",
        "host.é/x",
        "²/x",
        "x.com:²/y",
    ],
)
def test_what_is_no_reference_is_refused_by_its_field(text: str) -> None:
    with pytest.raises(InvalidArgument) as failure:
        parse(text, field="thing")
    assert failure.value.field == "thing"


def test_upper_case_has_a_cure() -> None:
    with pytest.raises(InvalidArgument) as failure:
        parse("Debian:12")
    assert "debian" in str(failure.value.hint)


@pytest.mark.parametrize("scheme", ["http", "https", "docker", "oci"])
def test_an_address_has_a_cure(scheme: str) -> None:
    with pytest.raises(InvalidArgument, match="is an address") as failure:
        parse(f"{scheme}://registry.lan:5000/x:1")
    assert failure.value.hint == f"leave out {scheme}://, as in registry.lan:5000/x:1"


def test_something_else_than_text_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="expected a reference, got int"):
        parse(5)  # type: ignore[arg-type]


def test_another_tag_or_digest_of_the_same_repository() -> None:
    reference = parse("ghcr.io/x/y:one")
    assert reference.with_tag("two").canonical() == "ghcr.io/x/y:two"
    assert reference.with_digest(A).canonical() == f"ghcr.io/x/y@{A}"
    assert reference.with_digest(A).target == A
    assert parse(f"x:t@{A}").target == A
    with pytest.raises(InvalidArgument):
        reference.with_tag("no tag")
    with pytest.raises(InvalidArgument):
        reference.with_digest("sha256:no")


@pytest.mark.parametrize(("text", "expected"), [("", False), ("0f", True), ("0F", False)])
def test_hexadecimal_digits(text: str, expected: bool) -> None:
    assert is_hex(text) is expected


_likely = st.text(st.sampled_from("ab0AZ._-:/@[]sha256fé \0"), max_size=80)


@given(st.text(max_size=200) | _likely)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        reference = parse(text)
    except InvalidArgument:
        return
    assert parse(reference.canonical()) == reference
    assert parse(reference.familiar()) == reference
    assert len(reference.name) <= 255


_component = st.from_regex(r"[a-z0-9]{1,8}((\.|_|__|-{1,3})[a-z0-9]{1,8}){0,2}", fullmatch=True)
_domain = st.from_regex(r"[a-z0-9]{1,5}\.[a-z]{2,3}(:[1-9][0-9]{0,3})?", fullmatch=True)
_tag = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)


@given(
    _domain | st.just("localhost"),
    st.lists(_component, min_size=1, max_size=4),
    st.none() | _tag,
    st.none() | st.just(A),
)
def test_every_reference_of_the_grammar_is_read(
    domain: str, path: list[str], tag: str | None, digest: str | None
) -> None:
    name = "/".join(path)
    text = f"{domain}/{name}" + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
    expected = tag if tag or digest else "latest"
    assert parse(text) == Reference(domain=domain, path=name, tag=expected, digest=digest)


def test_a_start_imports_nothing_heavy_for_it() -> None:
    heavy = {"re", "hashlib", "json", "ssl", "socket", "urllib3", "dataclasses", "ipaddress"}
    code = (
        "import sys, msgspec, hutch.errors; before = set(sys.modules);"
        "import hutch.oci.reference, hutch.image.catalog;"
        "print(*(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import sys; sys.path = " + repr(sys.path) + ";" + code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert heavy.isdisjoint(done.stdout.split())
