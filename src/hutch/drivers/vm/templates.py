"""Templates: a booted guest with its agent waiting, kept as memory and device state.

The first start of a machine of some kernel and shape boots one; it is saved and ends, and all
starts go on from there, copy-on-write. Its memory is a sealed memory file: a clone maps it
privately and cannot write to it, whatever becomes of its QEMU. A process of its own holds
that file (`hutch-vmm hold`) for as long as somebody asks for it now and then; with the
process, or with the host, the template goes, and the next start makes another.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec

from hutch.drivers.base import TemplateUse
from hutch.drivers.failures import launching, machine_failures
from hutch.drivers.vm.boot import QMP_SOCKET, Booted
from hutch.drivers.vm.sandbox import listen_at
from hutch.drivers.vm.shares import fill_memory
from hutch.errors import HutchError
from hutch.host.facts import has_capability
from hutch.linux.locks import lock_file
from hutch.plan import ops
from hutch.process.launcher import Launcher
from hutch.process.records import is_alive, read_pid
from hutch.process.supervisor import Supervisor
from hutch.process.vmm import vmm_path
from hutch.records import Progress, ProgressEvent, silent
from hutch.storage.trash import Trash

__all__ = ["Making", "Template", "Templates"]

HOLD_SOCKET = "memory.sock"
# Long enough for a person between two commands, short enough not to keep a host's memory.
IDLE_S = 3600
_BOOT_S = 120.0
_BUILD_WAIT_S = 300.0
_END_S = 30.0
_CAP_SETPCAP = 8
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL

BootTemplate = Callable[[Path, int], Booted]
"""Boot a machine whose memory is this file, shared; its run directory is the path."""


def _wait_ready(run: Path, booted: Booted) -> None:
    booted.monitor.wait_ready(_BOOT_S)


class Making(msgspec.Struct, frozen=True, kw_only=True):
    """How a template comes to be: a memory file of `size` with what `source` has (-1: empty),
    and a machine on it that `boot` starts and `bring_up` brings to where it is saved."""

    size: int
    boot: BootTemplate
    source: int = -1
    bring_up: Callable[[Path, Booted], None] = _wait_ready


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """A template at hand: open descriptors, the caller's to close.

    `disk_size` is the size of the writable disk that a clone's guest is to be told of, 0
    where it is what the guest has seen in the template."""

    key: str
    memory: int
    state: int
    disk_size: int = 0

    def identity(self) -> tuple[int, int]:
        """Return what tells it from another one that was made under the same key."""
        status = os.fstat(self.state)
        return status.st_dev, status.st_ino


class Templates:
    """The templates of one root, in `<root>/templates/<key>/`."""

    def __init__(self, root: Path, launcher: Launcher) -> None:
        self._root = root
        self._directory = root / "templates"
        self._launcher = launcher

    def ensure(self, key: str, making: Making, progress: Progress = silent) -> Template:
        """Return the template, booted and saved first where there is none.

        Of several who want the same one, one makes it and the others wait; `progress` is told.
        """
        found = self.find(key)
        if found is not None:
            return found

        def tell(phase: str) -> None:
            progress(ProgressEvent(item=f"template {key[:12]}", phase=phase))

        tell("booting, for this and later starts")
        with self.locked(key):
            found = self.find(key)
            if found is not None:
                return found
            made = self.make(key, making)
        tell("ready")
        return made

    @contextmanager
    def locked(self, key: str, timeout_s: float = _BUILD_WAIT_S) -> Iterator[None]:
        """Hold the right to make or remove the template of a key; `Busy` where another does."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        with lock_file(self._directory / f".{key}.lock", timeout_s=timeout_s):
            yield

    def directory(self, key: str) -> Path:
        """Return where a template is, or would be."""
        return self._directory / key

    def find(self, key: str) -> Template | None:
        """Return the template if it is whole: a state on disk, and a process with its memory."""
        directory = self.directory(key)
        try:
            state = os.open(directory / "state", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            memory = _ask_for_memory(directory / "run")
        except BaseException:
            os.close(state)
            raise
        if memory is None:
            os.close(state)
            return None
        return Template(key=key, memory=memory, state=state)

    def make(self, key: str, making: Making) -> Template:
        """Boot, save, seal, and hand the memory to its holder. The key is locked."""
        directory = self._directory / key
        Trash(self._root).discard(str(directory))
        run = directory / "run"
        run.mkdir(mode=0o700, parents=True)
        with ExitStack() as undo:
            undo.callback(Trash(self._root).discard, str(directory))
            memory = os.memfd_create(f"hutch-{key[:8]}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            undo.callback(os.close, memory)
            if making.source >= 0:
                fill_memory(memory, making.source, making.size)
            else:
                os.ftruncate(memory, making.size)
            partial = directory / ".state"
            with open(partial, "xb") as state:
                self._boot_and_save(run, memory, state.fileno(), making)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
            self._hold(run, memory)
            os.rename(partial, directory / "state")
            opened = os.open(directory / "state", os.O_RDONLY | os.O_CLOEXEC)
            undo.pop_all()
        return Template(key=key, memory=memory, state=opened)

    def _boot_and_save(self, run: Path, memory: int, state: int, making: Making) -> None:
        from hutch.qmp import conversation
        from hutch.qmp import machine as qmp
        from hutch.qmp.migration import save_state

        booted = making.boot(run, memory)
        with booted.supervisor, booted.monitor:
            try:
                with launching(booted.plan, "template"):
                    booted.supervisor.wait_started()
                with machine_failures("template", str(run)):
                    making.bring_up(run, booted)
                with conversation(run / QMP_SOCKET) as monitor:
                    qmp.stop(monitor)
                    save_state(monitor, state, ignore_shared=True)
                # The monitor ends after QEMU, whose writable mapping forbids sealing: where it
                # is in no PID namespace, killing the monitor does not wait for QEMU's end.
                booted.supervisor.signal(signal.SIGTERM)
                booted.supervisor.wait(_END_S)
            finally:
                _end(booted.supervisor)

    def _hold(self, run: Path, memory: int) -> None:
        """Start the process that keeps the memory."""
        listener = listen_at(str(run), HOLD_SOCKET)
        try:
            plan = ops.Plan(
                child=(
                    ops.SetsidTty(),
                    *_give_up_capabilities(),
                    ops.NoNewPrivs(),
                    ops.Inherit(slots=(0, 1)),
                    ops.Exec(argv=(vmm_path(), "hold", str(IDLE_S)), env=()),
                ),
                slots=2,
                supervision=ops.Supervision(directory=str(run), name="hutch-template"),
            )
            with self._launcher.start(plan, (memory, listener)) as supervisor:
                supervisor.wait_started()
        finally:
            os.close(listener)

    def discard(self, template: Template) -> None:
        """Remove a template from which no machine goes on; another made since then stays."""
        with self.locked(template.key):
            present = self.find(template.key)
            if present is None:
                return
            try:
                if present.identity() != template.identity():
                    return
            finally:
                os.close(present.memory)
                os.close(present.state)
            self.remove(template.key)

    def remove(self, key: str) -> None:
        """Let a template go, whole or not; machines that went on from it are not affected."""
        directory = self.directory(key)
        self._end_holder(directory)
        Trash(self._root).discard(str(directory))

    def _end_holder(self, directory: Path) -> None:
        with suppress(OSError, HutchError), Supervisor.connect(str(directory / "run")) as link:
            _end(link)

    def usage(self) -> list[TemplateUse]:
        """Return what each template takes, without asking its holder, who would go on holding."""
        found = []
        if self._directory.is_dir():
            for directory in sorted(self._directory.iterdir()):
                if not directory.name.startswith("."):
                    found.append(_measure(directory))
        return found

    def prune(self) -> int:
        """End the holders and remove all templates; return how many there were."""
        if not self._directory.is_dir():
            return 0
        count = 0
        for directory in self._directory.iterdir():
            if directory.name.startswith("."):
                continue
            self.remove(directory.name)
            count += 1
        return count


def _measure(directory: Path) -> TemplateUse:
    """Return a template's space. The holder has the memory file as its descriptor 3."""
    record = read_pid(str(directory / "run"))
    memory = 0
    held = record is not None and is_alive(str(directory / "run"))
    if record is not None and held:
        with suppress(OSError):
            memory = os.stat(f"/proc/{record.pid}/fd/3").st_blocks * 512
    state = 0
    for name in ("state", "disk"):  # an image's has both
        with suppress(FileNotFoundError):
            state += os.stat(directory / name).st_blocks * 512
    return TemplateUse(key=directory.name, state=state, memory=memory, held=held)


def _give_up_capabilities() -> tuple[ops.Capabilities, ...]:
    """Return what an ordinary user has not to do, and may not."""
    if not has_capability(_CAP_SETPCAP):
        return ()
    return (ops.Capabilities(bounding=0, permitted=0, effective=0, inheritable=0, ambient=0),)


def _end(link: Supervisor) -> None:
    """Kill what a supervisor holds, and wait until it has gone."""
    try:
        link.shutdown()
        link.wait(_END_S)
    except (HutchError, OSError):
        pass  # it is gone, and what mattered was told before


def _ask_for_memory(run: Path) -> int | None:
    """Return the descriptor of a template's memory, or None where nobody holds it."""
    try:
        handle = os.open(run, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(_END_S)
            link.connect(f"/proc/self/fd/{handle}/{HOLD_SOCKET}")
            _, fds, _, _ = socket.recv_fds(link, 1, 1)
    except (FileNotFoundError, ConnectionError, TimeoutError):
        return None
    finally:
        os.close(handle)
    for fd in fds:
        os.set_inheritable(fd, False)
    return fds[0] if fds else None
