"""Write results: tables for people, JSON for programs, Go templates for scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hutch.cli.session import Invocation

__all__ = [
    "Column",
    "ago",
    "print_json",
    "show_result",
    "show_rows",
    "stamp",
    "table_lines",
    "to_json",
    "visible",
]

# (title, key of the row)
Column = tuple[str, str]
Row = dict[str, Any]


def to_json(value: object, *, indent: bool = True) -> str:
    """Return JSON text of plain values and Structs."""
    import msgspec

    order: Any = "deterministic" if not indent else None
    try:
        data = msgspec.json.encode(value, order=order)
    except UnicodeEncodeError:  # a file's name may be any bytes
        data = msgspec.json.encode(_readable(msgspec.to_builtins(value)), order=order)
    if indent:
        data = msgspec.json.format(data, indent=4)
    return data.decode()


def _readable(value: Any) -> Any:
    """Return plain values with a replacement for what is no Unicode, as Docker has it."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if isinstance(value, dict):
        return {_readable(k): _readable(v) for k, v in value.items()}
    return [_readable(v) for v in value] if isinstance(value, list) else value


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    print(to_json(value))


def show_result(invocation: Invocation, line: str, **fields: object) -> int:
    """Print what a command has made or changed: a line for people, an object for programs.

    `fields` are the object's, named as those of a listing: `Id`, `Name`, and what else there is.
    """
    if invocation.json:
        print_json(fields)
    elif line:
        print(line)
    return 0


def show_rows(
    invocation: Invocation, rows: Iterable[Row], columns: Sequence[Column], *, identifier: str
) -> int:
    """Print rows as the invocation asks: identifiers, JSON, a template, or a table.

    `identifier` is the key that `--quiet` prints.
    """
    rows = list(rows)
    template = invocation.options.get("format")
    if invocation.flag("quiet"):
        for row in rows:
            print(row[identifier])
    elif invocation.json:
        print_json(rows)
    elif template in (None, "", "table"):
        for line in table_lines(
            [c[0] for c in columns], [[r[k] for _, k in columns] for r in rows]
        ):
            print(line)
    elif template == "json":
        for row in rows:
            print(to_json(row, indent=False))
    else:
        _show_template(template, rows, columns)
    return 0


def _show_template(template: str, rows: list[Row], columns: Sequence[Column]) -> None:
    from hutch.cli.template import Template

    is_table = template.startswith("table ")
    compiled = Template(template.removeprefix("table ").replace("\\t", "\t").replace("\\n", "\n"))
    lines = [compiled.render(row) for row in rows]
    if not is_table:
        for line in lines:
            print(line)
        return
    titles = {key: title for title, key in columns}
    header = compiled.render(_Header(titles))
    cells = [line.split("\t") for line in (header, *lines)]
    for line in table_lines(cells[0], cells[1:]):
        print(line)


class _Header(dict[str, Any]):
    """The row of titles: a field without one is its own name in capitals."""

    def get(self, key: str, default: Any = None) -> Any:
        if key == "Label":
            return lambda name="": name
        return super().get(key, key.upper())


def table_lines(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return aligned lines, three spaces between columns."""
    cells = [[visible(str(cell)) for cell in row] for row in (titles, *rows)]
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(len(titles))]
    return [
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in cells
    ]


def visible(text: str) -> str:
    """Return text with its control characters written out, for people's eyes.

    Names of files, commands and arguments are an image's or a program's: on a terminal they
    would move the cursor, set its title, or hide what else is there.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _written_out(c) for c in text)


def _written_out(char: str) -> str:
    if 0xDC80 <= ord(char) <= 0xDCFF:  # a byte that is no UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()


def ago(time_ns: int, now: Callable[[], int] | None = None) -> str:
    """Return `5 minutes ago` for a time in nanoseconds since the epoch."""
    import time

    from hutch.units import format_duration

    if not time_ns:
        return "never"
    return f"{format_duration(max(0, ((now or time.time_ns)() - time_ns) / 1e9))} ago"


def stamp(time_ns: int) -> str:
    """Return a time as RFC 3339 with nanoseconds, in UTC; Docker's zero time for 0."""
    import time

    if not time_ns:
        return "0001-01-01T00:00:00Z"
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds:09d}Z"


def write_bytes(data: bytes, fd: int = 1) -> None:
    """Write all of it to a descriptor, unbuffered."""
    import os

    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def is_tty(fd: int) -> bool:
    """Tell whether a descriptor is a terminal."""
    import os

    try:
        return os.isatty(fd)
    except OSError:
        return False


def local_time(time_ns: int) -> str:
    """Return a time as `docker ps` writes CreatedAt: `2024-05-01 12:00:00 +0200 CEST`."""
    import time

    return time.strftime("%Y-%m-%d %H:%M:%S %z %Z", time.localtime(time_ns / 1e9))
