"""What clients may send who mean no good: paths, archives, frames, heads."""

from __future__ import annotations

import base64
import io
import os
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hutch.api.docker.errors import ApiError
from hutch.api.docker.feeds import KeyScanner, parse_keys
from hutch.api.docker.frames import frame
from hutch.api.docker.logs import LogForm
from hutch.api.docker.replies import encode
from hutch.api.docker.requests import Query
from hutch.api.docker.routes import ROUTES
from hutch.api.docker.routing import Router, parse_version
from hutch.engine import Engine
from hutch.errors import InvalidArgument
from hutch.units import parse_time, parse_time_ns
from tests.api.docker.conftest import Client, Daemon
from tests.api.docker.test_containers import create, demultiplex

pytestmark = pytest.mark.requires("root", "overlayfs", "cgroup", "busybox")

Fill = Callable[[tarfile.TarFile], None]


def archive(fill: Fill) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        fill(tar)
    return data.getvalue()


def add_file(tar: tarfile.TarFile, name: str, content: bytes = b"content") -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def add_link(tar: tarfile.TarFile, name: str, target: str, *, hard: bool = False) -> None:
    entry = tarfile.TarInfo(name)
    entry.type = tarfile.LNKTYPE if hard else tarfile.SYMTYPE
    entry.linkname = target
    tar.addfile(entry)


