"""The health check of a machine: run in the guest, on the timer of the supervisor on the host."""

from __future__ import annotations

import os

from hutch.plan import ops
from hutch.plan.ops import HealthProbe
from hutch.plan.wire import encode
from hutch.process.vmm import vmm_path
from hutch.spec.model import HealthCheck

__all__ = ["health_probe"]

PLAN = "health.plan"


def health_probe(check: HealthCheck, inside: ops.Plan, directory: str) -> HealthProbe:
    """Return the probe. `inside` is what runs in the guest; it is kept in the run directory,
    from where `hutch-vmm exec` takes it to the agent."""
    path = f"{directory}/{PLAN}"
    with open(f"{path}.new", "wb") as file:
        file.write(encode(inside))
    os.replace(f"{path}.new", path)
    probe = ops.Plan(
        child=(
            ops.SetsidTty(),
            ops.Capabilities(bounding=0, permitted=0, effective=0, inheritable=0, ambient=0),
            ops.NoNewPrivs(),
            ops.Exec(argv=(vmm_path(), "exec", directory, path), env=()),
        ),
        slots=1,
        supervision=ops.Supervision(linger=False, name="hutch-health"),
    )
    return HealthProbe(
        plan=encode(probe),
        interval_s=check.interval_s,
        timeout_s=check.timeout_s,
        retries=check.retries,
        start_period_s=check.start_period_s,
        start_interval_s=check.first_interval_s,
    )
