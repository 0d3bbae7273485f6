"""What the processes of an instance may do (capabilities, filter, profile), and what they see."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from hutch.errors import Unsupported
from hutch.linux import capabilities as caps
from hutch.plan.assets import ResolvedUser
from hutch.spec.model import InstanceSpec, ProcessSpec

__all__ = ["Confinement", "apparmor", "environment"]

DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Confinement:
    """Capabilities and filters; holds what is the same for every launch of this process."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._programs: dict[tuple[str, int], bytes] = {}

    @cached_property
    def _last_capability(self) -> int:
        return caps.last_capability()

    @cached_property
    def _own_bounding(self) -> int:
        return caps.own_sets().bounding

    def capabilities(self, spec: InstanceSpec, *, privileged: bool) -> int:
        """Return the mask an instance's processes are bounded by, within our own."""
        return (
            caps.parse(
                spec.security.cap_add,
                spec.security.cap_drop,
                privileged=privileged,
                last=self._last_capability,
            )
            & self._own_bounding
        )

    def seccomp(self, spec: InstanceSpec, capabilities: int) -> bytes:
        """Return the filter program of a specification, compiled once."""
        profile = spec.security.seccomp
        if profile == "unconfined" or spec.security.privileged:
            return b""
        key = (profile, capabilities)
        program = self._programs.get(key)
        if program is None:
            from hutch.linux import seccomp

            parsed = None if profile == "default" else seccomp.parse_profile(profile)
            program = seccomp.cached_program(self._root / "cache" / "seccomp", parsed, capabilities)
            self._programs[key] = program
        return program


def apparmor(spec: InstanceSpec, *, privileged: bool) -> str:
    """Return the AppArmor profile to change to, "" for none."""
    profile = spec.security.apparmor
    if privileged or profile in ("", "unconfined"):
        return ""
    from hutch.linux.apparmor import is_enabled

    if not is_enabled():
        raise Unsupported(
            f"security_opt: apparmor={profile}: AppArmor is not enabled on this host",
            hint="leave the option out",
        )
    return profile


def environment(process: ProcessSpec, user: ResolvedUser, *, hostname: str) -> tuple[str, ...]:
    """Return the environment: Docker's defaults where the specification has none."""
    env = list(process.env)
    names = {entry.partition("=")[0] for entry in env}
    if "PATH" not in names:
        env.insert(0, DEFAULT_PATH)
    if hostname and "HOSTNAME" not in names:
        env.insert(1, f"HOSTNAME={hostname}")
    if process.tty and "TERM" not in names:
        env.append("TERM=xterm")
    if "HOME" not in names:
        env.append(f"HOME={user.home}")
    return tuple(env)