# ---- archives -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/../out", "./../../../out"])
def test_an_archive_cannot_name_what_is_outside(
    api: Client, name: str, image: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    box = f"hostile-{os.urandom(4).hex()}"
    create(api, box, image, "true")
    try:
        data = archive(lambda tar: add_file(tar, name))
        api.ask("PUT", f"/containers/{box}/archive?path=/tmp", data)
        # Refused, or kept inside: never beside the container's own root.
        info = api.ask("GET", f"/containers/{box}/json").json
        directory = Path(info["HostsPath"]).parent
        assert not list(directory.glob("out"))
        assert not (directory.parent / "out").exists()
    finally:
        api.ask("DELETE", f"/containers/{box}?force=1")


@pytest.mark.parametrize("hard", [False, True], ids=["symbolic", "hard"])
def test_a_link_in_an_archive_leads_nowhere_outside(
    api: Client, name: str, image: str, tmp_path: Path, hard: bool
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    create(api, name, image, "true")

    def fill(tar: tarfile.TarFile) -> None:
        add_link(tar, "way", str(secret if hard else tmp_path), hard=hard)
        add_file(tar, "way" if hard else "way/secret", b"overwritten")

    api.ask("PUT", f"/containers/{name}/archive?path=/", archive(fill))
    assert secret.read_text() == "of the host"


@pytest.mark.parametrize("path", ["/way/secret", "/way/../way/secret", "/../../secret"])
def test_a_path_through_a_link_stays_inside(
    api: Client, name: str, image: str, tmp_path: Path, path: str
) -> None:
    (tmp_path / "secret").write_text("of the host")
    create(api, name, image, "true")
    link = archive(lambda tar: add_link(tar, "way", str(tmp_path)))
    assert api.ask("PUT", f"/containers/{name}/archive?path=/", link).status == 200
    answer = api.ask("GET", f"/containers/{name}/archive?path={quote(path)}")
    assert answer.status == 404
    assert b"of the host" not in answer.body


@pytest.mark.parametrize(
    "data", [b"no archive", b"\0" * 512 + b"x" * 512, b"\x1f\x8b broken", b"x" * 5000]
)
def test_what_is_no_archive_is_refused(api: Client, name: str, image: str, data: bytes) -> None:
    create(api, name, image, "true")
    answer = api.ask("PUT", f"/containers/{name}/archive?path=/", data)
    assert answer.status in (200, 400, 500), answer
    assert api.ask("GET", f"/containers/{name}/json").status == 200


def test_an_archive_goes_in_and_comes_out(api: Client, name: str, image: str) -> None:
    create(api, name, image, "true")

    def fill(tar: tarfile.TarFile) -> None:
        add_file(tar, "one/two", b"deep")
        add_link(tar, "one/link", "two")

    assert api.ask("PUT", f"/containers/{name}/archive?path=/tmp", archive(fill)).status == 200
    answer = api.ask("GET", f"/containers/{name}/archive?path=/tmp/one")
    with tarfile.open(fileobj=io.BytesIO(answer.body)) as tar:
        assert sorted(tar.getnames()) == ["one", "one/link", "one/two"]
        member = tar.extractfile("one/two")
        assert member is not None
        assert member.read() == b"deep"
    contents = api.ask("GET", f"/containers/{name}/archive?path=/tmp/one/.")
    with tarfile.open(fileobj=io.BytesIO(contents.body)) as tar:
        assert sorted(tar.getnames()) == [".", "./link", "./two"]
    for path, status in (("/tmp/none", 404), ("", 400), ("/tmp/one/two/", 404)):
        found = api.ask("PUT", f"/containers/{name}/archive?path={path}", archive(fill))
        assert found.status in (status, 400), (path, found)


def test_an_archive_is_given_to_the_containers_user(
    api: Client, name: str, image: str, hutch_engine: Engine
) -> None:
    create(api, name, image, "true", User="nobody:users")
    files = hutch_engine.get(name).files
    files.write("/etc/passwd", "nobody:x:65534:65533::/:/bin/sh\nbroken:x:x:x::/:\n")
    files.write("/etc/group", "users:x:100:\n")
    data = archive(lambda tar: add_file(tar, "one"))
    path = f"/containers/{name}/archive?path=/tmp"
    assert api.ask("PUT", f"{path}&copyUIDGID=1", data).status == 200
    assert (files.stat("/tmp/one").uid, files.stat("/tmp/one").gid) == (65534, 100)
    files.write("/etc/group", "users:x:none:\n")
    assert api.ask("PUT", f"{path}&copyUIDGID=1", data).status == 400
    assert api.ask("PUT", path, data).status == 200
    assert (files.stat("/tmp/one").uid, files.stat("/tmp/one").gid) == (0, 0)


def test_a_client_that_leaves_in_the_middle_of_an_archive(
    api: Client, daemon: Daemon, name: str, image: str
) -> None:
    create(api, name, image, "true")
    with api.socket() as sock:
        sock.sendall(
            f"PUT /v1.51/containers/{name}/archive?path=/ HTTP/1.1\r\nHost: d\r\n"
            "Content-Length: 1000000\r\n\r\n".encode()
            + archive(lambda tar: add_file(tar, "begun"))[:600]
        )
        sock.shutdown(socket.SHUT_WR)
        sock.recv(4096)
    assert api.ask("GET", f"/containers/{name}/json").status == 200
    assert api.ask("DELETE", f"/containers/{name}").status == 204


# ---- bytes that are no requests -----------------------------------------------------------------


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    data=st.one_of(
        st.binary(max_size=400),
        st.builds(
            lambda method, path, headers, body: (
                f"{method} {path} HTTP/1.1\r\nHost: d\r\n".encode()
                + b"".join(name + b": " + value + b"\r\n" for name, value in headers)
                + b"\r\n"
                + body
            ),
            st.sampled_from(["GET", "POST", "PUT", "HEAD", "X"]),
            st.sampled_from(
                ["/_ping", "/v1.51/containers/json", "/containers/x/attach", "/%00/%ff", "//"]
            ),
            st.lists(
                st.tuples(
                    st.sampled_from(
                        [b"Content-Length", b"Transfer-Encoding", b"Upgrade", b"Connection", b"A"]
                    ),
                    st.sampled_from([b"5", b"-1", b"chunked", b"tcp", b"Upgrade", b"\xff", b""]),
                ),
                max_size=4,
            ),
            st.binary(max_size=100),
        ),
    )
)
def test_bytes_of_any_kind_do_not_end_the_server(api: Client, data: bytes) -> None:
    with api.socket() as sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
        except ConnectionError:
            pass
    assert api.ask("GET", "/_ping").status == 200


@given(path=st.text(max_size=60), method=st.sampled_from(["GET", "POST", "DELETE", "PUT"]))
def test_any_path_has_a_route_or_none(path: str, method: str) -> None:
    router = Router(ROUTES)
    try:
        version, rest = parse_version("/" + path)
        router.find(method, rest, version)
    except ApiError as exc:
        assert exc.status in (400, 404)


@given(st.text(max_size=200))
def test_any_query_is_read_or_refused(text: str) -> None:
    try:
        query = Query(text)
        query.flag("a")
        query.integer("n")
        query.filters()
    except InvalidArgument:
        pass


@given(st.text(max_size=100))
def test_any_filters_are_read_or_refused(text: str) -> None:
    try:
        Query("filters=" + quote(text)).filters()
    except InvalidArgument:
        pass


@pytest.mark.parametrize("text", ["nan", "inf", "-1e400", "1e300", "0001-01-01", "1-1", "x"])
def test_a_moment_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="since: no time"):
        parse_time(text, "since")


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("1795943713.912300316", 1795943713912300316),
        ("2026-11-29T09:15:13.912300316Z", 1795943713912300316),
        ("2026-11-29T10:15:13.9+01:00", 1795943713900000000),
        ("1795943713", 1795943713000000000),
        ("-1.5", -1500000000),
    ],
)
def test_no_nanosecond_of_a_moment_is_lost(text: str, moment: int) -> None:
    assert parse_time_ns(text, "since") == moment


