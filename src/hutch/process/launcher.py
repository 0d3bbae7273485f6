"""Start supervisors: the native launcher, run from a sealed memfd with posix_spawn."""

from __future__ import annotations

import _socket  # socket(7) without what the socket module brings along: 2 ms of start-up
import fcntl
import os
from collections.abc import Mapping, Sequence

from hutch.errors import Unsupported
from hutch.plan.ops import Plan
from hutch.plan.wire import encode
from hutch.process.supervisor import Supervisor, write_all

__all__ = ["Launcher", "launcher_path"]

_FD_STARTER = 3


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
            write_all(fd, content)
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            # Out of the way of the descriptor that `spawn` puts in its place.
            self._fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FD_STARTER + 1)
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

    def spawn(self, name: str, env: Mapping[str, str]) -> Supervisor:
        """Start the process that waits for a plan; see `Supervisor.launch`.

        It comes to be while its starter makes the plan. Closing the connection without one
        ends it. `env` is the supervisor's own environment, which only its exit command sees.
        """
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            actions = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), _FD_STARTER)]
            path = f"/proc/self/fd/{self._fd}"
            pid = os.posix_spawn(path, [name], env, file_actions=actions)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return Supervisor(ours, launcher_pid=pid)

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

        As `spawn` and `Supervisor.launch` with what the plan says: its name, and this
        process's environment if there is an exit command. Returns before the plan has been
        carried out: `wait_started` tells.
        """
        if isinstance(plan, Plan):
            held = plan.supervision
            name = name or held.name
            if env is None:
                env = os.environ if held.exit_command else {}
            plan = encode(plan)
        supervisor = self.spawn(name or "hutch-supervisor", env or {})
        try:
            supervisor.launch(plan, fds, attach=attach)
        except BaseException:
            supervisor.close()
            raise
        return supervisor
