"""Fair share: whoever has used least of what is due to them runs next."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any, ClassVar

from hutch.sched.job import Job
from hutch.sched.ledger import Capacity
from hutch.sched.parameters import Parameter
from hutch.sched.policy import NOTHING, Base, Decisions

__all__ = ["Fair"]

_WEEK = 7 * 86400
# Usage is kept inflated instead of being decayed (all decays alike, so order is the same);
# past this many doublings everything is scaled down.
_DOUBLINGS = 500


class _Account:
    """One user: what was used, what runs, what waits."""

    __slots__ = ("at", "cores", "queue", "stamp", "used", "weight")

    def __init__(self) -> None:
        self.used: float = 0
        self.at: float = 0
        self.cores: float = 0
        self.weight: float = 1
        self.queue: deque[tuple[int, Job]] = deque()
        self.stamp = 0


class Fair(Base):
    """The next job is one of the user who has used fewest core-seconds per weight.

    Use is forgotten by half every `half_life`. Each running job counts for `ahead` seconds
    more than it ran, so that a user does not take every core at one instant. Among a user's
    own jobs: first come, first served; each runs to its end. A user's weight is that of
    the first job that waits. Source: Kay and Lauder, "A fair share scheduler", CACM 31(1),
    1988; decay as in Slurm's multifactor plugin.
    """

    name: ClassVar[str] = "fair"
    summary: ClassVar[str] = "fair share: the user who has used least of their share is next"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "half_life": Parameter("seconds", _WEEK, "after which use counts half (inf: for ever)"),
        "ahead": Parameter("seconds", 60, "counted in advance for each running job"),
    }

    def __init__(self, capacity: Capacity, half_life: float = _WEEK, ahead: float = 60) -> None:
        super().__init__(capacity)
        self.half_life = half_life
        self.ahead = ahead
        self._accounts: dict[str, _Account] = {}
        self._heap: list[tuple[float, int, int, str]] = []
        self._zero: float | None = None

    def _inflation(self, now: float) -> float:
        """Return by how much use at `now` counts more than use at the zero point."""
        if self.half_life == math.inf:
            return 1
        if self._zero is None:
            self._zero = now
        doublings = (now - self._zero) / self.half_life
        if doublings > _DOUBLINGS:
            self._rescale(now, doublings)
            return 1
        return float(2.0**doublings)

    def _rescale(self, now: float, doublings: float) -> None:
        self._zero = now
        for account in self._accounts.values():
            account.used *= 2.0 ** -min(doublings, 1000)
            self._settle(account, now, 1)
        self._rebuild(now)

    def _settle(self, account: _Account, now: float, inflation: float) -> None:
        """Count what an account's running jobs have used up to now."""
        if account.cores and now > account.at:
            if self.half_life == math.inf:
                account.used += account.cores * (now - account.at)
            else:
                # ∫ 2^(t/h) dt over the time since; expm1 keeps what is small.
                rate = math.log(2) / self.half_life
                past = -math.expm1(-rate * (now - account.at))
                account.used += account.cores * inflation * past / rate
        account.at = now

    def _standing(self, account: _Account, inflation: float) -> float:
        return (account.used + account.cores * self.ahead * inflation) / account.weight

    def _push(self, user: str, account: _Account, now: float) -> None:
        """Enter an account where it stands now; its older entries no longer count."""
        while account.queue and account.queue[0][1].stamp != account.queue[0][0]:
            account.queue.popleft()
        account.stamp += 1
        if account.queue:
            account.weight = account.queue[0][1].weight
            inflation = self._inflation(now)
            self._settle(account, now, inflation)
            entry = (self._standing(account, inflation), account.queue[0][1].seq)
            heappush(self._heap, (*entry, account.stamp, user))

    def _rebuild(self, now: float) -> None:
        self._heap.clear()
        for user, account in self._accounts.items():
            self._push(user, account, now)
        heapify(self._heap)

    def _enqueue(self, job: Job, now: float) -> None:
        account = self._accounts.setdefault(job.user, _Account())
        account.queue.append((job.stamp, job))
        if len(account.queue) == 1:
            self._push(job.user, account, now)

    def _started(self, job: Job, now: float) -> None:
        account = self._accounts.setdefault(job.user, _Account())
        self._settle(account, now, self._inflation(now))
        account.cores += job.cores

    def _ended(self, job: Job, now: float) -> None:
        account = self._accounts[job.user]
        self._settle(account, now, self._inflation(now))
        account.cores = round(account.cores - job.cores, 6)
        self._push(job.user, account, now)

    def decide(self, now: float) -> Decisions:
        ledger = self.ledger
        started: list[Job] = []
        while self.pending and ledger.cores > 0:
            found = self._neediest(now)
            if found is None:
                break
            user, account, job = found
            if not ledger.fits(job):
                break
            account.queue.popleft()
            self._start(job, now)
            started.append(job)
            self._push(user, account, now)
        return Decisions((), started) if started else NOTHING

    def _neediest(self, now: float) -> tuple[str, _Account, Job] | None:
        """Return whose turn it is, and the job.

        Use only grows while jobs run, so an entry is never above where its account stands:
        the lowest that is still true is the lowest of all.
        """
        heap = self._heap
        inflation = self._inflation(now)
        while heap:
            standing, _, stamp, user = heap[0]
            account = self._accounts[user]
            if account.stamp != stamp:
                heappop(heap)
                continue
            queue = account.queue
            while queue and queue[0][1].stamp != queue[0][0]:
                queue.popleft()
            if not queue:
                heappop(heap)
                continue
            self._settle(account, now, inflation)
            current = self._standing(account, inflation)
            if current > standing:
                heapreplace(heap, (current, queue[0][1].seq, stamp, user))
                continue
            return user, account, queue[0][1]
        return None

    def save(self) -> dict[str, Any]:
        """Return each user's decayed core-seconds as they were last counted, and when that was."""
        times = [account.at for account in self._accounts.values()]
        now = max(times, default=0.0)
        inflation = self._inflation(now) if times else 1
        for account in self._accounts.values():
            self._settle(account, now, inflation)
        used = {user: account.used / inflation for user, account in self._accounts.items()}
        return {"at": now, "used": used}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `save` returned; call it before any job is submitted."""
        if not saved:
            return
        now = float(saved["at"])
        self._zero = now
        for user, used in saved["used"].items():
            account = self._accounts.setdefault(user, _Account())
            account.used = float(used)
            account.at = now
