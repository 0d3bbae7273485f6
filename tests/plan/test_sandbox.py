"""The plan that starts a virtual machine's monitor: as root, in a user namespace, without any."""

from __future__ import annotations

import msgspec

from hutch.plan import flags, ops
from hutch.plan.assets import ResolvedUser
from hutch.plan.container import SYNC_IDMAP
from hutch.plan.vm import PassedGroup, SandboxAssets, compile_sandbox

ASSETS = SandboxAssets(
    supervision=ops.Supervision(),
    skeleton="/skeleton",
    vmm="/lib/hutch-vmm",
    binds=(("/usr", "usr"),),
    user=ResolvedUser(uid=1879048200, gid=1879048200),
    inherit=(0, 1, 2),
    slots=3,
)


def _of(plan: ops.Plan, kind: type[ops.AnyOp]) -> list[ops.AnyOp]:
    return [op for op in plan.child if isinstance(op, kind)]


def test_root_opens_the_hosts_directories_before_the_clone() -> None:
    plan = compile_sandbox(ASSETS)
    assert [op.path for op in plan.prepare if isinstance(op, ops.OpenTree)] == [
        "/usr",
        "/lib/hutch-vmm",
    ]
    assert not _of(plan, ops.OpenTree) and not plan.clone_flags & flags.CLONE_NEWUSER
    assert plan.clone_flags & flags.CLONE_NEWNET


def test_an_ordinary_user_does_all_of_it_in_a_user_namespace() -> None:
    user = ResolvedUser(uid=0, gid=0)
    plan = compile_sandbox(msgspec.structs.replace(ASSETS, namespaces="user", user=user))
    assert plan.clone_flags & flags.CLONE_NEWUSER and not plan.prepare
    assert plan.child[0] == ops.Sync(number=SYNC_IDMAP)
    assert len(_of(plan, ops.OpenTree)) == 2
    assert _of(plan, ops.User) == [ops.User(uid=0, gid=0, skip_setgroups=True)]


def test_qemus_own_network_is_in_the_hosts_namespace() -> None:
    plan = compile_sandbox(msgspec.structs.replace(ASSETS, host_network=True))
    assert not plan.clone_flags & flags.CLONE_NEWNET


def test_where_namespaces_are_refused_the_program_keeps_to_its_user() -> None:
    plan = compile_sandbox(msgspec.structs.replace(ASSETS, namespaces="none", user=None))
    assert plan.clone_flags == 0 and not plan.prepare
    assert not _of(plan, ops.User) and not _of(plan, ops.Capabilities)
    assert _of(plan, ops.NoNewPrivs)
    assert _of(plan, ops.Exec) == [ops.Exec(argv=("/lib/hutch-vmm",), env=())]


def test_root_without_namespaces_still_changes_its_user() -> None:
    plan = compile_sandbox(msgspec.structs.replace(ASSETS, namespaces="none"))
    (user,) = _of(plan, ops.User)
    assert isinstance(user, ops.User) and user.uid == 1879048200
    assert _of(plan, ops.Capabilities)
    assert not _of(plan, ops.Chdir)  # it is of the plan's root directory, and there is none


def test_of_the_hosts_devices_qemu_sees_the_nodes_of_its_groups() -> None:
    group = PassedGroup(group=7, numbers=(240, 3), addresses=("0000:01:00.0", "0000:01:00.1"))
    plan = compile_sandbox(msgspec.structs.replace(ASSETS, groups=(group,)))
    nodes = {op.path: (op.major, op.minor) for op in _of(plan, ops.Mknod)}  # type: ignore[union-attr]
    assert nodes["/dev/vfio/vfio"] == (10, 196) and nodes["/dev/vfio/7"] == (240, 3)
    links = [(op.path, op.target) for op in _of(plan, ops.Symlink)]  # type: ignore[union-attr]
    assert links == [
        (f"/dev/passed/{address}/iommu_group", "groups/7") for address in group.addresses
    ]
    # They are made while /dev can be written to.
    kinds = [type(op) for op in plan.child]
    last = max(n for n, kind in enumerate(kinds) if kind is ops.Symlink)
    assert last < kinds.index(ops.Remount)
    assert not any(isinstance(op, ops.Symlink) for op in compile_sandbox(ASSETS).child)
