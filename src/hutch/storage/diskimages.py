"""Disk images in other formats: look into them, bring them in, take them out, by qemu-img.

An image from elsewhere is not trusted: one that names further files (a backing file, a data
file, extents) is refused, as reading it would read whatever file of the host it names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from hutch.errors import (
    AlreadyExists,
    Busy,
    Denied,
    IntegrityError,
    InvalidArgument,
    NotFound,
    Unsupported,
)
from hutch.linux.files import AT_FDCWD, RENAME_NOREPLACE, renameat2
from hutch.plan.machine.disks import secret_option
from hutch.records import Progress, ProgressEvent, silent
from hutch.storage.diskkeys import DiskKey
from hutch.storage.faults import disk_errors

__all__ = ["FORMATS", "DiskFormat", "DiskImage", "change_snapshot", "check_disk"]
__all__ += ["convert_disk", "create_disk", "snapshots_in"]
__all__ += ["disk_info", "flatten_chain"]
__all__ += ["format_of", "import_disk", "rebase_disk", "require_whole", "resize_disk", "stamp_of"]

DiskFormat = Literal["raw", "qcow2", "vmdk", "vhdx", "vpc", "vdi", "luks"]
FORMATS: tuple[DiskFormat, ...] = ("raw", "qcow2", "vmdk", "vhdx", "vpc", "vdi", "luks")
"""What qemu-img reads and writes in one file. `vpc` is the older VHD; `luks` is raw, encrypted."""
_ENDINGS: dict[str, DiskFormat] = {"vhd": "vpc", "img": "raw"}
# The work of guessing one passphrase: it is done at each start, on the host.
_GUESS_MS = 500
_ATTEMPTS = 8

_FULL = ("No space left on device", "Disk quota exceeded")
_PERCENT = re.compile(rb"\((\d+(?:\.\d+)?)/100%\)")
_INFO_TIMEOUT_S = 60.0
_CHECK_TIMEOUT_S = 3600.0
_ENV = {"LC_ALL": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


class DiskImage(msgspec.Struct, frozen=True, kw_only=True):
    """What an image is: `size` as a machine sees it, `allocated` as it takes room, and the
    further files that it names. One that is encrypted is read with its key only."""

    path: str
    format: str
    size: int
    allocated: int
    references: tuple[str, ...] = ()
    encrypted: bool = False


def disk_info(path: str, *, format: DiskFormat | None = None) -> DiskImage:
    """Look into an image. Without `format` it is told from the content: only for images
    that no machine has written to, as a raw disk may pretend to be anything."""
    full = _existing(path)
    command = ["info", "--output=json", "-U"]
    if format is not None:
        command += ["-f", _checked(format)]
    with disk_errors(f"disk {full}"):
        done = _qemu_img([*command, full], _INFO_TIMEOUT_S)
        if done.returncode != 0:
            raise _failure(full, done.stderr)
    try:
        found: dict[str, Any] = msgspec.json.decode(done.stdout, type=dict[str, Any])
        return DiskImage(
            path=full,
            format=str(found["format"]),
            size=int(found["virtual-size"]),
            allocated=int(found.get("actual-size", 0)),
            references=tuple(sorted(_references(found, full))),
            encrypted=bool(found.get("encrypted")) or found["format"] == "luks",
        )
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as exc:
        raise IntegrityError(f"disk {full}: qemu-img says nothing sensible of it") from exc


def _references(found: dict[str, Any], path: str) -> set[str]:
    """Return the files that an image names beside itself."""
    names = {str(found[key]) for key in ("backing-filename",) if key in found}
    data = (found.get("format-specific") or {}).get("data") or {}
    if "data-file" in data:
        names.add(str(data["data-file"]))
    extents = data.get("extents") or ()
    names.update(str(e["filename"]) for e in extents if isinstance(e, dict) and "filename" in e)
    return names - {path, ""}


def import_disk(
    source: str,
    target: str,
    *,
    source_format: DiskFormat | None = None,
    format: DiskFormat = "raw",
    key: DiskKey | None = None,
    source_key: DiskKey | None = None,
    progress: Progress = silent,
) -> DiskImage:
    """Bring an image from elsewhere in: copied to `target`, in full and by itself.

    Raises `InvalidArgument` for an image that names further files or has a format that is
    not among `FORMATS`; else as `convert_disk`.
    """
    image = require_whole(disk_info(source, format=source_format), field="source")
    return convert_disk(
        source,
        target,
        source_format=_checked(image.format),
        format=format,
        key=key,
        source_key=source_key,
        progress=progress,
    )


def require_whole(image: DiskImage, *, field: str) -> DiskImage:
    """Return an image that stands by itself in a format we know, or raise `InvalidArgument`."""
    if image.references:
        raise InvalidArgument(
            f"disk {image.path}: needs further files: {', '.join(image.references)}",
            field=field,
            hint=f"qemu-img convert -O qcow2 {image.path} WHOLE.qcow2 where those files are",
        )
    if image.format not in FORMATS:
        raise InvalidArgument(
            f"disk {image.path}: expected {', '.join(FORMATS)}, got {image.format}", field=field
        )
    return image


def format_of(path: str, *, otherwise: DiskFormat = "raw") -> DiskFormat:
    """Return the format that a file's name ends in, `otherwise` where it has no ending; raise
    `InvalidArgument` for one that names no format."""
    _, dot, ending = os.path.basename(path).rpartition(".")
    if not dot:
        return otherwise
    found = _ENDINGS.get(ending.lower(), ending.lower())
    if found not in FORMATS:
        raise InvalidArgument(
            f"{path}: .{ending[:40]} is the ending of no format that is known",
            field="format",
            hint=f"give --format, or a name that ends in {', '.join((*FORMATS, *_ENDINGS))}",
        )
    return _checked(found)


def stamp_of(path: str) -> str:
    """Return what changes when a file is written to; "" where there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return ""
    return f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def create_disk(
    target: str,
    size: int,
    *,
    format: DiskFormat = "qcow2",
    base: str = "",
    base_format: DiskFormat = "raw",
    key: DiskKey | None = None,
) -> DiskImage:
    """Make an empty disk, or with `base` a qcow2 that keeps what differs from that disk,
    which must stay as it is. With `key` it is encrypted, which qcow2 and luks can be. Nothing
    is left of a failure."""
    if size < 1:
        raise InvalidArgument(f"must be at least a byte, got {size}", field="size")
    final = os.path.abspath(target)
    partial = f"{final}.part{os.urandom(4).hex()}"
    command = ["create", "-q", "-f", _checked(format)]
    if base:
        # As opening it to look would take its key: that is told when a machine opens it.
        command += ["-u", "-b", _existing(base), "-F", _checked(base_format)]
    try:
        with disk_errors(f"disk {final}"), _Secrets() as secrets:
            os.stat(os.path.dirname(final))
            command += _encrypted(format, key, secrets)
            words = [command[0], *secrets.objects, *command[1:], partial, str(size)]

            def create() -> None:
                done = _qemu_img(words, _INFO_TIMEOUT_S, secrets.fds)
                if done.returncode != 0:
                    raise _failure(final, done.stderr)

            _steadily(create)
            _publish(partial, final)
    finally:
        _unlink(partial)
    return disk_info(final, format=format)


