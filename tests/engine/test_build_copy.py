"""COPY and ADD: what goes where, as whose, and never from outside."""

from __future__ import annotations

import errno
import gzip
import http.server
import io
import os
import socket
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.dockerfile import SourceError
from hutch.engine import Engine
from hutch.engine.builder import fetching
from hutch.errors import (
    Exhausted,
    HutchError,
    IntegrityError,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from tests.engine.building import Builder, context
from tests.requires import requires

pytestmark = [requires("root", "overlayfs"), pytest.mark.integration]

FILES: dict[str, str | bytes | None] = {
    "a": "A",
    "b.txt": "B",
    "dir": None,
    "dir/x": "X",
    "dir/sub": None,
    "dir/sub/y": "Y",
    "dir/sub/z.md": "Z",
    "link": "-> dir/x",
    "dirlink": "-> dir",
}


@pytest.fixture
def build(engine: Engine) -> Builder:
    return Builder(engine)


COPIES = [
    ("COPY a /", {"a"}),
    ("COPY a /b", {"b"}),
    ("COPY a /d/", {"d", "d/a"}),
    ("COPY a d/e/", {"d", "d/e", "d/e/a"}),
    ("COPY a b.txt /d/", {"d", "d/a", "d/b.txt"}),
    ("COPY *.txt /d/", {"d", "d/b.txt"}),
    ("COPY [ab]* /d/", {"d", "d/a", "d/b.txt"}),
    ("COPY dir /d", {"d", "d/x", "d/sub", "d/sub/y", "d/sub/z.md"}),
    ("COPY dir/ /d/", {"d", "d/x", "d/sub", "d/sub/y", "d/sub/z.md"}),
    ("COPY dir/s* /d/", {"d", "d/y", "d/z.md"}),
    ("COPY . /d", {"d", "d/a", "d/b.txt", "d/dir", "d/dir/x", "d/dir/sub", "d/dir/sub/y",
                   "d/dir/sub/z.md", "d/link", "d/dirlink", "d/Dockerfile"}),
    ("COPY link /d", {"d"}),
    ("COPY dirlink/x /d", {"d"}),
    ("COPY dirlink /d", {"d", "d/x", "d/sub", "d/sub/y", "d/sub/z.md"}),
    ("COPY ./dir/../a /d", {"d"}),
    ("COPY ../../a /d", {"d"}),
    ("COPY --exclude=sub dir /d", {"d", "d/x"}),
    ("COPY --exclude=**/*.md --exclude=x dir /d", {"d", "d/sub", "d/sub/y"}),
    ("COPY --parents dir/sub/y /d/", {"d", "d/dir", "d/dir/sub", "d/dir/sub/y"}),
    ("COPY --parents dir/./sub/y /d/", {"d", "d/sub", "d/sub/y"}),
    ("COPY --parents **/*.md /d/", {"d", "d/dir", "d/dir/sub", "d/dir/sub/z.md"}),
    ("WORKDIR /w\nCOPY a b.txt .", {"w", "w/a", "w/b.txt"}),
    ("WORKDIR /w\nCOPY a sub/", {"w", "w/sub", "w/sub/a"}),
    ("ENV X=dir\nCOPY $X/x ${X}/", {"dir", "dir/x"}),
    ('COPY ["a", "/with space"]', {"with space"}),
    ("COPY <<one <<two /d/\n1\none\n2\ntwo", {"d", "d/one", "d/two"}),
    ("COPY --link a /d/", {"d", "d/a"}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), COPIES, ids=[text for text, _ in COPIES])
def test_files_go_where_docker_puts_them(build: Builder, text: str, wanted: set[str]) -> None:
    assert set(build.tree(f"FROM scratch\n{text}\n", FILES)) == wanted


REFUSED = [
    ("COPY nope /", "nope: not found"),
    ("COPY *.nope /", "no source files match"),
    ("COPY a b.txt /d", "must end with '/'"),
    ("COPY a /d\nCOPY b.txt /d/", "is not a directory in the image"),
    ("COPY dir /d\nCOPY b.txt /e/d\nCOPY e /", "e: not found"),
    ("COPY a /d/sub\nCOPY dir /d", "cannot copy a directory to /d/sub"),
    ("COPY dir/x /d/dir\nCOPY dir /d/x/\nCOPY a /d/x/sub\nCOPY dir /d", "to /d/x"),
    ("COPY --chown=nobody a /", "no user 'nobody'"),
    ("COPY --chmod=rwx a /", "--chmod: cannot read"),
    ("COPY --from=no.such.host.invalid/x:1 a /", "no.such.host.invalid"),
    ("ENV e=\nCOPY a $e", "a path is empty"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[text for text, _ in REFUSED])
def test_what_cannot_be_copied_is_refused_at_its_line(
    build: Builder, text: str, message: str
) -> None:
    with pytest.raises(HutchError) as caught:
        build.tree(f"FROM scratch\n{text}\n", FILES)
    assert message in caught.value.message
    assert ">>>" in str(getattr(caught.value, "excerpt", ""))


def test_a_linked_layer_has_the_owner_that_its_own_image_knows(build: Builder) -> None:
    text = (
        "FROM scratch\nCOPY <<passwd /etc/\nme:x:{n}:{n}::/:\npasswd\nCOPY --link --chown=me a /f\n"
    )
    assert [build.tree(text.format(n=n), FILES)["f"].uid for n in (7, 8)] == [7, 8]


def test_owners_modes_and_times(build: Builder) -> None:
    found = build.tree(
        "FROM scratch\nCOPY <<passwd <<group /etc/\nme:x:7:8::/:\npasswd\nus:x:9:\ngroup\n"
        "COPY a /plain\nCOPY --chown=3 --chmod=0601 a /numbers\nCOPY --chown=me a /named\n"
        "COPY --chown=me:us --chmod=go-r,u+x dir /tree/\nCOPY --chown=5:6 a /made/a\n",
        FILES,
    )
    told = {n: (e.uid, e.gid, e.mode, int(e.mtime)) for n, e in found.items()}
    assert told["plain"] == (0, 0, 0o644, 1_000_000_000)
    assert told["numbers"][:3] == (3, 3, 0o601)
    assert told["named"][:3] == (7, 8, 0o644)
    assert told["tree/x"][:3] == (7, 9, 0o700)
    assert told["tree"][:3] == (7, 9, 0o755)  # made for what is copied into it
    assert told["made"][:3] == (5, 6, 0o755)


def test_a_directory_that_is_there_keeps_its_attributes(build: Builder) -> None:
    found = build.tree(
        "FROM scratch AS one\nCOPY --chown=1:2 --chmod=701 --parents dir /\n"
        "FROM one\nCOPY dir /dir\nCOPY a /dir/\n",
        FILES,
    )
    assert (found["dir"].uid, found["dir"].gid, found["dir"].mode) == (1, 2, 0o701)
    assert (found["dir/x"].uid, found["dir/x"].mode) == (0, 0o644)


def test_a_link_in_the_image_is_followed_inside_it(build: Builder) -> None:
    files = {
        **FILES,
        "l/real/keep": "",
        "l/bin": "-> real",
        "l/in": "-> /real",
        "l/up": "-> ../../../real",
        "l/gone": "-> ../../../nowhere",
    }
    found = build.tree("FROM scratch\nCOPY l /\nCOPY a /bin/\nCOPY a /in/f\nCOPY a /up/g\n", files)
    assert {"real/a", "real/f", "real/g"} <= set(found)
    assert "nowhere/a" in build.tree("FROM scratch\nCOPY l /\nCOPY a /gone/\n", files)


def test_links_of_the_context_do_not_lead_out_of_it(build: Builder, tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_text("secret")
    place = tmp_path / "context"
    place.mkdir()
    (place / "absolute").symlink_to(outside)
    (place / "relative").symlink_to("../secret")
    (place / "up").symlink_to("..")
    for source in ("absolute", "relative", "up/secret", "../secret", f"{outside}"):
        with pytest.raises(NotFound):
            build.build(place, dockerfile_data=f"FROM scratch\nCOPY {source} /x\n".encode())
    # Below what is named a link is copied as what it is.
    (place / "d").mkdir()
    (place / "d" / "l").symlink_to(outside)
    build.build(place, dockerfile_data=b"FROM scratch\nCOPY d /x\n", tags=["links:1"])
    (layer,) = build.layers("links:1")
    assert os.readlink(layer / "x" / "l") == str(outside)
    build.engine.images.remove("links:1")


def test_links_of_a_stage_do_not_lead_out_of_it(build: Builder) -> None:
    files = {"evil": "-> /etc/passwd", "up": "-> ../../../../../etc", "a": "A"}
    for source in ("evil", "up/passwd", "../../etc/passwd"):
        with pytest.raises(NotFound):
            build.tree(
                f"FROM scratch AS one\nCOPY . /\nFROM scratch\nCOPY --from=one {source} /x\n", files
            )


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/../out"])
def test_a_context_that_leaves_its_root_is_refused(build: Builder, name: str) -> None:
    data = context({"Dockerfile": "FROM scratch\nCOPY . /\n", name: "x"})
    with pytest.raises(IntegrityError, match="leaves the root"):
        build.build(data)


def test_a_context_through_a_link_stays_inside(build: Builder, tmp_path: Path) -> None:
    data = context({"Dockerfile": "FROM scratch\nCOPY . /\n", "l": f"-> {tmp_path}", "l/file": "x"})
    with pytest.raises(HutchError):
        build.build(data)
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_leads_nowhere_is_followed_where_a_file_goes(build: Builder) -> None:
    found = build.tree(
        "FROM busybox AS s\nRUN mkdir /x && ln -s ../new/file /x/l && ln -s /loop /loop\n"
        "FROM s\nCOPY a /x/l\nCOPY a /loop\n",
        FILES,
        network="none",
    )
    assert found["x/l"].issym() and found["new/file"].isreg() and found["loop"].isreg()


def test_files_that_are_named_apart_are_no_links_of_one_another(build: Builder) -> None:
    found = build.tree(
        "FROM busybox AS s\nRUN mkdir /x && echo 1 > /x/a && ln /x/a /x/b\n"
        "FROM scratch\nCOPY --from=s /x/* /apart/\nCOPY --from=s /x /whole\n",
        network="none",
    )
    assert [found[f"apart/{name}"].islnk() for name in "ab"] == [False, False]
    assert sorted(found[f"whole/{name}"].islnk() for name in "ab") == [False, True]


def test_pipes_and_devices_are_copied_and_sockets_left_out(build: Builder, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "d" / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"{tmp_path}/d/socket")
    (tmp_path / "Dockerfile").write_text(
        "FROM busybox AS s\nRUN mkdir /s && mknod -m 640 /s/null c 1 3\n"
        "FROM scratch\nCOPY d /d\nCOPY --from=s /s /s\n"
    )
    build.build(tmp_path, outputs=["-"], stream=(out := io.BytesIO()), network="none")
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive:
        found = {entry.name.strip("./"): entry for entry in archive}
    assert found["d/pipe"].isfifo() and "d/socket" not in found
    null = found["s/null"]
    assert null.ischr() and (null.devmajor, null.devminor, null.mode) == (1, 3, 0o640)


def test_ignored_files_are_not_there(build: Builder) -> None:
    files = {**FILES, ".dockerignore": "dir/**\n!dir/sub/y\n*.txt\n.dockerignore\nDockerfile\n"}
    found = build.tree("FROM scratch\nCOPY . /d\n", files)
    assert set(found) == {"d", "d/a", "d/dir/sub/y", "d/dir/sub", "d/dir", "d/link", "d/dirlink"}
    for source in ("b.txt", "dir/x"):
        with pytest.raises(NotFound):
            build.tree(f"FROM scratch\nCOPY {source} /d\n", files)


def test_an_ignored_directory_of_which_something_is_kept_is_as_it_was(
    build: Builder, tmp_path: Path
) -> None:
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "keep").write_text("k")
    (tmp_path / "out" / "other").write_text("o")
    (tmp_path / "outer").mkdir()
    (tmp_path / "out").chmod(0o2750)
    (tmp_path / "out" / "deep").chmod(0o700)
    (tmp_path / ".dockerignore").write_text("out*\n!out/deep/keep\n!outer/keep\n")
    (tmp_path / "Dockerfile").write_text(
        "FROM scratch\nCOPY . /d/\nCOPY out* /w/\nCOPY --link out /x"
    )
    out = io.BytesIO()
    build.build(tmp_path, outputs=["-"], stream=out)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive:
        found = {e.name.strip("./"): (e.mode, e.uid) for e in archive}
    assert found["d/out"] == (0o2750, 0) and found["d/out/deep"] == (0o700, 0)
    assert {"d/out/deep/keep", "w/deep/keep", "x/deep/keep"} <= set(found)
    assert not {"d/outer", "d/out/other", "w/other"} & set(found)
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY outer /x")
    with pytest.raises(NotFound, match="outer: not found"):
        build.build(tmp_path, outputs=["-"], stream=io.BytesIO())


def test_a_dockerfile_has_an_ignore_file_of_its_own(build: Builder) -> None:
    files = {
        **FILES,
        "sub/My.Dockerfile": "FROM scratch\nCOPY . /d\n",
        "sub/My.Dockerfile.dockerignore": "*\n!a\n",
        ".dockerignore": "a\n",
    }
    out = io.BytesIO()
    build.build(context(files), dockerfile="sub/My.Dockerfile", outputs=["-"], stream=out)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive:
        assert {name.removeprefix("./") for name in archive.getnames()} == {".", "d", "d/a"}


@pytest.mark.parametrize("compress", [lambda data: data, gzip.compress], ids=["plain", "gzip"])
def test_a_context_may_be_compressed_or_a_file(
    build: Builder, tmp_path: Path, compress: object
) -> None:
    assert callable(compress)
    data = compress(context({"Dockerfile": "FROM scratch\nCOPY a /\n", "a": "A"}))
    assert build.build(io.BytesIO(data))
    path = tmp_path / "context.tar"
    path.write_bytes(data)
    assert build.build(path)


def test_a_dockerfile_alone_is_a_context(build: Builder) -> None:
    assert build.build(b"FROM scratch\nLABEL a=b\n")
    with pytest.raises(NotFound):
        build.build(b"FROM scratch\nCOPY a /\n")
    with pytest.raises(InvalidArgument, match="is empty"):
        build.build(b"")


# ---- ADD ----------------------------------------------------------------------------------


def _archive(mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        entry = tarfile.TarInfo("in/side")
        entry.uid, entry.gid, entry.mode, entry.size = 3, 4, 0o640, 2
        archive.addfile(entry, io.BytesIO(b"hi"))
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_add_unpacks_archives_and_keeps_their_owners(build: Builder, mode: str) -> None:
    files: dict[str, str | bytes | None] = {"x.tar": _archive(mode), "no.tar": "not a tar"}
    found = build.tree(
        "FROM scratch\nADD x.tar /d/\nADD no.tar /e/\nCOPY x.tar /f/\n"
        "ADD --unpack=false x.tar /g/\nADD --chown=8:9 x.tar /h/\n",
        files,
    )
    assert {"d/in/side", "e/no.tar", "f/x.tar", "g/x.tar"} <= set(found)
    side = found["d/in/side"]
    assert (side.uid, side.gid, side.mode) == (3, 4, 0o640)
    assert found["h/in/side"].uid == 8


def test_an_archive_cannot_write_outside(build: Builder) -> None:
    with pytest.raises(IntegrityError, match="leaves the root"):
        build.tree("FROM scratch\nADD x.tar /d/\n", {"x.tar": context({"../out": "x"})})


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/file.txt")
            self.end_headers()
            return
        if self.path == "/gone":
            self.send_error(404)
            return
        data = _archive("w:gz") if self.path == "/x.tgz" else b"content"
        data *= 10_000 if self.path == "/big" else 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", "Sun, 09 Sep 2001 01:46:40 GMT")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_add_fetches_urls_and_checks_them(build: Builder, server: str) -> None:
    good = "sha256:ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    found = build.tree(
        f"FROM scratch\nADD {server}/file.txt /d/\nADD --checksum={good} {server}/moved /e\n"
        f"ADD {server}/x.tgz /f/\nADD --unpack {server}/x.tgz /g/\n"
    )
    assert {"d/file.txt", "e", "f/x.tgz", "g/in/side"} <= set(found)
    assert (found["d/file.txt"].mode, found["d/file.txt"].mtime) == (0o600, 1_000_000_000)
    with pytest.raises(IntegrityError, match="expected sha256:0"):
        build.tree(f"FROM scratch\nADD --checksum=sha256:{'0' * 64} {server}/file.txt /d/\n")
    with pytest.raises(Unavailable, match="404"):
        build.tree(f"FROM scratch\nADD {server}/gone /d/\n")
    with pytest.raises(SourceError, match="--checksum"):
        build.tree(f"FROM scratch\nADD --checksum=md5:0 {server}/file.txt /d/\n")


@pytest.mark.parametrize("url", ["http://[", "https://u:secret@[::1/x", "http://host:port/x"])
def test_what_is_no_url_is_refused(build: Builder, url: str) -> None:
    with pytest.raises(InvalidArgument, match="is no URL") as caught:
        build.tree(f"FROM scratch\nADD {url} /d/\n")
    assert "secret" not in str(caught.value)


def test_a_download_whose_end_finds_no_room_is_a_failure(server: str, tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "small", tmp_path], check=True)
    try:
        with pytest.raises(OSError, match="No space left"):
            fetching.download(lambda: None, f"{server}/big", str(tmp_path))
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_where_the_content_of_a_directory_goes_is_made_anew(build: Builder, tmp_path: Path) -> None:
    """A context that only its owner may enter makes no image that nobody else can use."""
    (tmp_path / "d").mkdir(0o700)
    (tmp_path / "d" / "f").write_text("x")
    (tmp_path / "Dockerfile").write_text(
        "FROM scratch\nCOPY . /all/\nCOPY d /one\nCOPY --parents d /two/\n"
    )
    tmp_path.chmod(0o700)
    build.build(tmp_path, outputs=["-"], stream=(out := io.BytesIO()))
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive:
        modes = {entry.name.strip("./"): entry.mode for entry in archive}
    assert (modes["all"], modes["one"]) == (0o755, 0o755)
    assert (modes["all/d"], modes["two/d"]) == (0o700, 0o700)


def test_a_workdir_belongs_to_the_user(build: Builder) -> None:
    found = build.tree(
        "FROM scratch\nCOPY <<passwd /etc/\nme:x:7:8::/:\npasswd\nWORKDIR /a\nUSER me\n"
        "WORKDIR /a/b/c\nUSER 5:6\nWORKDIR /d\nUSER unknown\nWORKDIR /e\nUSER 9\nWORKDIR /f\n"
    )
    owners = [(found[name].uid, found[name].gid) for name in ("a", "a/b", "a/b/c", "d", "e", "f")]
    assert owners == [(0, 0), (7, 8), (7, 8), (5, 6), (0, 0), (9, 9)]


def test_names_that_look_like_patterns_are_names(build: Builder, server: str) -> None:
    found = build.tree(f"FROM scratch\nADD {server}/a%5B1%5D.txt /d/\nCOPY <<*.x /d/\ntext\n*.x\n")
    assert {"d/a[1].txt", "d/*.x"} <= set(found)


def test_a_download_that_fills_the_disk_is_told_as_that(
    build: Builder, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fetching, "new_hash", full)
    with pytest.raises(Exhausted, match="no space left"):
        build.tree(f"FROM scratch\nADD {server}/file.txt /d/\n")


def _git(place: Path, *words: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@x.y", "-c", "init.defaultBranch=main"]
    return subprocess.run(
        ["git", *identity, "-C", str(place), *words], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[str]:
    """A repository served on loopback, with a tag and a directory that builds."""
    place = tmp_path / "served" / "x.git"
    place.mkdir(parents=True)
    _git(place, "init", "-q")
    (place / "app").mkdir()
    (place / "app" / "Dockerfile").write_text("FROM scratch\nCOPY f /f\n")
    (place / "app" / "f").write_text("one")
    _git(place, "add", ".")
    _git(place, "commit", "-qm", "one")
    _git(place, "tag", "v1")
    (place / "app" / "f").write_text("two")
    _git(place, "commit", "-qam", "two")
    _git(place, "update-server-info")
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0),
        lambda *a: _Quiet(*a, directory=str(place.parent)),
    ) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}/x.git/.git"
        running.shutdown()
        thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_git_is_a_context_and_a_source(build: Builder, repository: str, tmp_path: Path) -> None:
    out = io.BytesIO()
    build.build(f"{repository}#v1:app", outputs=["-"], stream=out)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive:
        file = archive.extractfile("f")
        assert file is not None and file.read() == b"one"
    found = build.files(
        f"FROM scratch\nADD {repository}#main:app /d\nADD --keep-git-dir=true {repository} /e\n"
    )
    assert found["d/f"][1] == b"two" and not any(name.startswith("d/.git") for name in found)
    assert "e/.git/HEAD" in found
    with pytest.raises(HutchError, match=r"nope|git"):
        build.build(f"{repository}#nope")


def test_a_scheme_that_is_not_read_is_told(build: Builder, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="file:// is not read") as caught:
        build.build(f"file://{tmp_path}")
    assert "http, https, ssh or git" in str(caught.value.hint)
    with pytest.raises(HutchError, match="Dockerfile:2: ftp:// is not read"):
        build("FROM scratch\nADD ftp://x.invalid/y /y\n")


def test_git_runs_nothing_and_reads_no_file_of_the_host(build: Builder, tmp_path: Path) -> None:
    for url in ("ext::sh -c 'touch /tmp/x' x.git", f"file://{tmp_path}/x.git", "-oProxy=x.git"):
        with pytest.raises(HutchError):
            build.build(url)
    with pytest.raises(InvalidArgument, match="not a name"):
        build.build("https://x.invalid/x.git#--upload-pack=x")
