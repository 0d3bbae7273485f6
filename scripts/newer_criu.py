"""Unpack a CRIU into build/criu, with its own C library, for the tests of containers' memory.

CRIU before 4 does not know the vDSO of newer kernels, and later ones need a newer C library
than Debian's stable releases before trixie have: so it comes with all that it links to, from
Debian's sid or trixie at the mirror that the host's apt names, and runs through its own
loader. A host whose CRIU works needs nothing. Without either this says so and does nothing,
and those tests are skipped by name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from hutch.errors import HutchError
from hutch.host.criu import load_criu
from scripts.debian import ROOT, fetch, source

TREE = ROOT / "build" / "criu"
PROGRAM = TREE / "criu"
SUITES = ("sid", "trixie")
_MACHINE = f"{os.uname().machine}-linux-gnu"


def main() -> int:
    if PROGRAM.exists() or works():
        return 0
    problem = "the mirror of the host's apt, which names none of Debian"
    for suite in SUITES:
        wanted = source(suite)
        if wanted is None:
            break
        with tempfile.TemporaryDirectory(prefix="hutch-criu-") as workspace:
            try:
                unpack(fetch(wanted, Path(workspace), "criu", whole=True), Path(workspace))
            except (OSError, subprocess.CalledProcessError) as exc:
                said = (getattr(exc, "stderr", None) or str(exc)).strip().splitlines()
                problem = f"{suite}: {said[-1] if said else 'failed'}"
                continue
        say(f"CRIU for the tests of containers' memory: {PROGRAM.relative_to(ROOT)} ({suite})")
        return 0
    say(f"no CRIU from {problem}; no tests of containers' memory")
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr)


def works() -> bool:
    try:
        load_criu(None)
    except HutchError:
        return False
    return True


def unpack(debs: list[Path], workspace: Path) -> None:
    """Keep the program and the libraries; move the whole into place at once."""
    made = workspace / "tree"
    for package in debs:
        subprocess.run(["dpkg-deb", "-x", str(package), str(made)], check=True)
    TREE.parent.mkdir(exist_ok=True)
    beside = TREE.with_name(f".criu-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    (beside / "lib").mkdir(parents=True)
    for place in (made / "usr/lib" / _MACHINE, made / "lib" / _MACHINE):
        for library in place.glob("*.so*") if place.is_dir() else ():
            if library.is_file():
                shutil.copy(library, beside / "lib" / library.name)
    shutil.copy(made / "usr/sbin/criu", beside / "criu.bin")
    loader = next((beside / "lib").glob("ld-linux*.so*")).name
    script = beside / "criu"
    script.write_text(
        "#!/bin/sh\n"
        'here=$(dirname "$(readlink -f "$0")")\n'
        f'exec "$here/lib/{loader}" --library-path "$here/lib" "$here/criu.bin" "$@"\n'
    )
    script.chmod(0o755)
    shutil.rmtree(TREE, ignore_errors=True)
    beside.rename(TREE)


if __name__ == "__main__":
    sys.exit(main())
