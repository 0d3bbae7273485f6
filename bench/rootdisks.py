"""From an image to the root disk of a virtual machine, beside mkfs.erofs of the same tree."""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING

from bench.measure import Row, measure
from bench.pulls import big_image, stored_layers

if TYPE_CHECKING:
    from bench.cases import Peers
    from bench.stage import Stage

__all__ = ["DISK_CASES"]


def root_disk(stage: Stage, with_peers: Peers, rounds: int) -> Row:
    """Make one disk of three layers; the peer gets the tree that they add up to."""
    from hutch.storage.layers import Layers
    from hutch.storage.merging import link_tree
    from hutch.storage.rootdisk import RootDisks
    from hutch.storage.trash import Trash

    layout = stage.directory / "layout"
    if not layout.exists():
        big_image(layout)
    root = stage.directory / "rootdisk"
    root.mkdir()
    trash = Trash(root)
    layers = Layers(root, trash=trash)
    chain: list[str] = []
    for blob in stored_layers(layout):
        with open(blob, "rb") as stream:
            parent = chain[-1] if chain else ""
            chain.append(layers.unpack(stream, parent_chain_id=parent).chain_id)
    tree, target = root / "tree", root / "bare.erofs"
    tree.mkdir()
    link_tree(layers.lower(chain), str(tree))
    disks = RootDisks(root, layers, trash=trash)

    def hutch() -> float:
        began = time.perf_counter()
        disks.ensure(chain)
        taken = time.perf_counter() - began
        disks.remove(chain[-1])
        trash.drain()
        return taken

    def bare() -> float:
        began = time.perf_counter()
        subprocess.run(["mkfs.erofs", "--quiet", str(target), str(tree)], check=True)
        taken = time.perf_counter() - began
        os.unlink(target)
        return taken

    ways = {"hutch": hutch, "mkfs.erofs": bare}
    case = "root disk of a 250 MB image of three layers"
    return measure(case, ways, rounds=max(3, rounds // 2), targets={"mkfs.erofs": 1.2})


DISK_CASES = {"root-disk": root_disk}
