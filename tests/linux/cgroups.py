"""A hierarchy of a test's own, and processes inside its groups."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hutch.linux.cgroup import Group

__all__ = ["fresh_parent", "member", "remove_parents"]

# The shell joins the v1 groups and becomes the program, as the launcher's child does.
_JOIN = 'while [ "$1" != -- ]; do echo 0 >"$1" || exit 99; shift; done; shift; exec "$@"'


def fresh_parent() -> str:
    """Return the name of a parent group that no other test uses."""
    return f"hutch-test-{os.getpid()}-{secrets.token_hex(4)}"


def remove_parents(parent: str) -> None:
    """Remove the parent from every hierarchy of the host; it must be empty."""
    for path in (*Path("/sys/fs/cgroup").glob(f"*/{parent}"), Path("/sys/fs/cgroup", parent)):
        if path.is_dir():
            path.rmdir()


@contextmanager
def member(group: Group, *argv: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program inside a group (v1 `tasks`, or `add` for v2); killed at the end."""
    files = group.join_files()
    gate = ("sh", "-c", 'read line; exec "$@"', "gate") if not files else ()
    with subprocess.Popen(
        ["sh", "-c", _JOIN, "join", *files, "--", *gate, *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            if not files:
                group.add(child.pid)
                assert child.stdin is not None
                child.stdin.write("go\n")
                child.stdin.flush()
            yield child
        finally:
            child.kill()
