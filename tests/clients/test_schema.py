"""Answers against Docker's own description of its API, in the version that we speak."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hutch.api.docker.routes import ROUTES
from hutch.api.docker.routing import NEWEST, show
from tests.api.docker.conftest import Client
from tests.clients.conftest import load
from tests.requires import requires

pytestmark = requires(
    *("root", "overlayfs", "cgroup", "netns", "nftables", "busybox", "docker-schema")
)

_SCHEMA = Path(__file__).parents[2] / "build/clients/swagger.yaml"
_PARAMETER = re.compile(r"\{\w+(\.\.\.)?\}")
_METHODS = ("get", "post", "put", "delete", "head")
# Docker sends null for these too: they are pointers in its sources.
_POINTERS = frozenset({"MemorySwappiness", "ExitCode"})


def go(node: Any, name: str = "") -> Any:
    """Return a schema as Go fills it: lists, maps and pointers without a value are null."""
    if isinstance(node, list):
        return [go(member) for member in node]
    if not isinstance(node, dict):
        return node
    found = {k: go(v, k) for k, v in node.items() if k not in ("example", "format", "pattern")}
    kind = found.get("type")
    nullable = node.get("x-nullable") or name in _POINTERS or kind in ("array", "object")
    if isinstance(kind, str) and nullable:
        found["type"] = [kind, "null"]
    return found


@pytest.fixture(scope="module")
def schema() -> Any:
    """The description, with what Go makes of it."""
    described = yaml.load(_SCHEMA.read_bytes(), yaml.CSafeLoader)
    assert described["info"]["version"] == show(NEWEST)
    return go(described)


def test_every_endpoint_that_docker_describes_is_there(schema: Any) -> None:
    described = {
        (method.upper(), _PARAMETER.sub("{}", path))
        for path, methods in schema["paths"].items()
        for method in methods
        if method in _METHODS
    }
    ours = {(route.method, _PARAMETER.sub("{}", route.path)) for route in ROUTES}
    assert described - ours == set()


class Checker:
    """Asks, and holds the answer against what is described for its status."""

    def __init__(self, api: Client, schema: Any) -> None:
        self._api = api
        self._schema = schema
        self.problems: list[str] = []

    def ask(self, method: str, path: str, body: Any = None, /, query: str = "", **at: str) -> Any:
        """Ask with values in the place of the path's parameters."""
        answer = self._api.ask(method, path.format(**at) + query, body)
        described = self._schema["paths"][path][method.lower()]["responses"]
        response = described.get(answer.status) or described.get(str(answer.status))
        where = f"{method} {path.format(**at)} {answer.status}"
        if response is None:
            self.problems.append(f"{where}: is not among {sorted(map(str, described))}")
        elif answer.body and "schema" in response:
            known = {"definitions": self._schema["definitions"], **response["schema"]}
            validator = load("jsonschema").Draft4Validator(known)
            for error in validator.iter_errors(json.loads(answer.body)):
                self.problems.append(f"{where}: {list(error.path)}: {error.message[:200]}")
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        return json.loads(answer.body) if answer.body and is_json else None


def test_answers_are_as_docker_describes_them(api: Client, schema: Any, name: str) -> None:
    checker = Checker(api, schema)
    ask = checker.ask
    for path in ("/version", "/info", "/images/json", "/networks", "/volumes", "/system/df"):
        ask("GET", path)
    ask("POST", "/networks/create", {"Name": name})
    ask("POST", "/volumes/create", {"Name": name})
    body = {
        "Image": "busybox",
        "Cmd": ["sleep", "600"],
        "ExposedPorts": {"80/tcp": {}},
        "HostConfig": {"NetworkMode": name, "Binds": [f"{name}:/data"]},
        "Healthcheck": {"Test": ["CMD", "true"], "Interval": 10**9},
    }
    ask("POST", "/containers/create", body, query=f"?name={name}")
    ask("POST", "/containers/{id}/start", id=name)
    ask("GET", "/containers/json", query="?size=1")
    for path in ("/containers/{id}/json", "/containers/{id}/top", "/containers/{id}/changes"):
        ask("GET", path, id=name)
    ask("GET", "/containers/{id}/stats", query="?stream=0", id=name)
    made = ask("POST", "/containers/{id}/exec", {"Cmd": ["true"], "AttachStdout": True}, id=name)
    ask("GET", "/exec/{id}/json", id=made["Id"])
    for path, values in (
        ("/networks/{id}", {"id": name}),
        ("/volumes/{name}", {"name": name}),
        ("/images/{name}/json", {"name": "busybox"}),
        ("/images/{name}/history", {"name": "busybox"}),
    ):
        ask("GET", path, **values)
    ask("DELETE", "/networks/{id}", id=name)
    ask("DELETE", "/volumes/{name}", name=name)
    ask("POST", "/containers/{id}/stop", query="?t=0", id=name)
    ask("POST", "/containers/{id}/wait", id=name)
    ask("DELETE", "/containers/{id}", id=name)
    assert checker.problems == []


def test_errors_are_as_docker_describes_them(api: Client, schema: Any, name: str) -> None:
    checker = Checker(api, schema)
    for method, path in (
        *(("GET", f"/{kind}") for kind in ("swarm", "nodes", "services", "tasks", "secrets")),
        *(("GET", path) for path in ("/containers/{id}/json", "/networks/{id}", "/exec/{id}/json")),
        *(("DELETE", path) for path in ("/containers/{id}", "/networks/{id}", "/nodes/{id}")),
        ("POST", "/swarm/leave"),
        ("GET", "/plugins"),
    ):
        checker.ask(method, path, id=name)
    for path in ("/images/{name}/json", "/images/{name}/history", "/volumes/{name}"):
        checker.ask("GET", path, name=name)
    checker.ask("DELETE", "/images/{name}", name=name)
    checker.ask("DELETE", "/volumes/{name}", name=name)
    checker.ask("POST", "/swarm/init", {})
    checker.ask("POST", "/networks/{id}/connect", {"Container": name}, id=name)
    checker.ask("POST", "/images/{name}/tag", query="?repo=x", name=name)
    assert checker.problems == []
