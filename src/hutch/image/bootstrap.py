"""Make base images from a distribution's own packages, with no registry within reach.

`debian:SUITE` and `ubuntu:SUITE` come through mmdebstrap from the places and with the keys
that the host's apt uses; `busybox` is one static program. The root file system is streamed
as a tar into the importer. The same packages and the same epoch give the same image.

An image's metadata names no mirror. Its `etc/apt/sources.list` says where the packages came
from, so that apt works inside, but holds none of the host's credentials.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from hutch.errors import InvalidArgument, Unavailable, Unsupported
from hutch.image.apt import (
    Source,
    acquire_options,
    load_sources,
    sources_for,
    without_credentials,
)
from hutch.image.busybox import busybox_program, write_busybox_tar
from hutch.image.records import RuntimeConfig
from hutch.records import Progress, ProgressEvent, silent
from hutch.storage.faults import explain

__all__ = ["VARIANTS", "BaseImage", "bootstrap_tar", "parse_base"]

VARIANTS = ("minbase", "essential", "apt", "required", "important", "standard", "buildd")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SUITE = re.compile(r"^[a-z][a-z0-9-]{1,40}$")
_PACKAGE = re.compile(r"^[a-z0-9][a-z0-9+.:~-]{1,120}$")
_DATE = re.compile(rb"^Date: (.+)$", re.MULTILINE)
# For files made while bootstrapping where neither the caller nor the archive names a time.
_FALLBACK_EPOCH = 946684800
_TMPFS_MEMORY = 6 << 30
_IN_MEMORY = 'mount -t tmpfs -o mode=1777,size=4g hutch-bootstrap "$TMPDIR" && exec "$@"'
_KEPT_ENVIRONMENT = (
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR"),
)
# Run by mmdebstrap outside the new root ($1): nothing of the host stays in the image.
_FORGET_HOST = 'rm -f "$1"/etc/hostname "$1"/etc/resolv.conf "$1"/etc/apt/apt.conf.d/99mmdebstrap'
_CLEAN_SOURCES = (
    'rm -f "$1"/etc/apt/sources.list.d/*hutch.list && cp "$HUTCH_SOURCES" "$1"/etc/apt/sources.list'
    ' && chmod 644 "$1"/etc/apt/sources.list'
)


class BaseImage(msgspec.Struct, frozen=True, kw_only=True):
    """What to bootstrap, checked: a distribution and a suite, or busybox with neither."""

    distribution: str
    suite: str = ""
    variant: str = "minbase"
    packages: tuple[str, ...] = ()
    mirror: str | None = None
    keyring: str | None = None

    @property
    def reference(self) -> str:
        """The name the image gets where the caller gives none."""
        return f"{self.distribution}:{self.suite or 'latest'}"

    @property
    def config(self) -> RuntimeConfig:
        """How the image runs."""
        shell = "sh" if self.distribution == "busybox" else "bash"
        return RuntimeConfig(env=(f"PATH={_PATH}",), cmd=(shell,))


def parse_base(
    what: str,
    *,
    variant: str = "minbase",
    packages: Sequence[str] = (),
    mirror: str | None = None,
    keyring: str | None = None,
) -> BaseImage:
    """Return the checked request for `debian:bookworm`, `ubuntu:noble` or `busybox`."""
    distribution, _, suite = what.partition(":")
    if distribution == "busybox":
        if suite not in ("", "latest") or packages or mirror:
            raise InvalidArgument("busybox has no suites, packages or mirror", field="image")
        return BaseImage(distribution="busybox")
    if distribution not in ("debian", "ubuntu") or not _SUITE.match(suite):
        raise InvalidArgument(
            f"expected debian:SUITE, ubuntu:SUITE or busybox, got {what!r}",
            field="image",
            hint="hutch image bootstrap debian:bookworm",
        )
    if variant not in VARIANTS:
        raise InvalidArgument(
            f"expected one of {', '.join(VARIANTS)}, got {variant!r}", field="variant"
        )
    for number, package in enumerate(packages):
        if not _PACKAGE.match(package):
            raise InvalidArgument(f"not a package name: {package!r}", field=f"packages[{number}]")
    if mirror is not None and not re.match(r"^(?:https?|file|copy):/\S+$", mirror):
        raise InvalidArgument(f"expected the URI of an archive, got {mirror!r}", field="mirror")
    if keyring is not None and not os.path.isfile(keyring):
        raise InvalidArgument(f"no such file: {keyring!r}", field="keyring")
    return BaseImage(
        distribution=distribution,
        suite=suite,
        variant=variant,
        packages=tuple(packages),
        mirror=mirror,
        keyring=keyring,
    )


@contextmanager
def bootstrap_tar(
    base: BaseImage,
    workspace: Path,
    *,
    epoch: int | None = None,
    progress: Progress = silent,
) -> Iterator[BinaryIO]:
    """Make the root file system and yield it as a tar, open for reading from its start.

    The tar has no name and is gone when the block is left. `workspace` is an empty
    directory of the caller's, on a disk with room for the packages; it may hold leftovers
    afterwards. `epoch` (seconds; else SOURCE_DATE_EPOCH, else the date of the suite's
    release) is the time given to files that bootstrapping makes.

    Raises `Unsupported` where a tool is missing and `Unavailable` where the packages could
    not be had.
    """
    import tempfile

    with tempfile.TemporaryFile(dir=workspace) as tar:
        if base.distribution == "busybox":
            progress(ProgressEvent(item=base.reference, phase="copying"))
            program = busybox_program(workspace)
            write_busybox_tar(tar, program, mtime=_given_epoch(epoch) or _FALLBACK_EPOCH)
        else:
            _write_suite(base, workspace, tar, epoch, progress)
        tar.seek(0)
        yield tar


def _given_epoch(epoch: int | None) -> int | None:
    """Return the caller's epoch, else that of SOURCE_DATE_EPOCH, else None."""
    if epoch is not None:
        return epoch
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    return int(text) if text.isascii() and text.isdigit() else None


