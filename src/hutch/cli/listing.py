"""`ps`, `port`, `top` and `stats`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from hutch.cli.command import FILTER, FORMAT, NO_TRUNC, QUIET, Command
from hutch.cli.options import UsageError
from hutch.cli.output import Column, ago, local_time, print_json, show_rows, table_lines
from hutch.cli.session import Invocation
from hutch.ids import short_id
from hutch.units import format_bytes

if TYPE_CHECKING:
    from hutch.engine.instance import Instance
    from hutch.engine.results import InstanceInfo
    from hutch.linux.cgroup import Stats

__all__ = ["COMMANDS", "port_text"]

_PS_COLUMNS = (
    ("CONTAINER ID", "ID"),
    ("IMAGE", "Image"),
    ("COMMAND", "Command"),
    ("CREATED", "RunningFor"),
    ("STATUS", "Status"),
    ("PORTS", "Ports"),
    ("NAMES", "Names"),
)


# ---- ps ---------------------------------------------------------------------------------


def _ps(invocation: Invocation) -> int:
    last = invocation.options.get("last", 1 if invocation.flag("latest") else 0)
    infos = invocation.engine.list(
        all=invocation.flag("all") or last > 0, filters=invocation.filters()
    )
    if last > 0:
        infos = infos[:last]
    full = invocation.flag("no_trunc")
    rows = [_ps_row(info, full) for info in infos]
    columns: tuple[Column, ...] = _PS_COLUMNS
    if invocation.flag("size"):
        columns = (*columns, ("SIZE", "Size"))
        rows = [row | _size(invocation, info) for row, info in zip(rows, infos, strict=True)]
    if invocation.json or invocation.options.get("format") == "json":
        rows = [row | {"ID": info.id} for row, info in zip(rows, infos, strict=True)]
    return show_rows(invocation, rows, columns, identifier="ID")


def _size(invocation: Invocation, info: InstanceInfo) -> dict[str, str]:
    size = invocation.engine.get(info.id).disk_size()
    return {"Size": f"{format_bytes(size.writable)} (virtual {format_bytes(size.total)})"}


def _ps_row(info: InstanceInfo, full: bool) -> dict[str, Any]:
    command = " ".join(info.command)
    if not full and len(command) > 20:
        command = command[:19] + "…"
    networks = [a.name for a in info.spec.networks] or [info.spec.network_mode]
    labels = info.labels

    def label(name: str = "") -> str:
        return labels.get(name, "")

    row: dict[str, Any] = {
        "ID": info.id if full else short_id(info.id),
        "Image": info.image,
        "Command": f'"{command}"',
        "CreatedAt": local_time(info.created_ns),
        "RunningFor": ago(info.created_ns),
        "Ports": ", ".join(_port_texts(info)),
        "State": str(info.state),
        "Status": info.status,
        "Names": info.name,
        "Labels": ",".join(f"{k}={v}" for k, v in sorted(labels.items())),
        "Mounts": ",".join(m.name or m.source or m.target for m in info.mounts),
        "LocalVolumes": str(sum(1 for m in info.mounts if m.type == "volume")),
        "Networks": ",".join(networks),
    }
    return _Row(row, label)


class _Row(dict[str, Any]):
    """A row of `ps` whose `.Label "name"` works in templates without being shown in JSON."""

    def __init__(self, values: dict[str, Any], label: Any) -> None:
        super().__init__(values)
        self._label = label

    def get(self, key: str, default: Any = None) -> Any:
        return self._label if key == "Label" else super().get(key, default)

    def __or__(self, other: Any) -> Any:
        return _Row({**self, **other}, self._label)


def _port_texts(info: InstanceInfo) -> list[str]:
    published = [port for e in info.endpoints for port in getattr(e, "ports", ())]
    texts = []
    for port in published:
        for address in [port.host_ip] if port.host_ip else ["0.0.0.0", "[::]"]:
            shown = f"[{address}]" if ":" in address and not address.startswith("[") else address
            texts.append(f"{shown}:{port.host_port}->{port.container_port}/{port.protocol}")
    inside = {(port.container_port, port.protocol) for port in published}
    for exposed in info.spec.exposed:
        number, _, protocol = exposed.partition("/")
        if (int(number), protocol) not in inside and str(info.state) == "running":
            texts.append(exposed)
    return texts


# ---- port -------------------------------------------------------------------------------


def port_text(port: Any) -> list[str]:
    """Return `0.0.0.0:8080` and `[::]:8080` for a published port."""
    if port.host_ip:
        shown = f"[{port.host_ip}]" if ":" in port.host_ip else port.host_ip
        return [f"{shown}:{port.host_port}"]
    return [f"0.0.0.0:{port.host_port}", f"[::]:{port.host_port}"]


def _port(invocation: Invocation) -> int:
    info = invocation.engine.get(invocation.arguments[0]).info()
    ports = [port for e in info.endpoints for port in getattr(e, "ports", ())]
    if len(invocation.arguments) == 2:
        wanted = invocation.arguments[1]
        wanted = wanted if "/" in wanted else f"{wanted}/tcp"
        ports = [p for p in ports if f"{p.container_port}/{p.protocol}" == wanted]
        if not ports:
            raise UsageError(f"port {wanted} is not published by {info.name}", exit_code=1)
    addresses: dict[str, list[str]] = {}
    for port in ports:
        addresses.setdefault(f"{port.container_port}/{port.protocol}", []).extend(port_text(port))
    if invocation.json:
        print_json(addresses)
        return 0
    for inside, texts in addresses.items():
        for text in texts:
            print(text if len(invocation.arguments) == 2 else f"{inside} -> {text}")
    return 0


# ---- top --------------------------------------------------------------------------------


def _top(invocation: Invocation) -> int:
    name, *arguments = invocation.arguments
    table = invocation.engine.get(name).top(arguments)
    if invocation.json:
        print_json([dict(zip(table.titles, row, strict=False)) for row in table.rows])
        return 0
    for line in table_lines(table.titles, table.rows):
        print(line)
    return 0


# ---- stats ------------------------------------------------------------------------------

_STATS_COLUMNS = (
    ("CONTAINER ID", "ID"),
    ("NAME", "Name"),
    ("CPU %", "CPUPerc"),
    ("MEM USAGE / LIMIT", "MemUsage"),
    ("MEM %", "MemPerc"),
    ("NET I/O", "NetIO"),
    ("BLOCK I/O", "BlockIO"),
    ("PIDS", "PIDs"),
)


def _stats(invocation: Invocation) -> int:
    from hutch.cli.output import is_tty

    once = invocation.flag("no_stream") or invocation.json
    before = _readings(invocation)
    clear = is_tty(1) and not once
    while True:
        time.sleep(1.0)
        after = _readings(invocation)
        rows = [
            _stats_row(name, instance, before.get(instance.id, (instance, name, now))[2], now)
            for instance, name, now in after.values()
        ]
        if clear:
            print("\x1b[H\x1b[2J", end="")
        show_rows(invocation, rows, _STATS_COLUMNS, identifier="ID")
        if once or (invocation.arguments and not after):
            return 0
        before = after


def _readings(invocation: Invocation) -> dict[str, tuple[Instance, str, Stats]]:
    """Return a reading of every instance that runs, of those named or of all."""
    from hutch.errors import NotFound, WrongState

    engine = invocation.engine
    if invocation.arguments:
        chosen = [engine.get(name) for name in invocation.arguments]
    else:
        chosen = [engine.get(info.id) for info in engine.list()]
    readings = {}
    for instance in chosen:
        try:
            readings[str(instance.id)] = (instance, instance.name, instance.stats())
        except (NotFound, WrongState):
            if invocation.arguments:
                raise
    return readings


def _stats_row(name: str, instance: Instance, before: Stats, now: Stats) -> dict[str, Any]:
    elapsed = max(now.time_ns - before.time_ns, 1)
    busy = (now.cpu.total_ns - before.cpu.total_ns) / elapsed * 100 if now is not before else 0.0
    limit = now.memory.limit or _host_memory()
    received = sum(n.received_bytes for n in instance.network_stats())
    sent = sum(n.sent_bytes for n in instance.network_stats())
    read = sum(device.read_bytes for device in now.block)
    written = sum(device.write_bytes for device in now.block)
    return {
        "ID": short_id(instance.id),
        "Container": short_id(instance.id),
        "Name": name,
        "CPUPerc": f"{busy:.2f}%",
        "MemUsage": f"{format_bytes(now.memory.working_set)} / {format_bytes(limit)}",
        "MemPerc": f"{now.memory.working_set / limit * 100:.2f}%",
        "NetIO": f"{format_bytes(received)} / {format_bytes(sent)}",
        "BlockIO": f"{format_bytes(read)} / {format_bytes(written)}",
        "PIDs": str(now.pids.current),
    }


def _host_memory() -> int:
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


COMMANDS = {
    "ps": Command(
        handler=_ps,
        summary="List running instances, or all of them.",
        options=(
            ("all", "a", "flag", "", "Show those that have stopped as well"),
            FILTER,
            FORMAT,
            ("last", "n", "int", "NUMBER", "Show the last ones created"),
            ("latest", "l", "flag", "", "Show the last one created"),
            NO_TRUNC,
            QUIET,
            ("size", "s", "flag", "", "Show what their files take: written (with the image)"),
        ),
        examples=(
            "hutch ps -a",
            "hutch ps -aq --filter label=job=test",
            "hutch ps --format 'table {{.Names}}\\t{{.Status}}'",
            "hutch ps -o json",
        ),
    ),
    "port": Command(
        handler=_port,
        summary="List the published ports of an instance, or where one leads from.",
        arguments="INSTANCE [PORT[/PROTOCOL]]",
        low=1,
        high=2,
        examples=("hutch port web", "hutch port web 80/tcp"),
    ),
    "top": Command(
        handler=_top,
        summary="List the processes of an instance.",
        arguments="INSTANCE [PS OPTIONS]",
        low=1,
        high=-1,
        interspersed=False,
        examples=("hutch top web", "hutch top web -o pid,rss,args"),
    ),
    "stats": Command(
        handler=_stats,
        summary="Show what running instances use, again and again.",
        arguments="[INSTANCE...]",
        high=-1,
        options=(
            ("all", "a", "flag", "", "Accepted, without effect"),
            FORMAT,
            ("no-stream", "", "flag", "", "Show it once"),
            NO_TRUNC,
        ),
        examples=("hutch stats", "hutch stats --no-stream -o json web"),
    ),
}
