"""A real ordinary user, with a copy of the library and a root of his own."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

UID = 54321
NOBODY = 65534
# In a mount namespace where /etc/subuid and /etc/subgid give the user nobody a range.
WITH_RANGE = """
mount --make-rprivate / && mount --bind "$1" /etc/subuid && mount --bind "$1" /etc/subgid &&
shift && exec setpriv --reuid 65534 --regid 65534 --clear-groups "$@"
"""
Hutch = Callable[..., subprocess.CompletedProcess[str]]

# Namespaces are counted where they are made: in this one there may be none. To write its
# maps a process outside is needed, which waits for the user's program and ends like it.
REFUSING = f"""
import os, sys
sys.path[:0] = os.environ["PYTHONPATH"].split(":")
from hutch.linux.namespaces import CLONE_NEWUSER, unshare
from hutch.linux import prctl
born, mapped = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    unshare(CLONE_NEWUSER)
    os.write(born[1], b"1")
    os.read(mapped[0], 1)
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")
    os.setgroups([])
    os.setresgid({UID}, {UID}, {UID})
    os.setresuid({UID}, {UID}, {UID})
    prctl.prctl(prctl.PR_SET_DUMPABLE, 1)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
os.read(born[0], 1)
for name in ("uid_map", "gid_map"):
    with open(f"/proc/{{child}}/{{name}}", "w") as file:
        file.write("0 0 100000")
os.write(mapped[1], b"1")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@contextmanager
def installed(
    uid: int, prefix: list[str], *, timeout_s: float = 240, **identity: Any
) -> Iterator[Hutch]:
    """Run Python as a user who has a copy of hutch and a root of his own; nothing is left.

    With `refusing` it is run where nobody may make a namespace.
    """
    # pytest's own directories are closed to other users.
    home = Path(tempfile.mkdtemp(prefix="hutch-rootless-"))
    # A copy: the checkout and its interpreter may lie where only root may look.
    shutil.copytree(Path(__file__).parents[2] / "src" / "hutch", home / "lib" / "hutch")
    for name in ("msgspec", "isal", "zstandard", "urllib3"):
        package = importlib.import_module(name).__file__
        assert package is not None
        shutil.copytree(Path(package).parent, home / "lib" / name)
    os.chmod(home, 0o755)
    for path in (home, *home.rglob("*")):
        os.chown(path, uid, uid, follow_symlinks=False)
    program = "/usr/bin/python3" if sys.version_info[:2] == system_python() else sys.executable
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(home),
        "HUTCH_ROOT": str(home / "root"),
        "PYTHONPATH": str(home / "lib"),
    }

    def run(*arguments: str, refusing: bool = False) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*prefix, program, *(("-c", REFUSING) if refusing else ()), *arguments],
            **({} if refusing else identity),
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    try:
        yield run
    finally:
        shutil.rmtree(home, onerror=_gone_is_fine)


@contextmanager
def installed_with_range(directory: Path, *, timeout_s: float = 240) -> Iterator[Hutch]:
    """Run Python as a user with 65,536 subordinate ids; `directory` gets a file."""
    ranges = directory / "ranges"
    ranges.write_text("nobody:700000:65536\n")
    prefix = ["unshare", "-m", "sh", "-c", WITH_RANGE, "sh", str(ranges)]
    with installed(NOBODY, prefix, timeout_s=timeout_s) as run:
        yield run


def _gone_is_fine(_function: object, path: str, _info: object) -> None:
    """A supervisor's last command may still close the store while its files are removed."""
    if os.path.lexists(path):
        raise


@pytest.fixture
def python() -> Iterator[Hutch]:
    """Run Python as a user without subordinate ids, who has a root of his own."""
    with installed(UID, [], user=UID, group=UID, extra_groups=[]) as run:
        yield run


def system_python() -> tuple[int, int] | None:
    done = subprocess.run(
        ["/usr/bin/python3", "-c", "import sys; print(*sys.version_info[:2])"],
        capture_output=True,
        text=True,
    )
    words = done.stdout.split()
    return (int(words[0]), int(words[1])) if len(words) == 2 else None