def resize_disk(
    path: str, size: int, *, format: DiskFormat, key: DiskKey | None = None
) -> DiskImage:
    """Grow a disk that no machine uses; what is on it does not notice by itself."""
    image = disk_info(path, format=format)
    if size < image.size:
        raise InvalidArgument(
            f"a disk cannot shrink: it has {image.size} bytes, got {size}", field="size"
        )
    with disk_errors(f"disk {image.path}"), _Secrets() as secrets:
        opened = _opening(image.path, _checked(format), key, secrets)
        done = _qemu_img(
            ["resize", "-q", *secrets.objects, *opened, str(size)], _INFO_TIMEOUT_S, secrets.fds
        )
        if done.returncode != 0:
            raise _failure(image.path, done.stderr)
    return disk_info(path, format=format)


def change_snapshot(
    path: str, change: Literal["create", "apply", "delete"], name: str, *, key: DiskKey | None
) -> None:
    """Make, go back to, or delete a snapshot within a qcow2 that nobody has open."""
    full = _existing(path)
    with disk_errors(f"disk {full}"), _Secrets() as secrets:
        opened = _opening(full, "qcow2", key, secrets)
        if opened[0] == "-f":  # which this one does not know
            node = {"driver": "qcow2", "file": _file_node(full)}
            opened = [f"json:{msgspec.json.encode(node).decode()}"]
        command = ["snapshot", "-q", *secrets.objects, f"-{change[0]}", name, *opened]
        done = _qemu_img(command, _INFO_TIMEOUT_S, secrets.fds)
        if done.returncode != 0:
            raise _failure(full, done.stderr)


def snapshots_in(path: str) -> list[str]:
    """Return the names of the snapshots within a qcow2, whether it is open or not."""
    full = _existing(path)
    done = _qemu_img(["info", "--output=json", "-U", "-f", "qcow2", full], _INFO_TIMEOUT_S)
    if done.returncode != 0:
        raise _failure(full, done.stderr)
    found: dict[str, Any] = msgspec.json.decode(done.stdout, type=dict[str, Any])
    return [str(one.get("name", "")) for one in found.get("snapshots") or ()]


