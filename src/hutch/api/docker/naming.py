"""Find what a request names, and tell in Docker's words what is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hutch.api.docker.errors import ApiError
from hutch.engine import Instance
from hutch.errors import InvalidArgument, NotFound

if TYPE_CHECKING:
    from hutch.api.docker.requests import Request

__all__ = ["find_container"]


async def find_container(request: Request, name: str | None = None) -> Instance:
    """Return the instance that the path (or `name`) stands for."""
    wanted = request.params["id"] if name is None else name
    try:
        return await request.front.call(request.front.engine.get, wanted)
    except NotFound:
        raise ApiError(404, f"No such container: {wanted}") from None
    except InvalidArgument as exc:
        raise ApiError(400, str(exc)) from None
