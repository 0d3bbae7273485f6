"""Swarm and what belongs to it, and plugins: one host is no swarm, and says so as Docker does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hutch.api.docker.errors import ApiError
from hutch.api.docker.replies import Answer, json_reply
from hutch.api.docker.routing import Route, Version

if TYPE_CHECKING:
    from hutch.api.docker.requests import Request

__all__ = ["PLUGINS", "ROUTES"]

_NO_MANAGER = (
    'This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" to connect '
    "this node to swarm and try again."
)
_REFUSED = "refused with 503, as by a Docker node that is no swarm manager"


async def _no_manager(request: Request) -> Answer:
    raise ApiError(503, _NO_MANAGER)


async def _no_swarm(request: Request) -> Answer:
    raise ApiError(503, "swarm mode is not supported: this engine runs one host")


async def _not_part(request: Request) -> Answer:
    raise ApiError(503, "This node is not part of a swarm")


async def _no_plugins(request: Request) -> Answer:
    return json_reply([])


async def _no_such_plugin(request: Request) -> Answer:
    name = request.params["name"]
    raise ApiError(404, f'plugin "{name}" not found')


async def _unsupported_plugins(request: Request) -> Answer:
    raise ApiError(501, "plugins are not supported")


def _manager(method: str, path: str, summary: str, since: Version = (1, 24)) -> Route:
    return Route(
        method=method,
        path=path,
        handler=_no_manager,
        summary=summary,
        verdict=_REFUSED,
        since=since,
    )


def _resource(
    kind: str, *, update: bool = True, create: bool = True, since: Version = (1, 24)
) -> tuple[Route, ...]:
    """Return the routes of one kind of a swarm's objects."""
    one = kind.removesuffix("s")
    routes = [
        _manager("GET", f"/{kind}", f"List {kind}", since),
        _manager("GET", f"/{kind}/{{id}}", f"Describe a {one}", since),
    ]
    if create:
        routes.append(_manager("POST", f"/{kind}/create", f"Make a {one}", since))
    if kind != "tasks":
        routes.append(_manager("DELETE", f"/{kind}/{{id}}", f"Remove a {one}", since))
    if update:
        routes.append(_manager("POST", f"/{kind}/{{id}}/update", f"Change a {one}", since))
    return tuple(routes)


def _swarm(method: str, path: str, summary: str, *, refused: bool = False) -> Route:
    if not refused:
        return _manager(method, path, summary)
    return Route(
        method=method,
        path=path,
        handler=_not_part if path.endswith("leave") else _no_swarm,
        summary=summary,
        verdict="refused: this node is in no swarm"
        if path.endswith("leave")
        else "refused: this engine runs one host",
    )


ROUTES = (
    _swarm("GET", "/swarm", "Describe the swarm"),
    _swarm("POST", "/swarm/init", "Begin a swarm", refused=True),
    _swarm("POST", "/swarm/join", "Join a swarm", refused=True),
    _swarm("POST", "/swarm/leave", "Leave the swarm", refused=True),
    _swarm("POST", "/swarm/update", "Change the swarm"),
    _swarm("GET", "/swarm/unlockkey", "Tell the key that unlocks managers"),
    _swarm("POST", "/swarm/unlock", "Unlock a manager", refused=True),
    *_resource("nodes", create=False),
    *_resource("services"),
    _manager("GET", "/services/{id}/logs", "Tell what a service wrote", (1, 29)),
    *_resource("tasks", update=False, create=False),
    _manager("GET", "/tasks/{id}/logs", "Tell what a task wrote", (1, 29)),
    *_resource("secrets", since=(1, 25)),
    *_resource("configs", since=(1, 30)),
)


def _plugin(method: str, path: str, summary: str) -> Route:
    return Route(
        method=method,
        path=path,
        handler=_no_such_plugin if "{name" in path else _unsupported_plugins,
        summary=summary,
        verdict="refused: there are no plugins",
        since=(1, 25),
    )


PLUGINS = (
    Route(
        method="GET",
        path="/plugins",
        handler=_no_plugins,
        summary="List plugins",
        verdict="works: there are none",
        since=(1, 25),
        options={"filters": "ignored"},
    ),
    _plugin("GET", "/plugins/privileges", "Tell what a plugin asks for"),
    _plugin("POST", "/plugins/pull", "Install a plugin"),
    _plugin("POST", "/plugins/create", "Make a plugin"),
    _plugin("GET", "/plugins/{name...}/json", "Describe a plugin"),
    _plugin("POST", "/plugins/{name...}/enable", "Enable a plugin"),
    _plugin("POST", "/plugins/{name...}/disable", "Disable a plugin"),
    _plugin("POST", "/plugins/{name...}/upgrade", "Upgrade a plugin"),
    _plugin("POST", "/plugins/{name...}/push", "Push a plugin"),
    _plugin("POST", "/plugins/{name...}/set", "Set up a plugin"),
    _plugin("DELETE", "/plugins/{name...}", "Remove a plugin"),
)
