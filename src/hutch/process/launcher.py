"""Start supervisors: the native launcher, run from a sealed memfd with posix_spawn."""

from __future__ import annotations

import _socket  # socket(7) without what the socket module brings along: 2 ms of start-up
import fcntl
import os
from collections.abc import Mapping, Sequence

from hutch.errors import Unsupported
from hutch.plan.ops import Plan
from hutch.plan.wire import encode
from hutch.process import frames
from hutch.process.supervisor import Supervisor

__all__ = ["Launcher", "launcher_path"]

_FD_PLAN, _FD_STARTER, _FD_SLOTS = 3, 4, 5
_ABOVE_SLOTS = 128


def launcher_path() -> str:
    """Return where the package keeps the launcher's binary."""
    return os.path.join(os.path.dirname(os.path.dirname(__file__)), "_native", "hutch-launcher")


class Launcher:
    """The launcher's binary, loaded once into a sealed memfd; close it when done.

    From a memfd with F_SEAL_WRITE no process can write to the binary through
    /proc/PID/exe, whatever its rights are.
    """

    def __init__(self, path: str | None = None) -> None:
        path = path or launcher_path()
        try:
            with open(path, "rb", buffering=0) as file:
                content = file.read()
        except FileNotFoundError as exc:
            raise Unsupported(
                f"the native launcher is missing: {path}",
                hint="build it with `make -C native install`, or install the package",
            ) from exc
        fd = os.memfd_create("hutch-launcher", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            _write_all(fd, content)
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            # Out of the way of the descriptors that `start` puts in their places.
            self._fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE_SLOTS)
        finally:
            os.close(fd)

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the binary; supervisors that run are not affected."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def start(
        self,
        plan: Plan | bytes,
        fds: Sequence[int] = (),
        *,
        attach: int = 0,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Supervisor:
        """Start a supervisor that carries out `plan`; return the connection to it.

        `fds` become the plan's slots; they stay the caller's to close. `attach` (see
        `attach_flags`) attaches before the process can write anything. `env` is the
        supervisor's own environment, which only its exit command sees (default: this
        process's if there is an exit command, else empty). Returns before the plan has
        been carried out: `wait_started` tells.
        """
        if isinstance(plan, Plan):
            held = plan.supervision
            name = name or held.name
            if env is None:
                env = os.environ if held.exit_command else {}
            plan = encode(plan)
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            if attach:
                ours.send(frames.encode_frame(frames.ATTACH, flag=attach))
            pid = self._spawn(plan, theirs.fileno(), fds, name or "hutch-supervisor", env or {})
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return Supervisor(ours, launcher_pid=pid, attached=attach)

    def _spawn(
        self, plan: bytes, sock: int, fds: Sequence[int], name: str, env: Mapping[str, str]
    ) -> int:
        memory = os.memfd_create("hutch-plan", os.MFD_CLOEXEC)
        moved = [memory]
        try:
            _write_all(memory, plan)
            sources = [memory, sock, *fds]
            actions = []
            for target, source in enumerate(sources, _FD_PLAN):
                # An earlier dup2 would overwrite a source among the targets.
                if _FD_PLAN <= source < target:
                    source = fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, _ABOVE_SLOTS)
                    moved.append(source)
                actions.append((os.POSIX_SPAWN_DUP2, source, target))
            return os.posix_spawn(f"/proc/self/fd/{self._fd}", [name], env, file_actions=actions)
        finally:
            for fd in moved:
                os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
