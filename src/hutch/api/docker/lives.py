"""What instances that were started here go through: their exits are booked, their restart
policies followed, their health told, and who attached before the start takes part in it.

Each has one connection to its supervisor, and nothing else: when the daemon is killed, the
supervisor sees to the exit by itself.
"""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING

from hutch.api.docker.feeds import Client, Feed
from hutch.engine.after import Again, plan_restart, settle_exit, start_again
from hutch.engine.finish import finish, refresh
from hutch.engine.lookup import all_records, load
from hutch.engine.start import start
from hutch.engine.stop import remove, stop
from hutch.errors import HutchError, NotFound
from hutch.lifecycle import State
from hutch.process.frames import Health
from hutch.process.supervisor import Supervisor, attach_flags

if TYPE_CHECKING:
    from hutch.api.docker.front import Front
    from hutch.engine.context import Context

__all__ = ["Lives"]


class Lives:
    """The instances that were started by this daemon and run."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._context = front.engine.context
        self._links: dict[str, Supervisor] = {}
        self._pending: dict[str, list[Client]] = {}
        self._ending = False

    def __len__(self) -> int:
        return len(self._links)

    async def take_up(self) -> None:
        """Start again what wanted to be, and was not because the daemon was killed."""
        for record in await self._front.call(all_records, self._context):
            if record.spec.restart.name == "no":
                continue
            try:
                present = await self._front.call(refresh, self._context, record)
                if present.state not in (State.EXITED, State.RESTARTING):
                    continue
                again = await self._front.call(plan_restart, self._context, present)
            except HutchError as exc:
                self._front.log.warning("instance %s: %s", record.name, exc)
                continue
            if again is not None:
                self._front.spawn(self._restart(again), f"restart of {record.name}")

    async def stop_all(self, timeout_s: float) -> None:
        """Stop what runs, all at once, each by its own signal; the daemon is about to end."""
        self._ending = True
        running = await self._front.call(all_records, self._context)
        stops = [
            self._front.call_slow(_stop_quietly, self._context, record.id, timeout_s)
            for record in running
            if record.state in (State.STARTING, State.RUNNING, State.PAUSED)
        ]
        await asyncio.gather(*stops)

    # ---- starts -----------------------------------------------------------------------------

    def expect_start(self, identifier: str, client: Client) -> None:
        """Let a client take part in the next start from its first byte on."""
        self._pending.setdefault(identifier, []).append(client)

    def forget(self, identifier: str, client: Client) -> bool:
        """Let a client wait no more; False when a start has it already, and will tell it."""
        waiting = self._pending.get(identifier, [])
        if client not in waiting:
            return False
        waiting.remove(client)
        if not waiting:
            del self._pending[identifier]
        return True

    async def start(self, identifier: str) -> bool:
        """Start an instance; False when it runs already."""
        spec = (await self._front.call(load, self._context, identifier)).spec
        clients = self._pending.pop(identifier, [])
        flags = 0
        if clients:
            flags = attach_flags(
                stdin=spec.process.stdin and any(client.stdin for client in clients),
                stdout=any(client.stdout for client in clients),
                stderr=any(client.stderr for client in clients),
                lossless=True,
            )
        try:
            link = await self._front.call_undoing(
                functools.partial(
                    start, self._context, identifier, attach=flags, rows=0, columns=0
                ),
                _let_go,
            )
        except BaseException:
            for client in clients:
                client.finish()
            if spec.auto_remove:
                # As Docker: what was to go with its end goes when it cannot begin.
                await self._front.call_slow(_remove_unstarted, self._context, identifier)
            raise
        finally:
            self._front.journal.poke()
        if link is None:
            for client in clients:
                client.start_without()
            return False
        await self._started(identifier, link, clients)
        return True

    async def _started(self, identifier: str, link: Supervisor, clients: list[Client]) -> None:
        if clients:
            # By a link of its own, the exit is heard whether clients read or not.
            watching = await self._front.call(_second_link, self._context, identifier)
            feed = Feed(self._front, link)
            for client in clients:
                feed.add(client)
            self._front.spawn(feed.run(), f"streams of {identifier[:12]}")
            if watching is None:
                self._front.spawn(self._follow_exit(identifier), f"exit of {identifier[:12]}")
                return
            link = watching
        self._listen(identifier, link)

    # ---- exits ------------------------------------------------------------------------------

    def _listen(self, identifier: str, link: Supervisor) -> None:
        before = self._links.pop(identifier, None)
        if before is not None:
            self._drop(before)
        self._links[identifier] = link
        loop = asyncio.get_running_loop()
        loop.add_reader(link.fileno(), self._heard, identifier, link)
        self._heard(identifier, link)

    def _heard(self, identifier: str, link: Supervisor) -> None:
        while (event := link.next_event(0.0)) is not None:
            if isinstance(event, Health):
                self._front.spawn(self._tell_health(identifier, event.status), "health event")
        if link.exit_status is None and not link.is_over:
            return
        if self._links.get(identifier) is link:
            del self._links[identifier]
        asyncio.get_running_loop().remove_reader(link.fileno())
        self._front.spawn(self._follow_exit(identifier, link), f"exit of {identifier[:12]}")

    async def _tell_health(self, identifier: str, status: str) -> None:
        await self._front.call(_note_health, self._front, identifier, status)
        self._front.journal.poke()

    async def _follow_exit(self, identifier: str, link: Supervisor | None = None) -> None:
        again = None
        try:
            if self._ending:
                await self._front.call_slow(finish, self._context, identifier)
            else:
                again = await self._front.call_slow(settle_exit, self._context, identifier)
        except HutchError as exc:
            self._front.log.warning("exit of %s: %s", identifier[:12], exc)
            return
        finally:
            if link is not None:
                # Not before it is booked: the supervisor would see to it too.
                link.close()
            self._front.journal.poke()
        if again is not None:
            await self._restart(again)

    async def _restart(self, again: Again) -> None:
        wanted: Again | None = again
        while wanted is not None:
            await asyncio.sleep(wanted.delay_s)
            link, wanted = await self._front.call_slow(start_again, self._context, wanted)
            self._front.journal.poke()
            if link is not None:
                await self._started(again.id, link, [])

    def _drop(self, link: Supervisor) -> None:
        asyncio.get_running_loop().remove_reader(link.fileno())
        link.close()

    def close(self) -> None:
        """Let go of all of them; their supervisors see to their exits from now on."""
        for link in self._links.values():
            self._drop(link)
        self._links.clear()


def _let_go(link: Supervisor | None) -> None:
    if link is not None:
        link.close()


def _stop_quietly(context: Context, identifier: str, timeout_s: float) -> None:
    try:
        stop(context, identifier, timeout_s=timeout_s, by_user=False)
    except HutchError:
        return  # it has ended, or cannot be: nobody is left to be told


def _remove_unstarted(context: Context, identifier: str) -> None:
    """Remove what could not begin; what runs, is paused, or has its memory saved stays."""
    try:
        if load(context, identifier).state in (State.CREATED, State.EXITED):
            remove(context, identifier, remove_volumes=True)
    except HutchError:
        return  # somebody else has started it, or removed it


def _second_link(context: Context, identifier: str) -> Supervisor | None:
    """Return a further link to a running instance, whose holder sees to the exit."""
    try:
        link = Supervisor.connect(f"{context.directory(identifier)}/run")
    except OSError:
        return None  # it has ended already
    try:
        link.claim()
    except (OSError, HutchError):
        pass
    return link


def _note_health(front: Front, identifier: str, status: str) -> None:
    context = front.engine.context
    try:
        record = load(context, identifier)
    except NotFound:
        return
    with context.store.write() as tx:
        tx.event(
            "container",
            f"health_status: {status}",
            identifier,
            name=record.name,
            image=record.image_name,
        )
