"""Unpack a newer QEMU into build/qemu, for the tests of live migration; the host's stays as it is.

Emulated machines can be copied while they run from QEMU 9.0 on. A host that has one needs
nothing; on another the distribution's backports are asked, at the mirror that its own apt
names. Without either this says so and does nothing, and those tests are skipped by name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from hutch.errors import HutchError
from hutch.host.qemu import load_qemu
from hutch.image.apt import Source, acquire_options, distribution_of, load_sources

ROOT = Path(__file__).parent.parent
TREE = ROOT / "build" / "qemu"
PROGRAM = TREE / "usr" / "bin" / f"qemu-system-{os.uname().machine}"
PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")


def main() -> int:
    if PROGRAM.exists() or has_new_enough():
        return 0
    source = backports()
    if source is None or not shutil.which("apt-get"):
        say("QEMU is older than 9.0 and apt names no Debian mirror: no tests of live migration")
        return 0
    with tempfile.TemporaryDirectory(prefix="hutch-qemu-") as workspace:
        try:
            fetch(source, Path(workspace))
        except subprocess.CalledProcessError as exc:
            said = (exc.stderr or "").strip().splitlines()[-1:] or [""]
            say(f"no newer QEMU from {source.suites[0]}: {said[0]}; no tests of live migration")
            return 0
        unpack(Path(workspace))
    say(f"QEMU for the tests of live migration: {PROGRAM.relative_to(ROOT)}")
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr)


def has_new_enough() -> bool:
    try:
        return load_qemu(None).version.sees_emulated_writes
    except HutchError:
        return False


def backports() -> Source | None:
    """Return the backports of the host's own release, at its own mirror."""
    for source in load_sources():
        for suite in source.suites:
            if distribution_of(source) == "debian" and "-" not in suite and "/" not in suite:
                return Source(
                    uri=source.uri,
                    suites=(f"{suite}-backports",),
                    components=("main",),
                    signed_by=source.signed_by,
                    trusted=source.trusted,
                )
    return None


def fetch(source: Source, workspace: Path) -> None:
    """Download the packages by an apt that knows nothing but this source."""
    for name in ("lists/partial", "cache/archives/partial", "debs"):
        (workspace / name).mkdir(parents=True)
    sources = workspace / "sources.list"
    sources.write_text("\n".join(source.lines()) + "\n")
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True)
    configuration = workspace / "apt.conf"
    configuration.write_text(
        "\n".join(
            [
                *acquire_options(dump.stdout),
                f'Dir::Etc::sourcelist "{sources}";',
                'Dir::Etc::sourceparts "-";',
                f'Dir::State::lists "{workspace}/lists";',
                f'Dir::Cache "{workspace}/cache";',
                'APT::Sandbox::User "root";',
            ]
        )
        + "\n"
    )
    environment = os.environ | {"APT_CONFIG": str(configuration), "LC_ALL": "C.UTF-8"}
    for command in (["update", "-q"], ["download", "-q", *PACKAGES]):
        subprocess.run(
            ["apt-get", *command],
            cwd=workspace / "debs",
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )


def unpack(workspace: Path) -> None:
    """Unpack them beside each other, and move the whole into place at once."""
    made = workspace / "tree"
    for package in sorted((workspace / "debs").glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(made)], check=True)
    # Debian's QEMU looks for its data here first; its own directories are the host's.
    bundle = made / "usr" / "bin" / "qemu-bundle"
    bundle.mkdir()
    (bundle / "usr").symlink_to("../..")
    TREE.parent.mkdir(exist_ok=True)
    beside = TREE.with_name(f".qemu-{os.getpid()}")
    shutil.copytree(made, beside, symlinks=True)
    shutil.rmtree(TREE, ignore_errors=True)
    beside.rename(TREE)


if __name__ == "__main__":
    sys.exit(main())