def _write_suite(
    base: BaseImage, workspace: Path, tar: BinaryIO, epoch: int | None, progress: Progress
) -> None:
    """Let mmdebstrap write the suite to `tar`, as root in a mount namespace of its own."""
    from hutch.process.run import run_command

    tool = _require_mmdebstrap()
    sources = _sources(base)
    if epoch is None:
        epoch = _given_epoch(None)
    if epoch is None:
        progress(ProgressEvent(item=base.reference, phase="asking for the release"))
        epoch = _release_epoch(sources, base.suite, workspace)
    command = [*_wrapper(), *_mmdebstrap(tool, base, sources, workspace)]
    tar.write(_directory_entry("./dev", epoch))
    tar.flush()
    progress(ProgressEvent(item=base.reference, phase="installing packages"))
    done = run_command(
        command, env=_environment(workspace, epoch), stdout_fd=tar.fileno(), timeout_s=3600
    )
    if done.returncode != 0:
        output = done.stderr.decode(errors="replace")
        if _lacks_ids(output):
            # Ids are looked for first; without namespaces they would be of no use.
            output = run_command(["unshare", "--user", "true"]).stderr.decode(errors="replace")
            if not output:
                raise Unsupported(
                    f"{base.reference}: packages have files of several users, and this user has "
                    "no ids for them",
                    hint="apt-get install uidmap, and usermod --add-subuids 100000-165535 "
                    "--add-subgids 100000-165535 NAME (a range that nobody has); or run as root",
                )
        if _was_refused(output):
            raise Unsupported(
                f"{base.reference}: this host lets this user make no namespaces, which installing "
                "packages takes",
                hint="run as root outside of containers, or bootstrap busybox, which needs none",
            )
        if "No space left on device" in output or _is_full(tar.fileno()):
            raise explain(OSError(errno.ENOSPC, "no space left on device"), base.reference)
        raise _failure(base, output)


def _was_refused(output: str) -> bool:
    """Tell whether mmdebstrap was refused a namespace; where there may be none of them, the
    kernel says that there is no space. Root is refused them too, in a container."""
    return re.search(r"\bunshare\b[^\n]*failed", output) is not None


def _lacks_ids(output: str) -> bool:
    """Tell whether it was for want of a range in /etc/subuid and /etc/subgid, or of uidmap."""
    return re.search(r"/etc/sub[ug]id|new[ug]idmap|unshare: you \(", output) is not None


def _is_full(fd: int) -> bool:
    """Tell whether the disk of the tar is full: whoever fails to write to it may not say so."""
    status = os.fstatvfs(fd)
    return status.f_bavail * status.f_frsize < 1 << 20


def _require_mmdebstrap() -> str:
    from hutch.host.programs import find_program

    tool = find_program("mmdebstrap")
    if tool is None:
        raise Unsupported(
            "mmdebstrap is not installed", hint="apt-get install mmdebstrap, then try again"
        )
    return tool


def _sources(base: BaseImage) -> list[Source]:
    """Return where to fetch from: the given mirror, else the host's own places.

    Empty where the host knows none for this distribution: mmdebstrap's default then holds.
    """
    known = load_sources()
    found = sources_for(base.distribution, base.suite, known)
    if base.mirror is None:
        return found
    components = ("main", "universe") if base.distribution == "ubuntu" else ("main",)
    return [
        Source(
            uri=base.mirror,
            suites=(base.suite,),
            components=components,
            signed_by=base.keyring or (found[0].signed_by if found else ""),
        )
    ]


