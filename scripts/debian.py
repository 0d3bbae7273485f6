"""Packages of Debian suites that are not the host's, fetched from the mirror of its own apt.

For tests and nightly targets: nothing is installed, and the host's apt stays as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from hutch.image.apt import Source, acquire_options, distribution_of, load_sources

__all__ = ["ROOT", "environment", "fetch", "host_release", "make_from_first", "say", "source"]
__all__ += ["unpack_program", "unpack_qemu"]

ROOT = Path(__file__).parent.parent
_LOADERS = ("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu")


def say(text: str) -> None:
    """Tell whoever sets up."""
    print(text, file=sys.stderr)


def host_release() -> Source | None:
    """Return where the host's own Debian release comes from, None on another system."""
    for found in load_sources():
        for suite in found.suites:
            if distribution_of(found) == "debian" and "-" not in suite and "/" not in suite:
                return Source(
                    uri=found.uri,
                    suites=(suite,),
                    components=("main",),
                    signed_by=found.signed_by,
                    trusted=found.trusted,
                )
    return None


def source(suite: str) -> Source | None:
    """Return where a suite comes from at the host's mirror; `backports` is the host's own."""
    own = host_release()
    if own is None or not shutil.which("apt-get"):
        return None
    if suite == "backports":
        suite = f"{own.suites[0]}-backports"
    return Source(
        uri=own.uri,
        suites=(suite,),
        components=("main",),
        signed_by=own.signed_by,
        trusted=own.trusted,
    )


def environment(wanted: Source, directory: Path) -> dict[str, str]:
    """Return the variables with which apt knows nothing but this source, and holds nothing to be
    installed; its lists are fetched into `directory`."""
    for name in ("lists/partial", "cache/archives/partial"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    sources = directory / "sources.list"
    sources.write_text("\n".join(wanted.lines()) + "\n")
    (directory / "status").touch()
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True)
    configuration = directory / "apt.conf"
    configuration.write_text(
        "\n".join(
            [
                *acquire_options(dump.stdout),
                f'Dir::Etc::sourcelist "{sources}";',
                'Dir::Etc::sourceparts "-";',
                f'Dir::State::lists "{directory}/lists";',
                f'Dir::State::status "{directory}/status";',
                f'Dir::Cache "{directory}/cache";',
                'APT::Sandbox::User "root";',
                'APT::Install-Recommends "false";',
            ]
        )
        + "\n"
    )
    variables = os.environ | {"APT_CONFIG": str(configuration), "LC_ALL": "C.UTF-8"}
    _run(["apt-get", "update", "-q"], directory, variables)
    return variables


def fetch(wanted: Source, directory: Path, *packages: str, whole: bool = False) -> list[Path]:
    """Download packages; with `whole` also all that they depend on. Returns their files."""
    variables = environment(wanted, directory)
    if whole:
        _run(["apt-get", "install", "-q", "-y", "--download-only", *packages], directory, variables)
        return sorted((directory / "cache/archives").glob("*.deb"))
    debs = directory / "debs"
    debs.mkdir(exist_ok=True)
    _run(["apt-get", "download", "-q", *packages], debs, variables)
    return sorted(debs.glob("*.deb"))


def make_from_first(suites: Sequence[str], make: Callable[[Source, Path], None]) -> tuple[str, str]:
    """Have something made, in a directory that goes away, from the first suite that gives it;
    return the suite's name, or "" and what was wrong with the last."""
    problem = "the mirror of the host's apt, which names none of Debian"
    for suite in suites:
        wanted = source(suite)
        if wanted is None:
            break
        with tempfile.TemporaryDirectory(prefix="hutch-debian-") as workspace:
            try:
                make(wanted, Path(workspace))
            except (OSError, ValueError, subprocess.CalledProcessError) as exc:
                said = (getattr(exc, "stderr", None) or str(exc)).strip().splitlines()
                problem = f"{suite}: {said[-1] if said else 'failed'}"
                continue
        return suite, ""
    return "", problem


def unpack_qemu(debs: list[Path], tree: Path) -> None:
    """Unpack packages with a QEMU beside each other, and move the whole into place at once.

    Where the C library is among them, QEMU is made to use it and its companions.
    """
    tree.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent, prefix=".qemu-") as work:
        made = Path(work, "tree")
        made.mkdir()
        for package in debs:
            subprocess.run(["dpkg-deb", "-x", str(package), str(made)], check=True)
        # Debian's QEMU looks for its data here first; its own directories are the host's.
        bundle = made / "usr/bin/qemu-bundle"
        bundle.mkdir()
        (bundle / "usr").symlink_to("../..")
        for directory in _LOADERS:
            for loader in (made / directory).glob("ld-linux-*.so.*"):
                _use_own_libraries(made, tree, loader.relative_to(made))
        shutil.rmtree(tree, ignore_errors=True)
        made.rename(tree)


def _use_own_libraries(made: Path, tree: Path, loader: Path) -> None:
    """Have every program of QEMU start with that loader, and look for libraries beside it."""
    for program in (made / "usr/bin").glob("qemu-*"):
        if (
            program.is_file()
            and not program.is_symlink()
            and program.read_bytes()[:4] == b"\x7fELF"
        ):
            subprocess.run(
                [
                    *("patchelf", "--set-interpreter", str(tree / loader)),
                    *("--force-rpath", "--set-rpath", str(tree / loader.parent), str(program)),
                ],
                check=True,
            )


def unpack_program(
    debs: list[Path], workspace: Path, program: str, into: Path, *, note: str = ""
) -> None:
    """Keep a program of these packages and all their libraries, and beside it a script that starts
    it by its own loader, at the path `into`; `note` is a line in that. The directory of the
    script moves into place at once."""
    made = workspace / "tree"
    for package in debs:
        subprocess.run(["dpkg-deb", "-x", str(package), str(made)], check=True)
    tree = into.parent
    tree.parent.mkdir(exist_ok=True, parents=True)
    beside = tree.with_name(f".{tree.name}-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    (beside / "lib").mkdir(parents=True)
    machine = f"{os.uname().machine}-linux-gnu"
    for place in (made / "usr/lib" / machine, made / "lib" / machine):
        for library in place.glob("*.so*") if place.is_dir() else ():
            if library.is_file():
                shutil.copy(library, beside / "lib" / library.name)
    shutil.copy(made / program, beside / f"{into.name}.bin")
    loader = next((beside / "lib").glob("ld-linux*.so*")).name
    script = beside / into.name
    script.write_text(
        f"#!/bin/sh\n{note}"
        'here=$(dirname "$(readlink -f "$0")")\n'
        f'exec "$here/lib/{loader}" --library-path "$here/lib" "$here/{into.name}.bin" "$@"\n'
    )
    script.chmod(0o755)
    shutil.rmtree(tree, ignore_errors=True)
    beside.rename(tree)


def _run(command: list[str], directory: Path, variables: dict[str, str]) -> None:
    subprocess.run(
        command, cwd=directory, env=variables, capture_output=True, text=True, check=True
    )
