"""Run the tests marked `versions` with other versions of QEMU, or other kernels in the guests.

`python -m scripts.versions qemu` takes the host's QEMU, that of its release's backports, and the
newest one, which is Debian's from sid with its own C library; `kernels` the cloud kernels of the
host's release, of its backports, of trixie and of sid. What is fetched is kept in
build/versions; with further arguments only those of that name run (`qemu sid`). Some minutes
each.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from scripts import newer_qemu
from scripts.debian import ROOT, environment, fetch, host_release, source, unpack_qemu

CACHE = ROOT / "build" / "versions"
NAME = f"qemu-system-{os.uname().machine}"
SUITES = ("backports", "trixie", "sid")
TESTS = ("tests/plan/machine", "tests/vm", "tests/migration/test_live.py")


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """A version of something: its name, what it turned out to be, and how tests are told."""

    name: str
    what: str
    variables: dict[str, str]


def say(text: str) -> None:
    """Print a line, at once."""
    print(text, flush=True)


def qemu(suite: str) -> Variant | None:
    """Return the QEMU of a suite, "host" for the one that is installed."""
    if suite == "host":
        found = shutil.which(NAME)
        return _qemu("host", Path(found)) if found else None
    if suite == "backports":
        newer_qemu.main()
        return _qemu(suite, newer_qemu.PROGRAM) if newer_qemu.PROGRAM.exists() else None
    wanted = source(suite)
    if wanted is None:
        return None
    tree = CACHE / f"qemu-{suite}"
    if not _starts(tree / "usr/bin" / NAME):
        say(f"fetching QEMU from {wanted.suites[0]}")
        with tempfile.TemporaryDirectory(prefix="hutch-versions-") as work:
            # With all that it needs, so that it does not matter how old this host is.
            debs = fetch(wanted, Path(work), "qemu-system-x86", "qemu-utils", whole=True)
            os.environ["PATH"] = f"{patchelf()}:{os.environ['PATH']}"
            unpack_qemu(debs, tree)
    return _qemu(suite, tree / "usr/bin" / NAME)


def _starts(program: Path) -> bool:
    """Tell whether a program that was unpacked can be run: the loader that it names is in its
    own tree, by an absolute path, so that a checkout that was moved has none."""
    try:
        done = subprocess.run([str(program), "--version"], capture_output=True)
    except FileNotFoundError:
        return False
    return done.returncode == 0


def _qemu(name: str, program: Path) -> Variant:
    done = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=True)
    variables = {"HUTCH_QEMU": str(program), "HUTCH_TEST_QEMU": str(program)}
    return Variant(name=name, what=done.stdout.splitlines()[0], variables=variables)


def patchelf() -> Path:
    """Return a directory with that program."""
    found = shutil.which("patchelf")
    if found:
        return Path(found).parent
    tree = CACHE / "patchelf"
    own = host_release()
    if not tree.exists() and own is not None:
        with tempfile.TemporaryDirectory(prefix="hutch-versions-") as work:
            for deb in fetch(own, Path(work), "patchelf"):
                subprocess.run(["dpkg-deb", "-x", str(deb), str(tree)], check=True)
    return tree / "usr/bin"


def kernel(suite: str) -> Variant | None:
    """Return the cloud kernel of a suite, "host" for that of the host's own apt."""
    from hutch.drivers.vm.kernel_packages import find_package

    variables: dict[str, str] = {}
    if suite != "host":
        wanted = source(suite)
        if wanted is None:
            return None
        directory = CACHE / f"apt-{suite}"
        variables = {"APT_CONFIG": environment(wanted, directory)["APT_CONFIG"]}
    os.environ.update(variables)
    try:
        found = find_package()
    finally:
        os.environ.pop("APT_CONFIG", None) if variables else None
    return Variant(name=suite, what=f"{found.name} {found.version}", variables=variables)


def run(variant: Variant) -> bool:
    """Run the tests; tell whether all of them passed."""
    say(f"\n== {variant.name}: {variant.what}")
    began = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "versions", "--timeout", "900", *TESTS]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variant.variables)
    say(f"== {variant.name}: {time.perf_counter() - began:.0f} s")
    return done.returncode == 0


def main(kind: str, *only: str) -> int:
    """Run them all; the exit code tells whether all passed."""
    if os.geteuid() != 0:
        raise SystemExit("versions: run as root")
    CACHE.mkdir(parents=True, exist_ok=True)
    make = {"qemu": qemu, "kernels": kernel}[kind]
    # Trixie's QEMU is that of bookworm's backports.
    suites = [s for s in ("host", *SUITES) if kind == "kernels" or s != "trixie"]
    results: list[tuple[str, str]] = []
    for suite in only or suites:
        variant = make(suite)
        if variant is None:
            results.append((suite, "could not be had"))
        else:
            results.append((variant.what, "passed" if run(variant) else "FAILED"))
    say("")
    for what, result in results:
        say(f"{result:16} {what}")
    return 0 if all(result == "passed" for _, result in results) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
