"""The table of all endpoints, from the modules of the resources."""

from __future__ import annotations

from hutch.api.docker import system
from hutch.api.docker.routing import Route

__all__ = ["GROUPS", "ROUTES"]

# In the order of the reference: heading, routes.
GROUPS: tuple[tuple[str, tuple[Route, ...]], ...] = (("System", system.ROUTES),)
ROUTES: tuple[Route, ...] = tuple(route for _, routes in GROUPS for route in routes)
