"""Clear the host of what roots that are no more have left: bridges, tables, rules.

A root removed without its networks being taken down (`rm -r`, a temporary directory) leaves
its bridges. Each carries the root's path as its alias, and the table's name follows from it.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from hutch.linux import rtnetlink
from hutch.linux.rtnetlink import LinkInfo, RouteSocket
from hutch.network import firewall, foreign

__all__ = ["note_of", "remove_vanished"]

_PREFIX = "hutch "
_LONGEST = 255  # IFALIASZ - 1


def note_of(root: Path) -> str:
    """Return the alias of the bridges of a root, "" where its path does not fit."""
    note = _PREFIX + os.path.realpath(root)
    return note if len(os.fsencode(note)) <= _LONGEST else ""


def remove_vanished() -> list[str]:
    """Remove the bridges and the table of every root whose directory does not exist.

    Returns the paths of those roots. A root one of whose bridges still has a member is left
    alone: its file system may just not be mounted. Name servers have ended by themselves,
    for their data went with the root.
    """
    with RouteSocket() as route:
        links = route.links()
        gone: dict[str, list[LinkInfo]] = {}
        for link in links:
            root = link.alias.removeprefix(_PREFIX)
            if link.kind in ("bridge", "ifb") and root != link.alias and not os.path.lexists(root):
                gone.setdefault(root, []).append(link)
        masters = {link.master for link in links}
        swept = []
        for root, bridges in sorted(gone.items()):
            if not any(link.index in masters for link in bridges):
                _remove(route, root, bridges)
                swept.append(root)
    return swept


def _remove(route: RouteSocket, root: str, bridges: list[LinkInfo]) -> None:
    try:
        foreign.forget_bridges([link.name for link in bridges if link.kind == "bridge"])
    except OSError as error:
        raise firewall.translate(error) from error
    for link in bridges:
        route.request(rtnetlink.delete_link(link.index), ignore=(errno.ENODEV,))
    firewall.remove_table(firewall.table_name(Path(root)))
