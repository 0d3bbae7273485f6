"""The health check of a container, as a plan that its supervisor runs on a timer."""

from __future__ import annotations

import msgspec

from hutch.linux.cgroup import Group
from hutch.plan import flags
from hutch.plan.assets import ContainerAssets, ExecAssets
from hutch.plan.container import compile_exec
from hutch.plan.ops import HealthProbe, Plan, Supervision
from hutch.plan.wire import encode
from hutch.spec.model import InstanceSpec

__all__ = ["with_health"]


def with_health(plan: Plan, spec: InstanceSpec, assets: ContainerAssets, group: Group) -> Plan:
    """Return the plan with the specification's health check in its supervision.

    The probe joins the namespaces that the container has to itself or shares with another
    instance; the supervisor puts the container's pidfd into the probe's slot 0.
    """
    check = spec.health
    if check is None:
        return plan
    namespaces = plan.clone_flags
    for joined in assets.namespaces:
        namespaces |= joined.kind
    if spec.cgroup_mode == "private":
        namespaces |= flags.CLONE_NEWCGROUP
    files = group.join_files()
    v2 = group.directories.get("")
    if v2 is not None:
        files = (*files, f"{v2}/cgroup.procs")
    probe = compile_exec(
        msgspec.structs.replace(spec.process, argv=check.command, tty=False, stdin=False),
        ExecAssets(
            user=assets.user,
            env=assets.env,
            supervision=Supervision(linger=False, name="hutch-health"),
            namespaces=namespaces,
            pid_namespace=bool(namespaces & flags.CLONE_NEWPID),
            cgroup_files=files,
            ulimits=spec.ulimits,
            seccomp=assets.seccomp,
            capabilities=assets.capabilities,
            apparmor=assets.apparmor,
            probe=True,
        ),
        no_new_privileges=spec.security.no_new_privileges and not spec.security.privileged,
    )
    health = HealthProbe(
        plan=encode(probe),
        interval_s=check.interval_s,
        timeout_s=check.timeout_s,
        retries=check.retries,
        start_period_s=check.start_period_s,
        start_interval_s=check.first_interval_s,
    )
    supervision = msgspec.structs.replace(plan.supervision, health=health)
    return msgspec.structs.replace(plan, supervision=supervision)
