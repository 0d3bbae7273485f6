"""Whether this process may isolate what it starts: by its own right, in a user namespace of
its own, or not at all.

It is tried, with the launcher and a plan like a container's that ends at a program which is
not there: a few milliseconds, and nothing is left running. The answer is kept in a cache
directory for as long as nothing that decides it has changed.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from hutch.decoding import decode_json
from hutch.errors import HutchError
from hutch.host.facts import has_capability, replace_file
from hutch.linux.boot import boot_id
from hutch.linux.idmap import write_own_map
from hutch.plan import flags, ops
from hutch.plan.container import SYNC_IDMAP

__all__ = ["Isolation", "Namespaces", "is_privileged", "load_isolation"]

FORMAT = 1
Namespaces = Literal["own", "user", "none"]
CAP_SYS_ADMIN = 21

_CLONE = (
    flags.CLONE_NEWNS
    | flags.CLONE_NEWPID
    | flags.CLONE_NEWIPC
    | flags.CLONE_NEWUTS
    | flags.CLONE_NEWNET
)
# Whatever changes the answer while the machine runs: privileges, a seccomp filter, the user
# namespace that we are in, and limits that an administrator sets.
_STATUS = ("CapEff:", "Seccomp:", "Seccomp_filters:", "NoNewPrivs:")
_SETTINGS = (
    "user/max_user_namespaces",
    "user/max_mnt_namespaces",
    "user/max_pid_namespaces",
    "kernel/unprivileged_userns_clone",
    "kernel/apparmor_restrict_unprivileged_userns",
)


class Isolation(msgspec.Struct, frozen=True, kw_only=True):
    """What was found. `namespaces` says how a process may be given namespaces of its own;
    `containers` whether a container can be made, with a root file system stacked of
    layers. `reason` tells what the kernel refused, empty where it refused nothing."""

    format: int = FORMAT
    key: tuple[str, ...] = ()
    namespaces: Namespaces
    containers: bool
    reason: str = ""


def is_privileged() -> bool:
    """Tell whether we are a root that may make namespaces, as far as it is of privilege."""
    return os.geteuid() == 0 and has_capability(CAP_SYS_ADMIN)


def load_isolation(root: Path) -> Isolation:
    """Return what was found for this process, tried now where `<root>/cache` does not know."""
    key = _key()
    path = root / "cache" / f"isolation-{os.geteuid()}.json"
    try:
        known = decode_json(path.read_bytes(), Isolation)
        if (known.format, known.key) == (FORMAT, key):
            return known
    except (OSError, msgspec.DecodeError):
        pass
    found = msgspec.structs.replace(_try_all(root), key=key)
    replace_file(path, msgspec.json.encode(found))
    return found


def _key(proc: Path = Path("/proc")) -> tuple[str, ...]:
    status = (proc / "self/status").read_text().splitlines()
    settings = []
    for name in _SETTINGS:
        try:
            settings.append((proc / "sys" / name).read_text().strip())
        except OSError:
            settings.append("")
    return (
        boot_id(proc),
        os.readlink(proc / "self/ns/user"),
        os.readlink(proc / "self/ns/mnt"),
        *(line for line in status if line.startswith(_STATUS)),
        *settings,
    )


def _try_all(root: Path) -> Isolation:
    scratch = root / "cache" / f"isolation.{os.getpid()}.{threading.get_ident()}"
    reasons: list[str] = []
    try:
        for kind in _kinds():
            layers = _make_layers(scratch)
            failed = _attempt(layers, user=kind == "user")
            if failed is None and kind == "user" and os.geteuid() == 0:
                # Containers of an ordinary user are made in another way than those of root.
                reasons.append("root has no CAP_SYS_ADMIN")
                return Isolation(namespaces=kind, containers=False, reason="; ".join(reasons))
            if failed is None:
                return Isolation(namespaces=kind, containers=True)
            reasons.append(failed.reason)
            if failed.only_layers:
                return Isolation(namespaces=kind, containers=False, reason=failed.reason)
    finally:
        _remove(scratch)
    return Isolation(namespaces="none", containers=False, reason="; ".join(reasons))


def _kinds() -> Sequence[Namespaces]:
    return ("own", "user") if is_privileged() else ("user",)


def _remove(scratch: Path) -> None:
    try:
        os.chmod(scratch / "work" / "work", 0o700)  # overlay makes it closed to everybody
    except OSError:
        pass
    shutil.rmtree(scratch, ignore_errors=True)


def _make_layers(scratch: Path) -> Path:
    _remove(scratch)
    for name in ("root", "lower", "upper", "work"):
        (scratch / name).mkdir(parents=True)
    return scratch


class _Failed(msgspec.Struct, frozen=True):
    """Why an attempt failed; `only_layers` where all but the overlay worked."""

    reason: str
    only_layers: bool = False


def _attempt(scratch: Path, *, user: bool) -> _Failed | None:
    """Go the way of a container's start; None where it could be gone to its end."""
    from hutch.process.errors import LaunchFailed
    from hutch.process.launcher import Launcher

    plan = _plan(scratch, user=user)
    where = "a user namespace" if user else "namespaces"
    try:
        with Launcher() as launcher, launcher.start(plan) as supervisor:
            if user:
                pid = supervisor.wait_pid()
                supervisor.wait_sync(SYNC_IDMAP)
                write_own_map(pid)
                supervisor.go(SYNC_IDMAP)
            supervisor.wait_started()
    except LaunchFailed as exc:
        if exc.section == "exec":
            return None
        reason = os.strerror(exc.errno).lower()
        if exc.section != "child":
            return _Failed(f"{where}: {reason}")
        failed = plan.child[exc.index]
        name = failed.fstype if isinstance(failed, ops.Mount) else type(failed).__name__.lower()
        return _Failed(f"{name} in {where}: {reason}", isinstance(failed, ops.Overlay))
    except OSError as exc:
        return _Failed(f"{where}: map of ids: {(exc.strerror or '').lower()}")
    except HutchError as exc:
        return _Failed(f"{where}: {exc.message}")
    return None


def _plan(scratch: Path, *, user: bool) -> ops.Plan:
    child: list[ops.AnyOp] = [ops.Sync(number=SYNC_IDMAP)] if user else []
    child += [
        ops.Propagation(path="/", flags=flags.MS_REC | flags.MS_PRIVATE),
        ops.RootDir(path=str(scratch / "root")),
        ops.Mount(fstype="proc", target="/proc", source="proc"),
        ops.Mount(fstype="tmpfs", target="/dev", source="tmpfs", options=("mode=0755",)),
        ops.Overlay(
            slot=0,
            lower=(str(scratch / "lower"),),
            upper=str(scratch / "upper"),
            work=str(scratch / "work"),
            options=("userxattr",) if user else (),
        ),
        ops.PivotRoot(),
        ops.Exec(argv=("/isolation-works",), env=()),
    ]
    clone = _CLONE | (flags.CLONE_NEWUSER if user else 0)
    return ops.Plan(
        clone_flags=clone, child=tuple(child), supervision=ops.Supervision(name="hutch-probe")
    )
