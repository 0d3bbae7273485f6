"""Exercise the KVM path where no KVM is: `bench/nested.py` in a machine that emulates one.

The first run takes about four minutes, later ones three.
"""

from __future__ import annotations

import sys

from scripts.nested import run_inside

if __name__ == "__main__":
    sys.exit(run_inside("nested-kvm", "bench.nested"))
