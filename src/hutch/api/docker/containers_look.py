"""What containers do and use: their processes, their counters."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from hutch.api.docker.errors import ApiError
from hutch.api.docker.naming import find_container
from hutch.api.docker.replies import Answer, Stream, encode, json_reply
from hutch.api.docker.routing import Route
from hutch.api.docker.times import timestamp
from hutch.errors import HutchError, NotFound, WrongState

if TYPE_CHECKING:
    from hutch.api.docker.requests import Request
    from hutch.engine import Instance
    from hutch.engine.results import NetworkUsage
    from hutch.linux.cgroup import Stats

__all__ = ["ROUTES"]

_INTERVAL_S = 1.0


async def _top(request: Request) -> Answer:
    instance = await find_container(request)
    given = request.query.text("ps_args").split()
    try:
        # `ps -ef` is what is shown without asking ps.
        table = await request.front.call_slow(instance.top, [] if given == ["-ef"] else given)
    except WrongState as exc:
        raise ApiError(409, f"container {instance.id} is not running") from exc
    request.front.note(instance, "top")
    return json_reply({"Titles": table.titles, "Processes": table.rows})


# ---- stats --------------------------------------------------------------------------------


async def _stats(request: Request) -> Answer:
    instance = await find_container(request)
    stream = request.query.flag("stream", True)
    one_shot = request.query.flag("one-shot")
    if stream and one_shot:
        raise ApiError(400, "cannot have stream=true and one-shot=true")
    return Stream(_readings(request, instance, stream, one_shot), "application/json")


async def _readings(
    request: Request, instance: Instance, stream: bool, one_shot: bool
) -> AsyncIterator[bytes]:
    before: dict[str, Any] | None = None
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        try:
            reading = await request.front.call(_read, instance)
        except NotFound:
            return
        # Shares of processors are told by two readings: but for who wants one, and at once.
        if stream or one_shot or before is not None or not reading["memory_stats"]:
            yield encode(_with_previous(reading, before)) + b"\n"
            if not stream:
                return
        before = reading
        due = max(due + _INTERVAL_S, loop.time())
        await asyncio.sleep(due - loop.time())


def _with_previous(reading: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    if before is None:
        return reading
    return reading | {"preread": before["read"], "precpu_stats": before["cpu_stats"]}


def _read(instance: Instance) -> dict[str, Any]:
    """Return one reading; an empty one of a container that does not run."""
    found: dict[str, Any] = {
        "name": f"/{instance.name}",
        "id": str(instance.id),
        "read": timestamp(time.time_ns()),
        "preread": timestamp(0),
        "num_procs": 0,
        "pids_stats": {},
        "cpu_stats": _no_cpu(),
        "precpu_stats": _no_cpu(),
        "memory_stats": {},
        "blkio_stats": _blkio(()),
        "storage_stats": {},
    }
    try:
        stats = instance.stats()
        networks = instance.network_stats()
    except NotFound:
        raise
    except HutchError:
        instance.info()  # it is there still
        return found | {"read": found["preread"]}
    return found | {
        "pids_stats": {"current": stats.pids.current, "limit": stats.pids.limit or 2**64 - 1},
        "cpu_stats": _cpu(stats),
        "memory_stats": _memory(stats),
        "blkio_stats": _blkio(
            [
                entry
                for device in stats.block
                for entry in (
                    (device.major, device.minor, "read", device.read_bytes),
                    (device.major, device.minor, "write", device.write_bytes),
                )
            ]
        ),
        "networks": {usage.name: _network(usage) for usage in networks},
    }


def _no_cpu() -> dict[str, Any]:
    return {
        "cpu_usage": {"total_usage": 0, "usage_in_kernelmode": 0, "usage_in_usermode": 0},
        "throttling_data": {"periods": 0, "throttled_periods": 0, "throttled_time": 0},
    }


def _cpu(stats: Stats) -> dict[str, Any]:
    cpu = stats.cpu
    usage: dict[str, Any] = {
        "total_usage": cpu.total_ns,
        "usage_in_kernelmode": cpu.system_ns,
        "usage_in_usermode": cpu.user_ns,
    }
    if cpu.per_cpu_ns:
        usage["percpu_usage"] = cpu.per_cpu_ns
    return {
        "cpu_usage": usage,
        "system_cpu_usage": _host_cpu_ns(),
        "online_cpus": os.cpu_count() or 1,
        "throttling_data": {
            "periods": cpu.periods,
            "throttled_periods": cpu.throttled_periods,
            "throttled_time": cpu.throttled_ns,
        },
    }


def _host_cpu_ns() -> int:
    """Return the time that all processors of the host have spent, as Docker sums it."""
    with open("/proc/stat") as file:
        fields = file.readline().split()[1:8]
    return sum(int(field) for field in fields) * 10**9 // os.sysconf("SC_CLK_TCK")


def _memory(stats: Stats) -> dict[str, Any]:
    memory = stats.memory
    # Clients take the inactive file cache off, by the name that it has in either version.
    idle = max(0, memory.usage - memory.working_set)
    detail = {"inactive_file": idle, "total_inactive_file": idle} | memory.detail
    return {
        "usage": memory.usage,
        "max_usage": memory.max_usage,
        "stats": detail,
        "failcnt": memory.failures,
        "limit": memory.limit or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }


def _blkio(entries: list[tuple[int, int, str, int]] | tuple[()]) -> dict[str, Any]:
    return {
        "io_service_bytes_recursive": [
            {"major": major, "minor": minor, "op": op, "value": value}
            for major, minor, op, value in entries
        ]
        or None,
        **dict.fromkeys(
            (
                "io_serviced_recursive",
                "io_queue_recursive",
                "io_service_time_recursive",
                "io_wait_time_recursive",
                "io_merged_recursive",
                "io_time_recursive",
                "sectors_recursive",
            )
        ),
    }


def _network(usage: NetworkUsage) -> dict[str, int]:
    return {
        "rx_bytes": usage.received_bytes,
        "rx_packets": usage.received_packets,
        "rx_errors": usage.received_errors,
        "rx_dropped": usage.received_dropped,
        "tx_bytes": usage.sent_bytes,
        "tx_packets": usage.sent_packets,
        "tx_errors": usage.sent_errors,
        "tx_dropped": usage.sent_dropped,
    }


ROUTES = (
    Route(
        method="GET",
        path="/containers/{id}/top",
        handler=_top,
        summary="List a container's processes",
        options={
            "ps_args": "works for containers; refused for virtual machines, which have a kernel "
            "of their own"
        },
    ),
    Route(
        method="GET",
        path="/containers/{id}/stats",
        handler=_stats,
        summary="Tell what a container uses",
        options={"stream": "works", "one-shot": "works"},
    ),
)