def rebase_disk(path: str, base: str, *, format: DiskFormat) -> None:
    """Name another file as what a qcow2 stands on, which has the same content."""
    with disk_errors(f"disk {path}"):
        command = ["rebase", "-u", "-f", "qcow2", "-F", _checked(format), "-b", base, path]
        done = _qemu_img(command, _INFO_TIMEOUT_S)
        if done.returncode != 0:
            raise _failure(path, done.stderr)


def check_disk(path: str, *, format: DiskFormat) -> str:
    """Examine the tables of a disk that no machine uses; return what is wrong, "" for nothing.

    Room that nothing refers to any more is no damage. Raises `Busy` where it is used.
    """
    full = _existing(path)
    with disk_errors(f"disk {full}"):
        done = _qemu_img(["check", "--output=json", "-f", _checked(format), full], _CHECK_TIMEOUT_S)
        # 2: damaged; 3: clusters are lost, which cost room; 63: the format has no check.
        if done.returncode in (0, 3, 63):
            return ""
        if done.returncode != 2:
            raise _failure(full, done.stderr)
    found = msgspec.json.decode(done.stdout, type=dict[str, Any])
    return f"{found.get('corruptions', 'some')} of its entries are damaged"


def convert_disk(
    source: str,
    target: str,
    *,
    source_format: DiskFormat,
    format: DiskFormat,
    compress: bool = False,
    key: DiskKey | None = None,
    source_key: DiskKey | None = None,
    base_key: DiskKey | None = None,
    progress: Progress = silent,
) -> DiskImage:
    """Copy a disk that no machine writes to into a new file of another format.

    What is empty stays a hole; `compress` is for qcow2. `source_key` opens the source,
    `base_key` what it stands on, and with `key` the target is encrypted. The target appears
    when it is whole: nothing is left of a failure. Raises `AlreadyExists`, `Exhausted`, and
    `IntegrityError` for what cannot be read as `source_format`.
    """
    full = _existing(source)
    final = os.path.abspath(target)
    if os.path.lexists(final):
        raise AlreadyExists(f"disk {final}: is there already")
    if compress and format != "qcow2":
        raise InvalidArgument(f"only qcow2 is compressed, got {format}", field="compress")
    partial = f"{final}.part{os.urandom(4).hex()}"
    try:
        with disk_errors(f"disk {final}"), _Secrets() as secrets:
            os.stat(os.path.dirname(final))
            made = _encrypted(format, key, secrets)
            opened = _opening(full, _checked(source_format), source_key, secrets, base_key)
            command = ["convert", "-p", *secrets.objects, "-O", _checked(format), *made]
            command += [*(["-c"] if compress else []), *opened, partial]
            _steadily(lambda: _convert(command, full, progress, secrets.fds))
            _publish(partial, final)
    finally:
        _unlink(partial)
    return disk_info(final, format=format)


class _Unsteady(Busy):
    """QEMU could not measure how many rounds a key takes on this host just now."""


def _steadily(act: Callable[[], None]) -> None:
    """Do what makes an encrypted disk. QEMU measures the processor first, and gives up where
    others have it for most of the time: it is given a few more attempts."""
    for left in reversed(range(_ATTEMPTS)):
        try:
            act()
            return
        except _Unsteady:
            if not left:
                raise


# ---- keys -------------------------------------------------------------------------------


