"""Signals by name and number, as Linux numbers them on every architecture hutch runs on."""

from __future__ import annotations

from hutch.errors import InvalidArgument

__all__ = ["parse_signal", "signal_name"]

_NAMES = (
    "HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT STOP "
    "TSTP TTIN TTOU URG XCPU XFSZ VTALRM PROF WINCH IO PWR SYS"
).split()
_NUMBERS = {name: number for number, name in enumerate(_NAMES, 1)}
_NUMBERS |= {"IOT": 6, "CLD": 17, "POLL": 29}
_RTMIN, _RTMAX = 34, 64  # 32 and 33 belong to the C library


def parse_signal(value: str | int, *, field: str = "signal") -> int:
    """Return a signal's number from `TERM`, `SIGTERM`, `sigrtmin+3`, `15` or 15."""
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str):
        name = value.strip().upper().removeprefix("SIG")
        if name.isascii() and name.isdigit() and len(name) < 4:
            number = int(name)
        else:
            number = _NUMBERS.get(name) or _realtime(name)
    else:
        number = 0
    if not 1 <= number <= _RTMAX:
        shown = value if isinstance(value, str) and len(value) < 40 else "it"
        raise InvalidArgument(
            f"no such signal: {shown!r}",
            field=field,
            hint="use a name such as SIGTERM or a number from 1 to 64",
        )
    return number


def signal_name(number: int) -> str:
    """Return `SIGTERM` for 15, `SIGRTMIN+3` for 37; the number itself where it has no name."""
    if 1 <= number <= len(_NAMES):
        return "SIG" + _NAMES[number - 1]
    if number == _RTMIN:
        return "SIGRTMIN"
    return f"SIGRTMIN+{number - _RTMIN}" if _RTMIN < number <= _RTMAX else str(number)


def _realtime(name: str) -> int:
    for base, start, sign in (("RTMIN", _RTMIN, "+"), ("RTMAX", _RTMAX, "-")):
        rest = name.removeprefix(base)
        if rest == name:
            continue
        if not rest:
            return start
        digits = rest[1:]
        if rest[0] == sign and digits.isascii() and digits.isdigit() and len(digits) < 3:
            offset = int(digits)
            number = start + offset if sign == "+" else start - offset
            return number if _RTMIN <= number <= _RTMAX else 0
    return 0
