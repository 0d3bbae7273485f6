"""Migrate a machine while it runs: the source's side, from the offer's answer to the decision.

The machine's disk is mirrored and its memory copied while it runs; each travels on a link of
its own. Then it is stopped, the rest is sent, and the decision is written down when the target
could let it run. Until then it goes on here whatever fails; where the target declines after
that, it does so too, for it has run nowhere else.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import msgspec

from hutch.drivers.moving import CopyState, Departure, Movable, Streams
from hutch.engine.context import Context
from hutch.engine.locking import instance_lock
from hutch.engine.lookup import load_in
from hutch.engine.migrate_send import Sender
from hutch.engine.migrate_settle import put
from hutch.engine.records import INSTANCES, InstanceRecord
from hutch.engine.saved import require_running
from hutch.errors import HutchError, InvalidArgument, OperationTimeout
from hutch.lifecycle import State, move
from hutch.migration import messages as say
from hutch.migration.links import Destination, meet, open_link
from hutch.migration.pump import Pump
from hutch.migration.records import MigrationRecord, Phase, Role
from hutch.migration.wire import Wire
from hutch.records import ProgressEvent

__all__ = ["LiveOptions", "LiveResult", "check_streams", "decide", "let_run", "move_live"]
__all__ += ["resumed_after", "sending"]

_LINK_S = 60.0
_POLL_S = 0.02
_STOP_S = 60.0
_FETCH_S = 3600.0
# How long the streams are held for a machine that turns out to write faster than it seemed.
_HOLD_S = 5.0
_LITTLE = 1 << 20
_MAX_CHANNELS = 16
# QEMU's own bound (MAX_MIGRATE_DOWNTIME).
_MAX_DOWNTIME_S = 2000


class LiveOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to copy a machine while it runs. `downtime_s` is how long it may stand still,
    `timeout_s` how long disk and memory may take until then, None for as long as it takes."""

    streams: Streams = Streams()
    downtime_s: float = 0.3
    timeout_s: float | None = None
    bandwidth: int = 0


class LiveResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it, after the decision. `lost` is what has gone wrong with the link."""

    id: str
    migration: MigrationRecord
    sent: int
    downtime_s: float
    offline_s: float
    passes: int
    post_copied: bool
    lost: BaseException | None = None


def check_streams(streams: Streams, downtime_s: float, timeout_s: float | None) -> None:
    """Raise `InvalidArgument` for what cannot be meant."""
    if streams.post_copy and streams.channels:
        raise InvalidArgument(
            "post-copy fetches memory by one stream", field="parallel", hint="leave one of them out"
        )
    if not 0 <= streams.channels <= _MAX_CHANNELS:
        raise InvalidArgument(
            f"at most {_MAX_CHANNELS} streams, got {streams.channels}", field="parallel"
        )
    if not 0 < downtime_s <= _MAX_DOWNTIME_S:
        raise InvalidArgument(
            f"expected more than 0 and at most {_MAX_DOWNTIME_S} s, got {downtime_s:g}",
            field="downtime",
        )
    if timeout_s is not None and not timeout_s > 0:
        raise InvalidArgument(f"expected more than 0 s, got {timeout_s:g}", field="timeout")


def move_live(
    context: Context,
    there: Destination,
    wire: Wire,
    sender: Sender,
    token: str,
    options: LiveOptions,
) -> LiveResult:
    """Copy it, stop it, decide, and have it run there; the rest is the caller's to complete."""
    driver = context.driver("vm")
    assert isinstance(driver, Movable)
    identifier = sender.record.id
    with ExitStack() as stack:
        stack.enter_context(instance_lock(context, identifier))
        record = require_running(context, identifier, "migration")
        cards = len(record.endpoints)
        departure = stack.enter_context(
            driver.depart(
                identifier,
                cards=cards,
                streams=options.streams,
                bandwidth=options.bandwidth,
                downtime_s=options.downtime_s,
            )
        )
        migration = put(context, sending(record, there, token))
        journey = _Journey(there, wire, sender, departure, options, stack)
        arrived = journey.prepare(record, token)
        journey.copy_disk()
        journey.copy_memory()
        journey.switch()
        migration = decide(context, migration)
        departure.let_go()
        return journey.commit(arrived, migration)


