"""Give a device to a machine where there is an IOMMU: `bench/nested_vfio.py` in a machine that
emulates one."""

from __future__ import annotations

import sys

from scripts.nested import run_inside

if __name__ == "__main__":
    sys.exit(run_inside("nested-vfio", "bench.nested_vfio"))
