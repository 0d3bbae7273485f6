"""Copy a tree of files as it is: owners, links, holes, whiteouts, extended attributes."""

from __future__ import annotations

import os

from hutch.errors import Exhausted, HutchError

__all__ = ["copy_tree"]

_FULL = ("No space left on device", "Disk quota exceeded")


def copy_tree(source: str, target: str) -> None:
    """Copy a directory to a new or an empty one, sharing blocks where the file system can.

    `cp` of coreutils does it: it keeps whiteouts (devices), hard links and the attributes of
    overlay. On a failure what was copied stays, the caller's to remove.
    """
    from hutch.process.run import run_command

    os.makedirs(target, 0o700, exist_ok=True)
    argv = ["cp", "--archive", "--reflink=auto", "--sparse=auto", "--no-target-directory"]
    done = run_command([*argv, "--", source, target], env={**os.environ, "LC_ALL": "C"})
    if done.returncode:
        said = done.stderr.decode(errors="replace")
        reason = (said.strip().splitlines() or ["cp failed"])[-1]
        if any(text in said for text in _FULL):
            raise Exhausted(f"copy of {source}: {reason}", hint="free disk space and retry")
        raise HutchError(f"copy of {source}: {reason}")