def sending(record: InstanceRecord, there: Destination, token: str) -> MigrationRecord:
    """Return what is written down of an instance that goes while it runs, at the source."""
    return MigrationRecord(
        token=token,
        role=Role.SOURCE,
        phase=Phase.SENDING,
        instance=record.id,
        name=record.name,
        destination=there.text,
        previous=State.RUNNING,
        resume=True,
        live=True,
        cards=len(record.endpoints),
        isolation=record.spec.isolation,
    )


def decide(context: Context, migration: MigrationRecord) -> MigrationRecord:
    """Give it to the target: the one write that says whose it is."""
    with context.store.write(durable=True) as tx:
        record = load_in(tx, migration.instance)
        move(record.state, State.MIGRATING, name=record.name)
        marked = msgspec.structs.replace(record, state=State.MIGRATING)
        tx.put(INSTANCES, record.id, marked)
        return put(context, migration, phase=Phase.COMMITTED, tx=tx)


def let_run(
    wire: Wire, token: str, stopped: float, then: Callable[[], None] = lambda: None
) -> tuple[float, float, BaseException | None]:
    """Tell the target of the decision, then do what is left to do. Return for how long the
    instance stood still and was out of its networks, since `stopped` by `time.monotonic`, and
    what has failed, which is no reason any more to take it back."""
    told = time.monotonic()
    resumed, online = 0.0, 0.0
    lost: BaseException | None = None
    try:
        wire.send(say.Commit(token=token))
        committed = wire.expect(say.Committed)
        online = time.monotonic()
        resumed = resumed_after(committed, online - told)
        then()
    except (HutchError, KeyboardInterrupt) as exc:
        lost = exc
    return told - stopped + resumed, (online or time.monotonic()) - stopped, lost


def resumed_after(committed: say.Committed, answered_s: float) -> float:
    """Return the seconds from the commit until it ran there: what the target says, and the
    commit's own way, half of what its answer was under way for."""
    way = max(0.0, answered_s - committed.answered_s) / 2 if committed.answered_s else 0.0
    return committed.resumed_s + way


