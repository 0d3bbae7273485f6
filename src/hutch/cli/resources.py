"""`system resources` and `system configure`: what the host has, and how it is given out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hutch.cli.command import Command
from hutch.cli.options import UsageError
from hutch.cli.output import print_json, table_lines
from hutch.cli.session import Invocation
from hutch.units import format_bytes

if TYPE_CHECKING:
    from hutch.engine.resources import ResourceUse, Share
    from hutch.resources.inventory import Inventory
    from hutch.resources.memory_pool import MemorySlots

__all__ = ["COMMANDS"]


def _resources(invocation: Invocation) -> int:
    resources = invocation.engine.resources
    inventory, use = resources.inventory(), resources.use()
    pool = resources.memory_pool()
    if invocation.json:
        shown = {"inventory": inventory, "use": use, "settings": resources.settings}
        print_json({**shown, "memory_pool": pool})
        return 0
    for line in (*_host(inventory, pool), "", *_shares(use), "", *_holders(use)):
        print(line)
    return 0


def _host(inventory: Inventory, pool: tuple[MemorySlots, ...]) -> list[str]:
    from hutch.resources.cpulist import format_cpulist

    cores = len({cpu.core for cpu in inventory.cpus})
    rows = [
        ("processors", f"{len(inventory.cpus)} on {cores} cores ({_list(inventory.cpu_ids)})"),
        *(
            (f"node {node.id}", f"{_list(node.cpus)}, {format_bytes(node.memory)}")
            for node in inventory.nodes
        ),
        ("memory", f"{format_bytes(inventory.memory)}, {format_bytes(inventory.available)} free"),
    ]
    if inventory.swap:
        free = format_bytes(inventory.swap_free)
        rows.append(("swap", f"{format_bytes(inventory.swap)}, {free} free"))
    rows += [
        (f"huge pages of {format_bytes(pages.size)}", f"{pages.total}, {pages.free} free")
        for pages in inventory.huge
    ]
    rows += [
        (f"made ahead in {format_bytes(slots.size)}", f"{slots.total}, {slots.free} free")
        for slots in pool
    ]
    rows += [
        ("disk", f"{format_bytes(room.total)}, {format_bytes(room.free)} free ({room.path})")
        for room in inventory.rooms
    ]
    for title, numbers in (("offline", inventory.offline), ("forbidden", inventory.forbidden)):
        if numbers:
            rows.append((title, format_cpulist(numbers)))
    return table_lines(("HOST", ""), rows)


def _list(numbers: frozenset[int] | tuple[int, ...]) -> str:
    from hutch.resources.cpulist import format_cpulist

    return format_cpulist(numbers) or "none"


def _shares(use: ResourceUse) -> list[str]:
    rows = [
        (
            share.resource,
            _amount(share, share.total),
            "no limit" if share.given_out is None else _amount(share, share.given_out),
            _amount(share, share.held),
        )
        for share in use.shares
    ]
    lines = table_lines(("RESOURCE", "TOTAL", "GIVEN OUT UP TO", "HELD"), rows)
    if use.exclusive:
        lines.append(f"shared processors: {_list(use.shared_cpus)}")
    return lines


def _amount(share: Share, number: float) -> str:
    return f"{number:g}" if share.resource == "cpus" else format_bytes(int(number))


def _holders(use: ResourceUse) -> list[str]:
    rows = [
        (
            held.name,
            format_bytes(held.memory) if held.memory else "-",
            f"{_list(held.exclusive)} alone" if held.exclusive else f"{held.cpus:g}",
            format_bytes(held.disk) if held.disk else "-",
            ", ".join(
                [f"{format_bytes(n)} in {format_bytes(s)}" for s, n in sorted(held.huge.items())]
                + list(held.devices)
            )
            or "-",
        )
        for held in use.holdings
    ]
    return table_lines(("HELD BY", "MEMORY", "CPUS", "DISK", "HUGE PAGES, DEVICES"), rows)


def _configure(invocation: Invocation) -> int:
    values = {}
    for argument in invocation.arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name:
            raise UsageError(
                f"expected KEY=VALUE, got {argument!r}",
                hint="for example reserved.memory=2G",
                exit_code=1,
            )
        values[name] = value
    resources = invocation.engine.resources
    settings = resources.configure(values) if values else resources.settings
    print_json(settings)
    return 0


COMMANDS = {
    "system resources": Command(
        handler=_resources,
        summary="Show what the host has, how it is given out, and who holds it.",
        examples=("hutch system resources", "hutch system resources -o json"),
    ),
    "system configure": Command(
        handler=_configure,
        summary="Show or change how this root gives out what the host has.",
        arguments="[KEY=VALUE...]",
        high=-1,
        epilog="Keys: reserved.cpus, reserved.memory, reserved.disk (kept for the host); "
        "overcommit.cpus, overcommit.memory, overcommit.disk (how many times over); memory "
        "(what all instances have together); cpu_policy, fit, parent; watermarks.*, ladder, "
        "idle_s (see `hutch system memory`). `KEY=none` puts one back to its default, with which "
        "nothing is refused.",
        examples=(
            "hutch system configure",
            "hutch system configure reserved.memory=2G overcommit.memory=1.5 overcommit.cpus=4",
            "hutch system configure overcommit.cpus=none",
        ),
    ),
}
