"""The table of all endpoints, from the modules of the resources."""

from __future__ import annotations

from hutch.api.docker import (
    builds,
    containers,
    containers_files,
    containers_life,
    containers_look,
    execs,
    logs,
    metrics,
    streams,
    system,
)
from hutch.api.docker.routing import Route

__all__ = ["GROUPS", "ROUTES"]

# In the order of the reference: heading, routes.
GROUPS: tuple[tuple[str, tuple[Route, ...]], ...] = (
    ("Containers", containers.ROUTES),
    ("Containers: life", containers_life.ROUTES),
    ("Containers: streams", (*logs.ROUTES, *streams.ROUTES)),
    ("Containers: files", containers_files.ROUTES),
    ("Containers: what they do and use", containers_look.ROUTES),
    ("Exec", execs.ROUTES),
    ("System", (*system.ROUTES, *metrics.ROUTES)),
    ("Builds", builds.ROUTES),
)
ROUTES: tuple[Route, ...] = tuple(route for _, routes in GROUPS for route in routes)
