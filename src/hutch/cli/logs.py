"""`logs`."""

from __future__ import annotations

from hutch.cli.command import Command
from hutch.cli.options import UsageError
from hutch.cli.output import stamp, write_bytes
from hutch.cli.session import Invocation
from hutch.units import parse_moment

__all__ = ["COMMANDS"]


def _tail(text: str) -> int | None:
    if text == "all":
        return None
    try:
        number = int(text)
    except ValueError:
        raise UsageError(f"--tail: expected a number or all, got {text!r}") from None
    return number if number >= 0 else None


def _logs(invocation: Invocation) -> int:
    values = invocation.options
    instance = invocation.engine.get(invocation.arguments[0])
    since, until = values.get("since"), values.get("until")
    records = instance.logs(
        follow=invocation.flag("follow"),
        since=parse_moment(since, "since") if since else None,
        until=parse_moment(until, "until") if until else None,
        tail=_tail(values.get("tail", "all")),
    )
    stamped = invocation.flag("timestamps")
    fresh = {1: True, 2: True}
    for record in records:
        fd = record.stream
        if invocation.json:
            write_bytes(_json_line(record.time_ns, record.stream, record.data))
            continue
        if stamped and fresh[fd]:
            write_bytes(f"{stamp(record.time_ns)} ".encode(), fd)
        write_bytes(record.data, fd)
        fresh[fd] = record.data.endswith(b"\n")
    return 0


def _json_line(time_ns: int, stream: int, data: bytes) -> bytes:
    import msgspec

    return (
        msgspec.json.encode(
            {
                "time": stamp(time_ns),
                "stream": "stderr" if stream == 2 else "stdout",
                "log": data.decode("utf-8", "replace"),
            }
        )
        + b"\n"
    )


COMMANDS = {
    "logs": Command(
        handler=_logs,
        summary="Show what an instance wrote to stdout and stderr.",
        arguments="INSTANCE",
        low=1,
        high=1,
        options=(
            ("details", "", "flag", "", "Accepted, without effect"),
            ("follow", "f", "flag", "", "Go on until it ends"),
            ("since", "", "text", "TIME", "From this time on: 10m, RFC 3339 or Unix time"),
            ("tail", "n", "text", "LINES", "The last lines only (all)"),
            ("timestamps", "t", "flag", "", "Begin lines with their time"),
            ("until", "", "text", "TIME", "Up to this time"),
        ),
        examples=("hutch logs -f --tail 20 web", "hutch logs --since 10m -t web"),
    ),
}
