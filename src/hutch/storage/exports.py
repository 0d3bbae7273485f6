"""Disk images (qcow2, encrypted or not) as files of a host: served by qemu-storage-daemon over
FUSE, mounted through a loop device.

It takes no device mapper and no kernel module: what QEMU can read, the host can mount. The key
of an encrypted one is in the memory of that process only, and gone with it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import msgspec

from hutch.errors import Denied, HutchError, IntegrityError, Unavailable, Unsupported
from hutch.storage.diskkeys import DiskKey
from hutch.storage.filemounts import mount_file, unmount_file, wait_detached
from hutch.storage.snapshots import QCOW2_FILE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hutch.qmp import Monitor

__all__ = ["EXPORTED", "SERVED", "close_image", "is_served", "monitor_of", "open_image"]
__all__ += ["serve_image"]

_PROGRAM = "qemu-storage-daemon"
SERVED = "served.raw"
"""The file in a volume's directory that shows the image, while it is served."""
_SOCKET, _LOG = "export.sock", "export.log"
EXPORTED = "disk"
"""The name of the image there."""
_START_S = 60.0
_STOP_S = 60.0


def open_image(directory: str, point: str, *, key: DiskKey | None) -> None:
    """Serve the image in a volume's directory and mount it at `point`; nothing to do where
    that is so. The caller sees to it that nobody else does so at the same time.

    Raises `Denied` for a wrong key, `Unsupported` without root or the program.
    """
    if is_served(directory) and os.path.ismount(point):
        return
    close_image(directory, point)  # what a server that was killed has left
    if os.geteuid() != 0:
        raise Unsupported("volume: disk images are mounted as root", hint="run as root")
    os.makedirs(point, 0o700, exist_ok=True)
    with ExitStack() as undo:
        undo.callback(close_image, directory, point)
        serve_image(directory, key=key)
        mount_file(f"{directory}/{SERVED}", point, "ext4", "discard")
        undo.pop_all()


def close_image(directory: str, point: str) -> None:
    """Unmount it and end its server, which writes out what it has; safe to repeat."""
    if os.path.ismount(point):
        _write_out(point)
        unmount_file(point)
        # The mounts of a container that has just ended are gone a moment later.
        wait_detached(f"{directory}/{SERVED}")
    with suppress(HutchError, OSError), monitor_of(directory) as monitor:
        monitor.execute("quit")
        _wait_end(monitor)
    # Its FUSE mount stays when it was killed.
    unmount_file(f"{directory}/{SERVED}")
    for name in (_SOCKET, SERVED):
        with suppress(FileNotFoundError):
            os.unlink(f"{directory}/{name}")


def _write_out(point: str) -> None:
    from hutch.linux.files import syncfs

    # Where its server was killed there is nowhere to write to.
    with suppress(OSError):
        fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            syncfs(fd)
        finally:
            os.close(fd)


@contextmanager
def monitor_of(directory: str) -> Iterator[Monitor]:
    """Converse with the server of a volume's image; `Unavailable` where there is none."""
    from hutch.qmp import conversation

    with conversation(f"{directory}/{_SOCKET}") as monitor:
        yield monitor


def is_served(directory: str) -> bool:
    """Tell whether a volume's image is served; one whose server was killed is not."""
    if not os.path.lexists(f"{directory}/{_SOCKET}"):
        return False
    try:
        with monitor_of(directory):
            return True
    except (HutchError, OSError):
        return False


def serve_image(directory: str, *, key: DiskKey | None) -> None:
    """Start the server of an image and wait until it serves; `close_image` ends it."""
    from hutch.host.programs import find_program
    from hutch.process.detached import start_detached

    program = find_program(_PROGRAM)
    if program is None:
        raise Unsupported(
            f"volume: {_PROGRAM} is not installed", hint="apt-get install qemu-system-common"
        )
    with open(f"{directory}/{SERVED}", "wb"):
        pass
    with ExitStack() as held:
        listener = _listener(f"{directory}/{_SOCKET}")
        held.callback(listener.close)
        fds = [listener.fileno()]
        argv = [program]
        if key is not None:
            fd = key.open()
            held.callback(os.close, fd)
            fds.append(fd)
            argv += ["--object", f"secret,id=key,file=/proc/self/fd/{fd}"]
        argv += _options(directory, listener.fileno(), encrypted=key is not None)
        start_detached(argv, log=f"{directory}/{_LOG}", pass_fds=fds)
    _wait_served(directory)


def _options(directory: str, listener: int, *, encrypted: bool) -> list[str]:
    image = {
        "driver": "qcow2",
        "node-name": EXPORTED,
        "discard": "unmap",
        "detect-zeroes": "unmap",
        # What an image's header names is never opened.
        "backing": None,
        "file": {
            "driver": "file",
            "filename": f"{directory}/{QCOW2_FILE}",
            "discard": "unmap",
        },
    }
    if encrypted:
        image["encrypt"] = {"format": "luks", "key-secret": "key"}
    export = {
        "type": "fuse",
        "id": "export",
        "node-name": EXPORTED,
        "mountpoint": f"{directory}/{SERVED}",
        "writable": True,
        "allow-other": "off",
    }
    return [
        *("--blockdev", msgspec.json.encode(image).decode()),
        *("--export", msgspec.json.encode(export).decode()),
        *("--chardev", f"socket,id=monitor,fd={listener},server=on,wait=off"),
        *("--monitor", "chardev=monitor"),
    ]


def _listener(path: str) -> socket.socket:
    """Listen before the server starts: who connects early waits, and is told if it ends. The
    path may be of any length."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found.bind(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
        os.chmod(path, 0o600)
        found.listen(4)
    except BaseException:
        found.close()
        raise
    finally:
        os.close(directory)
    return found


def _wait_served(directory: str) -> None:
    """Wait for its greeting, which comes when all that it was told to open is open."""
    from hutch.qmp import Monitor

    try:
        with Monitor.connect(f"{directory}/{_SOCKET}", timeout_s=_START_S) as monitor:
            found = monitor.execute("query-block-exports")
    except (HutchError, OSError) as exc:
        raise _refusal(directory) from exc
    if not found:
        raise _refusal(directory)


def _refusal(directory: str) -> HutchError:
    """Return what the server said before it ended; a key is never in it."""
    try:
        with open(f"{directory}/{_LOG}", errors="replace") as file:
            said = file.read(65536)
    except OSError:
        said = ""
    if "nvalid password" in said:
        return Denied("volume: the key does not open it")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    reason = lines[0].removeprefix(f"{_PROGRAM}: ") if lines else "it ended without a word"
    if "lock" in said and "Failed to get" in said:
        return Unavailable("volume: another process has its image open")
    return IntegrityError(f"volume: {_PROGRAM}: {reason}")


def _wait_end(monitor: Monitor) -> None:
    """Wait until the server hangs up, which it does when its image is written out and closed."""
    with socket.socket(fileno=os.dup(monitor.fileno())) as sock:
        sock.settimeout(_STOP_S)
        try:
            while sock.recv(4096):
                pass
        except ConnectionError:
            return
        except TimeoutError:
            raise Unavailable(f"volume: {_PROGRAM} has not ended after {_STOP_S:.0f} s") from None