def _release_epoch(sources: Sequence[Source], suite: str, workspace: Path) -> int:
    """Return the date of the suite's release file: the same until its next point release."""
    from email.utils import parsedate_to_datetime

    from hutch.errors import HutchError
    from hutch.process.run import run_command

    target = workspace / "InRelease"
    for source in sources[:1]:
        url = f"{source.uri.rstrip('/')}/dists/{suite}/InRelease"
        command = ["/usr/lib/apt/apt-helper", "-o", "APT::Sandbox::User=root"]
        try:
            run_command([*command, "download-file", url, str(target)], timeout_s=120)
            match = _DATE.search(target.read_bytes()[:65536])
            if match:
                return int(parsedate_to_datetime(match[1].decode()).timestamp())
        except (OSError, ValueError, HutchError):
            continue
    return _FALLBACK_EPOCH


def _wrapper() -> list[str]:
    """Return what to put before mmdebstrap, so that it and all it starts die with us.

    It is the first process of a mount and process namespace of its own: what it mounts and
    starts there goes with it. An ordinary user is root of a user namespace with the
    subordinate ids: mmdebstrap's own (`--mode=unshare`) does not have the user's id in it, so
    nothing in a private directory could be read. The new root is built in memory where there
    is plenty: dpkg's many synchronous writes then cost nothing.
    """
    # The signal comes to the one process it is set for, and the namespace's end to the rest.
    # A session of its own: mmdebstrap hangs up on its whole process group where it fails.
    tied = ["setpriv", "--pdeathsig", "KILL", "setsid"]
    plenty = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") > _TMPFS_MEMORY
    script = _IN_MEMORY if plenty else 'exec "$@"'
    namespaces = ["--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
    if os.geteuid() != 0:
        namespaces += ["--user", "--map-root-user", "--map-auto"]
    return [*tied, "unshare", *namespaces, "--propagation", "private", "sh", "-c", script, "sh"]


def _mmdebstrap(
    tool: str, base: BaseImage, sources: Sequence[Source], workspace: Path
) -> list[str]:
    from hutch.process.run import run_command

    (workspace / "build").mkdir()
    command = [
        *(tool, "--format=tar", "--skip=output/dev", f"--variant={base.variant}"),
        "--mode=root",
    ]
    if base.packages:
        command.append(f"--include={','.join(base.packages)}")
    if base.keyring:
        command.append(f"--keyring={base.keyring}")
    dump = run_command(["apt-config", "dump"], timeout_s=30).stdout.decode(errors="replace")
    if options := acquire_options(dump):
        # In a file, not on the command line, where everybody would see a proxy's password.
        command.append(f"--aptopt={_private_file(workspace / 'apt.conf', options)}")
    command += [f"--customize-hook={_FORGET_HOST}", base.suite, "-"]
    if sources:
        clean = [_without_credentials(source) for source in sources]
        _private_file(workspace / "clean.list", [line for s in clean for line in s.lines()])
        command.insert(-2, f"--customize-hook={_CLEAN_SOURCES}")
        lines = [line for s in sources for line in s.lines()]
        command.append(_private_file(workspace / "hutch.list", lines))
    return command


def _without_credentials(source: Source) -> Source:
    return msgspec.structs.replace(source, uri=without_credentials(source.uri))


def _private_file(path: Path, lines: Sequence[str]) -> str:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))
    return str(path)


def _environment(workspace: Path, epoch: int) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    return {
        **kept,
        "PATH": _PATH,
        "HOME": "/root" if os.geteuid() == 0 else os.environ.get("HOME", "/"),
        "LANG": "C.UTF-8",
        "TMPDIR": str(workspace / "build"),
        "SOURCE_DATE_EPOCH": str(epoch),
        "HUTCH_SOURCES": str(workspace / "clean.list"),
    }


def _directory_entry(name: str, epoch: int) -> bytes:
    import tarfile

    info = tarfile.TarInfo(name)
    info.type, info.mode, info.mtime = tarfile.DIRTYPE, 0o755, epoch
    return info.tobuf(tarfile.GNU_FORMAT)


def _failure(base: BaseImage, output: str) -> Unavailable | Unsupported:
    """Return the error that tells what mmdebstrap said, with the cure of the usual ones."""
    lines = [line for line in output.splitlines() if line.startswith("E:")]
    last = [line.strip() for line in output.splitlines() if line.strip()][-1:]
    said = "; ".join(line[2:].strip() for line in lines[:3]) or (last or ["no reason was given"])[0]
    if "NO_PUBKEY" in output or "not signed" in output:
        return Unsupported(
            f"{base.reference}: the host has no key of this archive: {said}",
            hint=f"install the archive keyring of {base.distribution} or give --keyring FILE",
        )
    return Unavailable(
        f"{base.reference}: the packages could not be installed: {said}",
        hint="does apt-get update work here, and does the suite exist there?",
    )
