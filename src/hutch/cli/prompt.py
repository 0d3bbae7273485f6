"""Ask before something is removed."""

from __future__ import annotations

import sys

from hutch.cli.session import Invocation

__all__ = ["confirm"]


def confirm(invocation: Invocation, warning: str) -> bool:
    """Return whether to go on: with `--force`, or when the person says yes."""
    if invocation.flag("force"):
        return True
    print(f"WARNING! {warning}", file=sys.stderr)
    print("Are you sure you want to continue? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
