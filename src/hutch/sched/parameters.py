"""Parameters of policies, as they stand after the name: `rr:quantum=4`."""

from __future__ import annotations

import math

import msgspec

from hutch.errors import InvalidArgument
from hutch.units import parse_duration

__all__ = ["Parameter", "read_parameters"]

Value = float | int | bool


class Parameter(msgspec.Struct, frozen=True):
    """One parameter. Kinds: `seconds` (also `100ms`), `number`, `count`, `flag`."""

    kind: str
    default: Value
    summary: str
    low: float = 0
    """The least that is allowed; for seconds and numbers 0 itself is not, unless `zero`."""
    zero: bool = False
    high: float = math.inf


def read_parameters(owner: str, known: dict[str, Parameter], text: str) -> dict[str, Value]:
    """Return the values in `quantum=4,levels=3`.

    Raises `InvalidArgument` naming the field, which begins with `owner`.
    """
    values: dict[str, Value] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        name = name.strip()
        if name not in known:
            raise InvalidArgument(
                f"no such parameter: {name!r}",
                field=owner,
                hint=f"it has {', '.join(known)}" if known else "it has none",
            )
        parameter = known[name]
        if not equals and parameter.kind == "flag":
            value = "true"
        values[name] = _read(f"{owner}.{name}", parameter, value.strip())
    return values


def _read(field: str, parameter: Parameter, text: str) -> Value:
    match parameter.kind:
        case "flag":
            if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
                raise InvalidArgument(f"expected true or false, got {text!r}", field=field)
            return text.lower() in ("true", "yes", "1")
        case "seconds":
            number: float = math.inf if text == "inf" else parse_duration(text, field=field)
        case _:
            try:
                number = float(text)
            except ValueError:
                raise InvalidArgument(f"expected a number, got {text!r}", field=field) from None
    if math.isnan(number) or number < parameter.low or (number == 0 and not parameter.zero):
        bound = f"at least {parameter.low:g}" if parameter.low or parameter.zero else "above 0"
        raise InvalidArgument(f"must be {bound}, got {text!r}", field=field)
    if number > parameter.high:
        raise InvalidArgument(f"must be at most {parameter.high:g}, got {text!r}", field=field)
    if parameter.kind == "count":
        if number != int(number):
            raise InvalidArgument(f"expected a whole number, got {text!r}", field=field)
        return int(number)
    return int(number) if number.is_integer() else number
