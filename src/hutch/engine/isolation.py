"""Decide what `isolation="auto"` means here: a container where this host lets us make one,
a virtual machine elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hutch.engine.context import Context

__all__ = ["decide_isolation"]


def decide_isolation(context: Context, options: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the options with the kind decided, and why; no reason where it was given.

    Options that only a machine has are for the case that it is one.
    """
    decided = dict(options)
    if decided.get("isolation") != "auto":
        return decided, ""
    from hutch.host.isolation import load_isolation
    from hutch.spec.machine import MACHINE_OPTIONS

    found = load_isolation(context.root)
    if not found.containers:
        decided["isolation"] = "vm"
        return decided, f"this host refuses containers: {found.reason}"
    decided["isolation"] = "container"
    kept = {name: value for name, value in decided.items() if name not in MACHINE_OPTIONS}
    return kept, "this host lets this user make containers"
