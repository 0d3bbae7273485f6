"""What this host can do: the machine and its networks, in one report."""

from __future__ import annotations

from pathlib import Path

from hutch.host.findings import Report

__all__ = ["examine_host"]


def examine_host(root: Path) -> Report:
    """Try everything and return what was found; `root` need not exist."""
    from hutch.host.doctor import examine
    from hutch.network.probe import examine as examine_networks

    return examine(root).with_section(examine_networks(), before="rootless")