# ---- framing ----------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=50)), max_size=10))
def test_frames_are_told_apart_again(pieces: list[tuple[int, bytes]]) -> None:
    data = b"".join(frame(stream, piece) for stream, piece in pieces)
    assert list(demultiplex(data)) == pieces


@given(st.lists(st.binary(max_size=40), max_size=20), st.booleans(), st.booleans())
def test_a_log_of_any_lines_is_rendered(lines: list[bytes], times: bool, framed: bool) -> None:
    form = LogForm(stdout=True, stderr=True, multiplexed=framed, timestamps=times, since_ns=10**9)
    data = form.render([line.replace(b"\n", b"") for line in lines])
    if framed:
        list(demultiplex(data))


@given(
    st.lists(
        st.tuples(st.integers(0, 2**62), st.sampled_from("oeOE"), st.binary(max_size=30)),
        max_size=20,
    )
)
def test_records_of_a_log_come_out_whole(records: list[tuple[int, str, bytes]]) -> None:
    lines = [f"{time} {kind} ".encode() + data.replace(b"\n", b"") for time, kind, data in records]
    form = LogForm(stdout=True, stderr=False, multiplexed=False)
    wanted = b"".join(
        data.replace(b"\n", b"") + (b"\n" if kind == "o" else b"")
        for _, kind, data in records
        if kind in "oO"
    )
    assert form.render(lines) == wanted


@given(st.lists(st.binary(max_size=12), max_size=8))
def test_detach_keys_are_found_however_they_come(pieces: list[bytes]) -> None:
    keys = b"\x10\x11"
    scanner = KeyScanner(keys)
    out = b""
    for piece in pieces:
        typed, detached = scanner.scan(piece)
        out += typed
        if detached:
            break
    whole = b"".join(pieces)
    before, found, _ = whole.partition(keys)
    if found:
        assert out == before
    else:
        assert whole.startswith(out)
        assert len(whole) - len(out) < len(keys)


@pytest.mark.parametrize(
    ("text", "keys"),
    [(None, b"\x10\x11"), ("a", b"a"), ("ctrl-a,b", b"\x01b"), ("ctrl-],ctrl-^", b"\x1d\x1e")],
)
def test_detach_keys_are_read_as_docker_writes_them(text: str | None, keys: bytes) -> None:
    assert parse_keys(text) == keys


def test_names_that_are_no_unicode_are_shown() -> None:
    assert encode({"Path": "a\udcff"}) == '{"Path":"a\ufffd"}'.encode()


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/auth", b'{"username": "a", "serveraddress": "http://["}', "bad IPv6 address"),
        ("/auth", b'{"username": "a", "serveraddress": "a b"}', "bad registry name"),
        ("/auth", b'{"username": "\xff"}', "UTF-8"),
        ("/containers/create", b'{"Image": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_body_that_makes_no_sense_is_the_clients_fault(
    api: Client, path: str, body: bytes, said: str
) -> None:
    answer = api.ask("POST", path, body, {"Content-Type": "application/json"})
    assert answer.status == 400 and said in answer.message, answer


def test_a_header_that_makes_no_sense_is_the_clients_fault(api: Client) -> None:
    for config in (b'{"a": ' + b"[" * 20_000, b'{"a": "\xff"}'):
        headers = {"X-Registry-Auth": base64.urlsafe_b64encode(config).decode()}
        answer = api.ask("POST", "/images/create?fromImage=x", b"", headers)
        assert answer.status == 400 and "x-registry-auth" in answer.message, answer


def test_a_terminal_has_a_size_and_ps_no_zero_bytes(api: Client, name: str, image: str) -> None:
    create(api, name, image, "sleep", "1000")
    assert api.ask("POST", f"/containers/{name}/start").status == 204
    assert api.ask("GET", f"/containers/{name}/top?ps_args=%00").status == 400
    for size, status in (([-1, 5], 400), ([5], 400), ([70_000, 5], 201)):
        body = {"Cmd": ["true"], "Tty": True, "ConsoleSize": size}
        made = api.ask("POST", f"/containers/{name}/exec", body)
        assert made.status == status, made
    started = api.ask("POST", f"/exec/{made.json['Id']}/start", {"Detach": True})
    assert started.status == 200, started
    assert api.ask("DELETE", f"/containers/{name}?force=1").status == 204
