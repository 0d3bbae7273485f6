"""The tail of every plan: from a prepared root to the exec of the user's program."""

from __future__ import annotations

from hutch.plan import ops
from hutch.plan.assets import ResolvedUser
from hutch.spec.model import ProcessSpec

__all__ = ["process_ops"]


def process_ops(
    process: ProcessSpec,
    *,
    user: ResolvedUser,
    env: tuple[str, ...],
    capabilities: int,
    seccomp: bytes,
    apparmor: str,
    no_new_privileges: bool,
    init: bool = False,
    console: bool = False,
    create_cwd: bool = False,
    skip_setgroups: bool = False,
    rows: int = 0,
    columns: int = 0,
) -> list[ops.AnyOp]:
    """Return the operations that set the credentials and run the program.

    A user other than root keeps no capability after exec, as with Docker: the bounding
    and inheritable sets stay, effective and permitted become empty.
    """
    root = user.uid == 0
    # Without no_new_privs the kernel wants CAP_SYS_ADMIN for a filter: load it first then.
    early = bool(seccomp) and not no_new_privileges
    tail: list[ops.AnyOp] = [
        ops.SetsidTty(tty=process.tty, console=console and process.tty, rows=rows, columns=columns),
        ops.Chdir(path=process.cwd, create=create_cwd),
        ops.Umask(mask=0o022 if process.umask is None else process.umask),
    ]
    if early:
        tail.append(ops.Seccomp(program=seccomp))
    tail += [
        ops.Capabilities(
            bounding=capabilities,
            permitted=capabilities if root else 0,
            effective=capabilities if root else 0,
            inheritable=0,
            ambient=0,
        ),
        ops.User(uid=user.uid, gid=user.gid, groups=user.groups, skip_setgroups=skip_setgroups),
    ]
    if no_new_privileges:
        tail.append(ops.NoNewPrivs())
    if seccomp and not early:
        tail.append(ops.Seccomp(program=seccomp))
    tail += [
        ops.CloseRange(first=3),
        ops.Exec(argv=process.argv, env=env, init=init, apparmor=apparmor),
    ]
    return tail
