"""A root file system of one static program: busybox, its applets as links, the usual files.

Made from the host's busybox or from the package of Debian's mirror, without a registry. The
same busybox gives the same bytes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hutch.errors import Unsupported

__all__ = ["busybox_program", "fetch_busybox", "is_static", "write_busybox_tar"]

_PT_INTERP = 3
_HINT = "apt-get install busybox-static"
_DIRECTORIES = (
    *("bin", "dev", "etc", "home", "lib", "mnt", "opt", "proc", "run", "sbin", "srv", "sys"),
    *("usr", "usr/bin", "usr/sbin", "var", "var/cache", "var/lib", "var/log", "var/spool"),
    *("var/www",),
)
_FILES = {
    "etc/passwd": (
        "root:x:0:0:root:/root:/bin/sh\n"
        "daemon:x:1:1:daemon:/usr/sbin:/bin/false\n"
        "bin:x:2:2:bin:/bin:/bin/false\n"
        "sys:x:3:3:sys:/dev:/bin/false\n"
        "www-data:x:33:33:www-data:/var/www:/bin/false\n"
        "operator:x:37:37:Operator:/var:/bin/false\n"
        "nobody:x:65534:65534:nobody:/home:/bin/false\n"
    ),
    "etc/group": (
        "root:x:0:\ndaemon:x:1:\nbin:x:2:\nsys:x:3:\nadm:x:4:\ntty:x:5:\ndisk:x:6:\n"
        "mail:x:8:\naudio:x:29:\nwww-data:x:33:\noperator:x:37:\nutmp:x:43:\nvideo:x:44:\n"
        "staff:x:50:\nusers:x:100:\nnogroup:x:65534:\n"
    ),
    "etc/shadow": "root:*:::::::\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "etc/profile": "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n",
    "etc/shells": "/bin/sh\n/bin/ash\n",
}


def is_static(path: Path) -> bool:
    """Tell whether a file is an ELF program (64 bit) that needs no loader."""
    try:
        with open(path, "rb") as file:
            header = file.read(64)
            if len(header) < 64 or header[:5] != b"\x7fELF\x02":
                return False
            (offset,) = struct.unpack_from("<Q", header, 32)
            size, count = struct.unpack_from("<HH", header, 54)
            if size < 4 or count > 256:
                return False
            file.seek(offset)
            table = file.read(size * count)
    except OSError:
        return False
    kinds = [struct.unpack_from("<I", table, i)[0] for i in range(0, len(table) - 3, size)]
    return _PT_INTERP not in kinds


def busybox_program(workspace: Path) -> Path:
    """Return a static busybox: the host's, else from the package, fetched into `workspace`."""
    for directory in ("/bin", "/usr/bin", *os.environ.get("PATH", "").split(os.pathsep)):
        path = Path(directory) / "busybox"
        if directory and is_static(path):
            return path
    try:
        return fetch_busybox(workspace)
    except FileNotFoundError as exc:
        raise Unsupported(
            "busybox: no static busybox on this host, and no apt", hint=_HINT
        ) from exc


def fetch_busybox(workspace: Path) -> Path:
    """Get the package busybox-static from the host's mirror and unpack it; nothing is installed."""
    from hutch.host.programs import find_program
    from hutch.process.run import run_command

    if find_program("apt-get") is None or find_program("dpkg-deb") is None:
        raise Unsupported("busybox: no static busybox on this host, and no apt", hint=_HINT)
    # As root apt would drop to a user of its own, who may not write here.
    fetch = ["apt-get", "-o", "APT::Sandbox::User=root", "download", "-q", "busybox-static"]
    fetched = run_command(fetch, cwd=str(workspace), timeout_s=120)
    package = next(workspace.glob("busybox-static_*.deb"), None)
    if fetched.returncode != 0 or package is None:
        said = fetched.stderr.decode(errors="replace").strip().splitlines()[-1:]
        reason = said[0] if said else "apt-get failed"
        raise Unsupported(f"busybox: no static busybox on this host: {reason}", hint=_HINT)
    unpacked = workspace / "busybox-static"
    run_command(["dpkg-deb", "--extract", str(package), str(unpacked)], timeout_s=60)
    for program in (unpacked / "bin/busybox", unpacked / "usr/bin/busybox"):
        if is_static(program):
            return program
    raise Unsupported("busybox: the package holds no static busybox", hint=_HINT)


def _applets(program: Path) -> Iterator[str]:
    """Yield the paths at which this busybox wants its applets linked (`usr/bin/env`)."""
    from hutch.process.run import run_command

    done = run_command([str(program), "--list-full"], timeout_s=10)
    for line in done.stdout.decode(errors="replace").splitlines():
        path = line.strip().lstrip("/")
        if path and path not in ("bin/busybox", "linuxrc") and ".." not in path:
            yield path


def write_busybox_tar(stream: BinaryIO, program: Path, *, mtime: int) -> None:
    """Write the root file system as a tar, every entry with the same time."""
    import io
    import tarfile

    def entry(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.mtime = kind, mode, mtime
        info.uname = info.gname = "root"
        return info

    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for name in _DIRECTORIES:
            archive.addfile(entry(name, tarfile.DIRTYPE, 0o755))
        archive.addfile(entry("root", tarfile.DIRTYPE, 0o700))
        for name in ("tmp", "var/tmp"):
            archive.addfile(entry(name, tarfile.DIRTYPE, 0o1777))
        content = program.read_bytes()
        binary = entry("bin/busybox", tarfile.REGTYPE, 0o755)
        binary.size = len(content)
        archive.addfile(binary, io.BytesIO(content))
        for path in sorted(set(_applets(program))):
            link = entry(path, tarfile.SYMTYPE, 0o777)
            link.linkname = "busybox" if path.startswith("bin/") else "/bin/busybox"
            archive.addfile(link)
        for name, text in _FILES.items():
            data = text.encode()
            mode = 0o640 if name == "etc/shadow" else 0o644
            plain = entry(name, tarfile.REGTYPE, mode)
            plain.size = len(data)
            archive.addfile(plain, io.BytesIO(data))
