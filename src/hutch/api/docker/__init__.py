"""The Docker Engine API, a thin front on the engine.

`routes.py` is the table of all endpoints; each resource has modules of its own. Nothing here
holds state that the store does not, but for programs started by `exec`, as in Docker.
"""

from hutch.api.docker.front import Front, FrontOptions
from hutch.api.docker.serving import serve_client

__all__ = ["Front", "FrontOptions", "serve_client"]
