"""What the host has, who holds it, what there is room for: `engine.resources`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from hutch.engine.admitting import bound_parent
from hutch.engine.context import Context
from hutch.engine.lookup import all_records
from hutch.errors import InvalidArgument, WrongState
from hutch.lifecycle import State

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Unpack

    from hutch.engine.memory import MemoryReport
    from hutch.engine.reclaim import ReclaimReport, ReclaimStep
    from hutch.resources.admission import Decision
    from hutch.resources.demand import Demand, Holding
    from hutch.resources.inventory import Inventory
    from hutch.resources.memory_pool import MemorySlots
    from hutch.resources.settings import Settings
    from hutch.spec.options import RunOptions

__all__ = ["ResourceUse", "Resources", "Share"]

_LIVE = (State.STARTING, State.RUNNING, State.PAUSED, State.RESTARTING)


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """How much of one thing there is, is given out at most (None: no limit), and is held.
    Memory and disk in bytes, processors in numbers."""

    resource: str
    total: float
    given_out: float | None
    held: float


class ResourceUse(msgspec.Struct, frozen=True, kw_only=True):
    """The whole picture: shares, processors with an owner, and what each instance holds."""

    shares: tuple[Share, ...]
    exclusive: dict[int, str]
    shared_cpus: tuple[int, ...]
    holdings: tuple[Holding, ...]


class Resources:
    """The resources of a root's host."""

    def __init__(self, context: Context) -> None:
        self._context = context

    @property
    def settings(self) -> Settings:
        """How this root gives out what the host has; see `configure`."""
        from hutch.resources.settings import load_settings

        return load_settings(self._context.root)

    def configure(self, values: dict[str, str]) -> Settings:
        """Change settings by name (`{"reserved.memory": "2G", "overcommit.cpus": "2"}`), for
        every process on this root; what runs already goes on. `none` puts one back."""
        from hutch.linux.locks import lock_file
        from hutch.resources.settings import Settings, load_settings, save_settings, with_values

        root = self._context.root
        with lock_file(root / "locks" / "settings"):
            before, groups = load_settings(root), self._context.groups.hierarchy
            settings = with_values(before, values)
            if settings.parent != before.parent:
                self._require_none_running()
            self._require_left(before, settings)
            save_settings(root, settings)
            if (settings.memory, settings.parent) != (before.memory, before.parent):
                try:
                    bound_parent(self._context, settings)
                except BaseException:
                    save_settings(root, before)
                    raise
            if settings.memory_pool != before.memory_pool:
                self._prepare_pool(before, settings)
            if settings.parent != before.parent != Settings().parent:
                groups.remove_parent()
        return settings

    def _require_left(self, before: Settings, settings: Settings) -> None:
        """Refuse to keep all that there is for the host: nothing would ever start."""
        from hutch.resources.admission import capacity_of

        if settings.reserved == before.reserved:
            return
        left = capacity_of(self.inventory(), settings)
        for name in ("memory", "cpus", "disk"):
            kept, given_out = getattr(settings.reserved, name), left[name]
            changed = kept != getattr(before.reserved, name)
            if changed and given_out is not None and given_out <= 0:
                raise InvalidArgument(
                    "leaves nothing to give out",
                    field=f"reserved.{name}",
                    hint="`hutch system resources` shows what there is",
                )

    def _prepare_pool(self, before: Settings, settings: Settings) -> None:
        """Make the memory pool what is wanted now, or leave it as it was."""
        from hutch.resources.settings import save_settings

        pool = self._context.memory_pool
        try:
            pool.prepare(settings.memory_pool)
        except BaseException:
            save_settings(self._context.root, before)
            pool.prepare(before.memory_pool)
            raise

    def memory_pool(self) -> tuple[MemorySlots, ...]:
        """Return the memory that was made ahead for machines, by the size of its pieces."""
        return self._context.memory_pool.slots()

    def _require_none_running(self) -> None:
        running = [r.name for r in all_records(self._context) if r.state in _LIVE]
        if running:
            raise WrongState(
                f"parent: {running[0]} has its control group under the old one",
                hint="stop what runs, then change it",
            )

    def inventory(self) -> Inventory:
        """Read what the host has for instances: processors, nodes, memory, huge pages, room."""
        from hutch.engine.admitting import inventory

        return inventory(self._context)

    def demand(self, **options: Unpack[RunOptions]) -> Demand:
        """Return what an instance with these options would need of the host."""
        from hutch.resources.demand import demand_of
        from hutch.spec.build import ImageDefaults, build

        given: dict[str, Any] = dict(options)
        if given.get("isolation") == "auto":
            given["isolation"] = "container"
        spec = build("none", ImageDefaults(), ["true"], **given)
        return demand_of(spec, self.settings)

    def decide(self, demand: Demand | None = None, **options: Unpack[RunOptions]) -> Decision:
        """Say whether an instance would fit now, and if not, of what there is too little, who
        holds it and what would help. Nothing is taken; `create` and `start` take it."""
        from hutch.engine.admitting import decide_for

        wanted = demand if demand is not None else self.demand(**options)
        return decide_for(self._context, wanted)

    def use(self) -> ResourceUse:
        """Return what is given out and who holds it."""
        from hutch.engine.admitting import holdings, inventory
        from hutch.resources.admission import capacity_of
        from hutch.resources.cpus import shared_pool

        settings, host = self.settings, inventory(self._context)
        with self._context.store.write() as tx:
            held = holdings(self._context, tx, settings, volumes=True)
        totals = {
            "memory": host.memory,
            "cpus": len(host.cpus),
            "disk": sum(room.total for room in host.rooms),
        }
        sums = {
            "memory": sum(h.memory for h in held),
            "cpus": sum(h.cpus + len(h.exclusive) for h in held),
            "disk": sum(h.disk for h in held),
        }
        limits = capacity_of(host, settings)
        exclusive = {cpu: h.name for h in held for cpu in h.exclusive}
        return ResourceUse(
            shares=tuple(
                Share(resource=n, total=totals[n], given_out=limits[n], held=sums[n])
                for n in totals
            ),
            exclusive=exclusive,
            shared_cpus=shared_pool(host, exclusive),
            holdings=tuple(h for h in held if _holds_anything(h)),
        )

    # ---- memory while it runs ---------------------------------------------------------------

    def memory(self) -> MemoryReport:
        """Look at who has the memory, how short it is, and what reclaim has in force."""
        from hutch.engine.memory import report

        return report(self._context, self.settings)

    def reclaim(self, *, dry_run: bool = False) -> ReclaimReport:
        """Make one pass: take memory back where it is short, by the rungs that the settings
        name; undo what was done where there is room again. With `dry_run` only say what would
        be done. `Busy` where another process makes a pass."""
        from hutch.engine.reclaim import reclaim_pass

        return reclaim_pass(self._context, dry_run=dry_run)

    def watch(self, interval: float = 5.0) -> Iterator[ReclaimReport]:
        """Make passes for ever, `interval` seconds apart and at once at a stall; yield each."""
        from hutch.engine.reclaim import watch

        return watch(self._context, interval)

    def release(self) -> list[ReclaimStep]:
        """Undo everything that reclaim has in force."""
        from hutch.engine.reclaim import release_all

        return release_all(self._context)


def _holds_anything(held: Holding) -> bool:
    return bool(
        held.memory or held.cpus or held.exclusive or held.disk or held.huge or held.devices
    )
