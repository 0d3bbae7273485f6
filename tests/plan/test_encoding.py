"""Plans as bytes: what is kept of one for the next."""

from __future__ import annotations

import pytest

from hutch.errors import InvalidArgument
from hutch.plan import ops, wire


def plan(*child: ops.AnyOp) -> ops.Plan:
    return ops.Plan(supervision=ops.Supervision(), child=child)


def test_a_plan_has_the_same_bytes_each_time() -> None:
    one = plan(ops.Umask(mask=0o22), ops.Exec(argv=("a",), env=("X=1",)))
    assert wire.encode(one) == wire.encode(one)
    assert wire.encode(plan(ops.Umask(mask=0o27))) != wire.encode(plan(ops.Umask(mask=0o22)))


def test_what_does_not_fit_is_refused_each_time() -> None:
    for _ in range(2):
        with pytest.raises(InvalidArgument):
            wire.encode(plan(ops.Umask(mask=-1)))


def test_no_environment_is_kept() -> None:
    wire.encode(plan(ops.Umask(mask=0o22)))
    before = wire._as_before.cache_info().currsize
    wire.encode(plan(ops.Exec(argv=("a",), env=("SECRET=1",))))
    assert wire._as_before.cache_info().currsize == before