class _Secrets:
    """The keys of one call of qemu-img, as descriptors that it inherits."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def __enter__(self) -> _Secrets:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self.fds:
            os.close(fd)

    def add(self, key: DiskKey) -> str:
        """Return the name by which a key is known there."""
        self.fds.append(key.open())
        return f"key{len(self.fds) - 1}"

    @property
    def objects(self) -> list[str]:
        """The options that define them."""
        made = (secret_option(f"key{index}", fd) for index, fd in enumerate(self.fds))
        return [word for text in made for word in ("--object", text)]


def _encrypted(format: str, key: DiskKey | None, secrets: _Secrets) -> list[str]:
    """Return the options that make a new disk an encrypted one."""
    if key is None:
        if format == "vpc":
            return ["-o", "force_size=on"]  # else its size is one of cylinders
        if format == "luks":
            raise InvalidArgument("a disk of format luks needs one", field="key")
        return []
    if format not in ("qcow2", "luks"):
        raise InvalidArgument(f"only qcow2 and luks are encrypted, got {format}", field="key")
    name = secrets.add(key)
    if format == "luks":
        return ["-o", f"key-secret={name},iter-time={_GUESS_MS}"]
    return ["-o", f"encrypt.format=luks,encrypt.key-secret={name},encrypt.iter-time={_GUESS_MS}"]


def _opening(
    path: str,
    format: str,
    key: DiskKey | None,
    secrets: _Secrets,
    base_key: DiskKey | None = None,
) -> list[str]:
    """Return the words by which a disk that is there is opened."""
    if key is None and base_key is None:
        if disk_info(path, format=_checked(format)).encrypted:
            raise _locked(path)
        return ["-f", format, path]
    options: dict[str, Any] = {
        "driver": format,
        "file": {"driver": "file", "filename": path},
    }
    if key is not None:
        name = secrets.add(key)
        if format == "luks":
            options["key-secret"] = name
        else:
            options["encrypt"] = {"format": "luks", "key-secret": name}
    if base_key is not None:
        options["backing"] = {"encrypt": {"format": "luks", "key-secret": secrets.add(base_key)}}
    return [f"json:{msgspec.json.encode(options).decode()}"]


def _locked(path: str) -> InvalidArgument:
    return InvalidArgument(f"disk {path}: is encrypted", field="key", hint="give its key")


# ---- qemu-img ---------------------------------------------------------------------------


def _publish(partial: str, final: str) -> None:
    """Give the file its name, which nobody may have."""
    fd = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    try:
        renameat2(AT_FDCWD, partial, AT_FDCWD, final, RENAME_NOREPLACE)
    except FileExistsError as exc:
        raise AlreadyExists(f"disk {final}: is there already") from exc


def flatten_chain(files: Sequence[str], target: str) -> None:
    """Copy a raw disk with qcow2 overlays on it (the lowest first) to a new raw file.

    The overlays' own word of what they are based on is not asked, and one that names another
    file is refused (`IntegrityError`). Raises `OSError` (ENOSPC) when the host's disk is full.
    """
    for path in files[1:]:
        if disk_info(path, format="qcow2").references:
            raise IntegrityError(f"disk {path}: names another file")
    node: dict[str, Any] = {"driver": "raw", "file": _file_node(files[0])}
    for path in files[1:]:
        node = {"driver": "qcow2", "file": _file_node(path), "backing": node}
    source = "json:" + msgspec.json.encode(node).decode()
    done = _qemu_img(["convert", "-q", "-O", "raw", source, target], None)
    if done.returncode != 0:
        raise _failure(files[-1], done.stderr)


def _file_node(path: str) -> dict[str, str]:
    return {"driver": "file", "filename": os.path.abspath(path)}


def _convert(command: list[str], source: str, progress: Progress, pass_fds: Sequence[int]) -> None:
    """Run qemu-img and hand on the percentages that it prints."""
    import tempfile

    from hutch.process.run import spawn

    with tempfile.TemporaryFile() as errors:
        argv = [_require(), *command]
        with spawn(argv, stdout=-1, stderr=errors, env=_ENV, pass_fds=pass_fds) as process:
            assert process.stdout is not None
            while text := os.read(process.stdout.fileno(), 4096):
                if found := _PERCENT.findall(text):
                    done = int(float(found[-1]))
                    progress(
                        ProgressEvent(
                            item=os.path.basename(source),
                            phase="converting",
                            done=done,
                            total=100,
                            unit="%",
                        )
                    )
            code = process.wait()
        errors.seek(0)
        said = errors.read(65536)
    if code != 0:
        raise _failure(source, said)


def _qemu_img(arguments: list[str], timeout_s: float | None, pass_fds: Sequence[int] = ()) -> Any:
    from hutch.process.run import run_command

    return run_command(
        [_require(), *arguments], env=_ENV, timeout_s=timeout_s, pass_fds=tuple(pass_fds)
    )


def _require() -> str:
    from hutch.host.programs import find_program

    program = find_program("qemu-img")
    if program is None:
        raise Unsupported("disk: qemu-img is not installed", hint="apt-get install qemu-utils")
    return program


def _existing(path: str) -> str:
    """Return the absolute path, which qemu-img cannot take for an address (`nbd:…`)."""
    full = os.path.abspath(path)
    if not os.path.exists(full):
        raise NotFound(f"disk {full}: no such file")
    if not os.path.isfile(full):
        raise InvalidArgument(f"disk {full}: is no regular file", field="disk")
    return full


def _checked(format: str) -> DiskFormat:
    for known in FORMATS:
        if format == known:
            return known
    raise InvalidArgument(f"expected one of {', '.join(FORMATS)}, got {format}", field="format")


def _failure(path: str, stderr: bytes) -> Exception:
    import errno

    said = stderr.decode(errors="replace")
    if any(text in said for text in _FULL):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    lines = [line for line in said.splitlines() if line.strip()] or ["no reason was given"]
    reason = lines[0].strip().removeprefix("qemu-img: ")
    if "Failed to get" in said and "lock" in said:
        return Busy(f"disk {path}: a machine uses it", hint="stop the machine first")
    if "accurate CPU usage" in said:
        return _Unsteady(
            f"disk {path}: the host is too busy to make a key's rounds", hint="try again"
        )
    if "nvalid password" in said:
        return Denied(f"disk {path}: the key does not open it")
    return IntegrityError(f"disk {path}: {reason}")


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
