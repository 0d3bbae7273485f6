"""Metrics of the server in Prometheus' text format."""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import TYPE_CHECKING

from hutch.api.docker.replies import Answer, Reply
from hutch.api.docker.routing import Route
from hutch.engine.lookup import all_records

if TYPE_CHECKING:
    from hutch.api.docker.front import Front, Served
    from hutch.api.docker.requests import Request

__all__ = ["ROUTES", "Metrics"]

_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts what was answered."""

    def __init__(self) -> None:
        self._begun = time.time()
        self._answers: Counter[tuple[str, str, int]] = Counter()
        self._slower: Counter[float] = Counter()
        self._count = 0
        self._seconds = 0.0

    def observe(self, served: Served) -> None:
        """Count an answer. Streams and those that were taken over last as long as they do."""
        # Not the method of what has no route: whoever asks could make up any number of them.
        method, path = "unknown", "unknown"
        if served.route is not None:
            method, path = served.method, served.route.path
        self._answers[method, path, served.status] += 1
        self._count += 1
        self._seconds += served.seconds
        for bound in _BUCKETS_S:
            if served.seconds <= bound:
                self._slower[bound] += 1

    def render(self, front: Front) -> str:
        """Return all of them."""
        lines: list[str] = []
        _metric(lines, "hutch_api_requests_total", "counter", "Requests answered.")
        for (method, path, status), count in sorted(self._answers.items()):
            labels = f'method="{method}",path="{path}",code="{status}"'
            lines.append(f"hutch_api_requests_total{{{labels}}} {count}")
        name = "hutch_api_request_duration_seconds"
        _metric(lines, name, "histogram", "How long requests took.")
        for bound in _BUCKETS_S:
            lines.append(f'{name}_bucket{{le="{bound:g}"}} {self._slower[bound]}')
        lines.append(f'{name}_bucket{{le="+Inf"}} {self._count}')
        lines.append(f"{name}_sum {self._seconds:.6f}")
        lines.append(f"{name}_count {self._count}")
        self._gauges(lines, front)
        return "\n".join(lines) + "\n"

    def _gauges(self, lines: list[str], front: Front) -> None:
        _metric(lines, "engine_daemon_container_states_containers", "gauge", "Containers by state.")
        states = Counter(record.state.value for record in all_records(front.engine.context))
        for state in ("paused", "running", "stopped"):
            count = states.get(state, 0)
            if state == "stopped":
                count = sum(states.values()) - states["paused"] - states["running"]
            lines.append(f'engine_daemon_container_states_containers{{state="{state}"}} {count}')
        values = (
            ("hutch_followed_containers", "Containers started here that run.", len(front.lives)),
            ("hutch_journal_listeners", "Who listens to events.", len(front.journal)),
            ("process_open_fds", "Open descriptors.", len(os.listdir("/proc/self/fd"))),
            ("process_resident_memory_bytes", "Resident memory.", _resident()),
            ("process_start_time_seconds", "When the daemon began.", round(self._begun)),
        )
        for name, what, value in values:
            _metric(lines, name, "gauge", what)
            lines.append(f"{name} {value}")


def _metric(lines: list[str], name: str, kind: str, what: str) -> None:
    lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _metrics(request: Request) -> Answer:
    front = request.front
    text = await front.call(front.metrics.render, front)
    return Reply(200, text.encode(), _TYPE)


ROUTES = (
    Route(
        method="GET",
        path="/metrics",
        handler=_metrics,
        summary="Metrics for Prometheus",
        verdict="differs: dockerd has them at `metrics-addr` only, and others but for the states "
        "of containers",
    ),
)
