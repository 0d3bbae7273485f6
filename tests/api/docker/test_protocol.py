"""What holds for every endpoint: versions, headers, errors, framing."""

from __future__ import annotations

import re

import pytest

from hutch import errors
from hutch.api.docker.errors import STATUS
from hutch.api.docker.routes import ROUTES
from tests.api.docker.conftest import Client, Daemon

pytestmark = pytest.mark.requires("root", "overlayfs", "cgroup", "netns", "nftables", "busybox")


def test_ping_tells_the_versions_in_headers(api: Client) -> None:
    answer = api.ask("GET", "/_ping", raw=True)
    assert answer.status == 200
    assert answer.body == b"OK"
    assert answer.headers["api-version"] == "1.51"
    assert answer.headers["ostype"] == "linux"
    assert answer.headers["builder-version"] == "1"
    assert answer.headers["docker-experimental"] == "false"


def test_head_of_ping_has_no_body(api: Client) -> None:
    answer = api.ask("HEAD", "/_ping", raw=True)
    assert (answer.status, answer.body) == (200, b"")


@pytest.mark.parametrize("version", ["v1.24", "v1.40", "v1.51"])
def test_versions_in_the_span_are_spoken(api: Client, version: str) -> None:
    assert api.ask("GET", f"/{version}/version", raw=True).status == 200


def test_a_version_that_is_too_old_is_refused_in_dockers_words(api: Client) -> None:
    answer = api.ask("GET", "/v1.23/version", raw=True)
    assert answer.status == 400
    assert answer.message == (
        "client version 1.23 is too old. Minimum supported API version is 1.24, "
        "please upgrade your client to a newer version"
    )


def test_a_version_that_is_too_new_is_refused(api: Client) -> None:
    answer = api.ask("GET", "/v1.99/version", raw=True)
    assert answer.status == 400
    assert "Maximum supported API version is 1.51" in answer.message


@pytest.mark.parametrize(("method", "path"), [("GET", "/nothing"), ("DELETE", "/version")])
def test_a_page_that_is_not_there_is_told_as_docker_does(
    api: Client, method: str, path: str
) -> None:
    answer = api.ask(method, path)
    assert (answer.status, answer.message) == (404, "page not found")


def test_what_is_no_http_gets_an_answer_and_an_end(api: Client) -> None:
    with api.socket() as sock:
        sock.sendall(b"\x16\x03\x01 no http at all\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_several_requests_share_a_connection(api: Client) -> None:
    with api.socket() as sock:
        rest = b" HTTP/1.1\r\nHost: d\r\n\r\n"
        # As it stands in the request of a client behind a proxy, too.
        sock.sendall(b"GET /_ping" + rest + b"GET http://d/v1.51/_ping" + rest)
        seen = b""
        while seen.count(b"\r\n\r\nOK") < 2:
            piece = sock.recv(4096)
            assert piece
            seen += piece


def test_a_head_without_end_is_cut_off(api: Client) -> None:
    with api.socket() as sock:
        try:
            sock.sendall(b"GET /_ping HTTP/1.1\r\nX: " + b"a" * (1 << 20))
            answer = sock.recv(4096)
        except (BrokenPipeError, ConnectionResetError):
            return
        assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")


def test_only_the_group_may_use_the_socket(daemon: Daemon) -> None:
    import os

    assert os.stat(daemon.path).st_mode & 0o777 == 0o660


def test_a_second_daemon_on_the_same_root_is_refused(daemon: Daemon, api: Client) -> None:
    import subprocess

    argv = [*daemon._argv]
    argv[argv.index(f"unix://{daemon.path}")] = f"unix://{daemon.path}2"
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "another daemon serves this root" in done.stderr


def test_info_is_that_of_the_root(api: Client, daemon: Daemon) -> None:
    info = api.ask("GET", "/info").json
    assert info["Swarm"]["LocalNodeState"] == "inactive"
    assert "hutch-vm" in info["Runtimes"]


def every_error(kind: type[errors.HutchError] = errors.HutchError) -> list[type]:
    found: list[type] = [kind]
    for below in kind.__subclasses__():
        if below.__module__ == "hutch.errors":
            found += every_error(below)
    return found


@pytest.mark.parametrize("kind", every_error())
def test_every_error_has_a_status(kind: type) -> None:
    assert kind in STATUS


@pytest.mark.parametrize("route", ROUTES, ids=lambda r: f"{r.method} {r.path}")
def test_every_route_says_how_far_it_goes(route: object) -> None:
    from hutch.api.docker.routing import Route

    assert isinstance(route, Route)
    for text in (route.verdict, *route.options.values()):
        assert re.split(r"[:;, ]", text)[0] in ("works", "differs", "ignored", "refused"), text


def test_versions_below_the_minimum_are_let_in_where_that_is_configured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hutch.api.docker.routing import parse_version
    from hutch.daemon.config import DaemonConfig
    from hutch.errors import HutchError, InvalidArgument

    assert DaemonConfig().front_options().min_api_version == (1, 24)
    oldest = DaemonConfig(min_api_version="1.12").front_options().min_api_version
    assert parse_version("/v1.22/images/json", oldest) == ((1, 22), "/images/json")
    with pytest.raises(HutchError, match="too old"):
        parse_version("/v1.22/images/json")
    monkeypatch.setenv("DOCKER_MIN_API_VERSION", "1.30")
    assert DaemonConfig().front_options().min_api_version == (1, 30)
    for wrong in ("1.11", "2", "x.y", "1.99"):
        with pytest.raises(InvalidArgument, match=r"1\.12 to"):
            DaemonConfig(min_api_version=wrong).front_options()
