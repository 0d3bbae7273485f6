"""The table of all endpoints, from the modules of the resources."""

from __future__ import annotations

from hutch.api.docker import (
    builds,
    containers,
    containers_files,
    containers_life,
    containers_look,
    events,
    execs,
    images,
    logs,
    metrics,
    networks,
    streams,
    swarm,
    system,
    transfers,
    usage,
    volumes,
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
    ("Images", (*images.ROUTES, *transfers.ROUTES)),
    ("Builds", builds.ROUTES),
    ("Networks", networks.ROUTES),
    ("Volumes", volumes.ROUTES),
    ("System", (*system.ROUTES, *events.ROUTES, *usage.ROUTES, *metrics.ROUTES)),
    ("Swarm", swarm.ROUTES),
    ("Plugins", swarm.PLUGINS),
)
ROUTES: tuple[Route, ...] = tuple(route for _, routes in GROUPS for route in routes)