class _Journey:
    """The steps of one machine's way over open links."""

    def __init__(
        self,
        there: Destination,
        wire: Wire,
        sender: Sender,
        departure: Departure,
        options: LiveOptions,
        stack: ExitStack,
    ) -> None:
        self._there = there
        self._wire = wire
        self._sender = sender
        self._departure = departure
        self._options = options
        self._stack = stack
        self._gate = threading.Event()
        self._pumps: list[Pump] = []
        self._token = ""
        self._unacked: int | None = None
        self._began = 0.0
        self._passes = 0
        self._whole = True

    def prepare(self, record: InstanceRecord, token: str) -> str:
        """Let the target start a QEMU that waits; return the instance's name there."""
        self._token = token
        self._sender.send_logs()
        self._wire.send(
            say.Prepare(
                instance=msgspec.Raw(msgspec.json.encode(record)),
                previous=State.RUNNING,
                resume=True,
            )
        )
        return self._wire.expect(say.Prepared).id

    # ---- while it runs ------------------------------------------------------------------

    def copy_disk(self) -> None:
        self._began = time.monotonic()
        # QEMU counts what it need not send: all of a disk, however little there is on it.
        bandwidth = self._options.bandwidth
        self._departure.mirror(self._channel("disk", None, bandwidth=bandwidth))
        while True:
            done, total = self._departure.mirrored()
            self._tell("copying disk", done, total)
            if done == total:
                return
            self._listen()
            self._check_time("the disk of {} is not copied", "allow more --bandwidth or --timeout")

    def copy_memory(self) -> None:
        """Copy it until little is left, then hold the streams still and let it be stopped."""
        if not self._departure.waits:
            self._unacked = self._departure.hold_streams()
        self._begin()
        while True:
            state = self._departure.copying()
            self._show(state)  # at least once: the first pass may be over by now
            if self._is_near(state):
                return
            self._listen()
            self._check_time(
                "the memory of {} changes faster than it is copied: not done",
                "allow a longer --downtime or more --bandwidth, or use --post-copy",
            )

    def _begin(self) -> None:
        """Open the stream of the memory, or the several that QEMU opens itself."""
        if not self._options.streams.channels:
            connection = self._channel("memory", self._gate)
            self._wire.send(say.Begin())
            self._wire.expect(say.Begun)
            self._departure.begin(connection)
            return
        self._wire.send(say.Begin())
        self._wire.expect(say.Begun)
        with self._departure.begin_parallel() as listener:
            listener.settimeout(_LINK_S)
            for number in range(self._options.streams.channels + 1):
                try:
                    stream, _ = listener.accept()
                except TimeoutError:
                    raise OperationTimeout("qemu does not open its streams") from None
                # It opens the one by which answers come first, and waits for them alone.
                self._stack.enter_context(stream)
                self._carry("memory", stream, None if number else self._gate)

    def _is_near(self, state: CopyState) -> bool:
        self._passes = state.passes
        if state.passes < 2:
            return False
        if self._options.streams.post_copy:
            return True
        return state.remaining <= max(_LITTLE, int(state.rate * self._options.downtime_s))

    def _check_time(self, problem: str, hint: str) -> None:
        limit = self._options.timeout_s
        if limit is not None and time.monotonic() - self._began > limit:
            name = self._sender.record.name
            raise OperationTimeout(f"{problem.format(name)} in {limit:g} s", hint=hint)

    def _show(self, state: CopyState) -> None:
        slowed = f", slowed by {state.throttle} %" if state.throttle else ""
        phase = f"copying memory (pass {max(state.passes, 1)}{slowed})"
        self._tell(phase, state.total - state.remaining, state.total)

    def _tell(self, phase: str, done: int, total: int) -> None:
        name = self._sender.record.name
        self._sender.progress(ProgressEvent(item=name, phase=phase, done=done, total=total))

    def _listen(self) -> None:
        """Let a moment pass, and raise what the target has failed with meanwhile."""
        poll = select.poll()
        poll.register(self._wire.fileno(), select.POLLIN)
        if poll.poll(_POLL_S * 1000):
            self._wire.expect(say.Failed)

    # ---- while it stands still ----------------------------------------------------------

    def switch(self) -> None:
        """Stop it, and send what is left."""
        departure = self._departure
        if self._unacked is None:
            self._unacked = departure.hold_streams()
        self._sender.send_tails()
        self._tell("switching over", 0, 0)
        departure.allow()
        if self._options.streams.post_copy:
            departure.hurry()
        self._gate.set()
        if not departure.wait_stopped(_HOLD_S):
            departure.hurry()
            departure.wait_stopped(_STOP_S)
        departure.end_mirror()
        self._wire.send(say.Switch(unacked=self._unacked))
        self._wire.expect(say.Switched)
        self._whole = departure.finish()
        self._wire.expect(say.Loaded)

    def commit(self, arrived: str, migration: MigrationRecord) -> LiveResult:
        """Tell the target, which lets it run; what fails from now on is told, not raised."""
        stopped = self._departure.stopped_at
        downtime_s, offline_s, lost = let_run(self._wire, self._token, stopped, self._fetch)
        return LiveResult(
            id=arrived,
            migration=migration,
            sent=self._sender.sent + sum(pump.sent for pump in self._pumps),
            downtime_s=downtime_s,
            offline_s=offline_s,
            passes=self._passes,
            post_copied=not self._whole,
            lost=lost,
        )

    def _fetch(self) -> None:
        """Wait until the target has fetched what it lacks. It runs there: there is no way back,
        and to leave now would end it."""
        phase = "fetching the rest of its memory"
        while not self._whole:
            self._tell(phase, 0, 0)
            try:
                self._departure.wait_complete(_FETCH_S)
                return
            except KeyboardInterrupt:
                phase = "runs there already and cannot be cancelled; fetching the rest"

    # ---- links --------------------------------------------------------------------------

    def _channel(self, name: str, gate: threading.Event | None, *, bandwidth: int = 0) -> int:
        """Open a link for a stream; return the end that QEMU gets, which stays ours to close."""
        ours, qemus = socket.socketpair()
        self._stack.enter_context(ours)
        self._stack.enter_context(qemus)
        self._carry(name, ours, gate, bandwidth)
        return qemus.fileno()

    def _carry(
        self, name: str, stream: socket.socket, gate: threading.Event | None, bandwidth: int = 0
    ) -> None:
        link = self._stack.enter_context(_opened(self._there, self._token, name))
        pump = Pump(stream, link, gate=gate, bandwidth=bandwidth)
        self._pumps.append(self._stack.enter_context(pump))


@contextmanager
def _opened(there: Destination, token: str, name: str) -> Iterator[socket.socket]:
    """Open a link of a migration under way, up to where bytes pass."""
    from hutch.engine.migrate import hello

    with open_link(there, timeout_s=_LINK_S) as link:
        wire = meet(there, link, timeout_s=_LINK_S)
        hello(wire)
        wire.send(say.Channel(token=token, name=name))
        wire.expect(say.Opened)
        yield link
