"""Jobs from a file: YAML with one job or many, arrays and matrices.

    defaults:                      # of every job below
      image: debian:bookworm
      queue: nightly
    jobs:
      - name: fetch
        command: [sh, -c, "…"]
        outputs: [/data]
      - name: train
        after: [fetch]             # or {fetch: any}
        matrix: {rate: [0.1, 0.01], model: [small, large]}
        env: {RATE: "{rate}"}
        command: train --model {model}

A job of a matrix is made once for each combination; `{name}` in its texts is replaced. The other
fields are those of `engine.jobs.submit`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hutch.engine.jobs.records import Condition
from hutch.engine.jobs.request import JOB_OPTIONS
from hutch.engine.jobs.submit import Wanted
from hutch.errors import InvalidArgument
from hutch.spec.build import OPTIONS

__all__ = ["read_jobs"]

_OWN = frozenset({"image", "command", "matrix"})
_FIELDS = (OPTIONS | JOB_OPTIONS | _OWN) - {"env_file", "remove", "restart"}
_FILE_BOUND = 16 << 20
_MATRIX_BOUND = 100_000
_HOLE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


def read_jobs(data: bytes, *, source: str = "jobs") -> list[Wanted]:
    """Return the entries of a specification file; raise `InvalidArgument` naming the field.

    A mapping with `jobs` is many, any other mapping one, a sequence many.
    """
    document = _parse(data, source)
    defaults: Mapping[str, Any] = {}
    if isinstance(document, Mapping) and "jobs" in document:
        _check_fields(document, {"jobs", "defaults"}, "")
        defaults = _mapping(document.get("defaults") or {}, "defaults")
        _check_fields(defaults, _FIELDS - {"name", "matrix"}, "defaults.")
        document = document["jobs"]
    entries = document if isinstance(document, list) else [document]
    if not entries:
        raise InvalidArgument("no job in it", field=source)
    found: list[Wanted] = []
    for i, entry in enumerate(entries):
        where = f"jobs[{i}]"
        given = {**defaults, **_mapping(entry, where)}
        _check_fields(given, _FIELDS, where + ".")
        found += _entries(given, where + ".")
    return found


def _parse(data: bytes, source: str) -> Any:
    if len(data) > _FILE_BOUND:
        raise InvalidArgument(f"longer than {_FILE_BOUND} bytes", field=source)
    import yaml

    try:
        return yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as exc:
        mark = getattr(exc, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(exc, "problem", None) or "not YAML"
        raise InvalidArgument(f"{line}{problem}", field=source) from exc


def _mapping(value: Any, field: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidArgument(f"expected a mapping, got {type(value).__name__}", field=field)
    return value


def _check_fields(given: Mapping[Any, Any], known: frozenset[str] | set[str], where: str) -> None:
    for name in given:
        if name in known:
            continue
        from difflib import get_close_matches

        near = get_close_matches(str(name), sorted(known), 1)
        raise InvalidArgument(
            "no such field",
            field=f"{where}{name}",
            hint=f"did you mean {near[0]}?" if near else f"use {', '.join(sorted(known)[:8])} …",
        )


def _entries(given: dict[str, Any], where: str) -> list[Wanted]:
    matrix = _mapping(given.pop("matrix", None) or {}, where + "matrix")
    if not isinstance(given.get("image"), str) or not given["image"]:
        raise InvalidArgument("expected the name of an image", field=where + "image")
    after = given.pop("after", None)
    numbers, names = _dependencies(after, where + "after")
    found = []
    for chosen in _combinations(matrix, where + "matrix"):
        options = {k: _filled(v, chosen, f"{where}{k}") for k, v in given.items()}
        image, command = options.pop("image"), options.pop("command", None)
        if numbers:
            options["after"] = numbers
        found.append(
            Wanted(image=image, command=command, options=options, after_names=names, where=where)
        )
    return found


def _dependencies(value: Any, field: str) -> tuple[list[str], tuple[tuple[str, str], ...]]:
    """Split dependencies into those on jobs that exist, by number, and those by name."""
    if value is None:
        return [], ()
    pairs: list[tuple[str, str]] = []
    if isinstance(value, Mapping):
        pairs = [(str(name), str(condition)) for name, condition in value.items()]
    else:
        members = value if isinstance(value, list) else [value]
        for member in members:
            name, _, condition = str(member).partition(":")
            pairs.append((name, condition or "ok"))
    for name, condition in pairs:
        if condition not in tuple(Condition):
            raise InvalidArgument(
                f"expected {', '.join(Condition)}, got {condition[:40]!r}", field=f"{field}.{name}"
            )
    numbers = [f"{name}:{condition}" for name, condition in pairs if name.isdecimal()]
    return numbers, tuple(pair for pair in pairs if not pair[0].isdecimal())


def _combinations(matrix: Mapping[str, Any], field: str) -> list[dict[str, str]]:
    count = 1
    for name, values in matrix.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise InvalidArgument("expected a list of values", field=f"{field}.{name}")
        count *= len(values)
        if count > _MATRIX_BOUND:
            raise InvalidArgument(f"more than {_MATRIX_BOUND} combinations", field=field)
    names = [str(name) for name in matrix]
    return [
        dict(zip(names, map(_text, chosen), strict=True))
        for chosen in itertools.product(*matrix.values())
    ]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _filled(value: Any, chosen: Mapping[str, str], field: str) -> Any:
    """Replace `{name}` in texts by the value of this combination; other braces stay."""
    if not chosen:
        return value
    if isinstance(value, str):
        return _HOLE.sub(lambda m: chosen.get(m[1], m[0]), value)
    if isinstance(value, Mapping):
        return {k: _filled(v, chosen, f"{field}.{k}") for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, chosen, field) for v in value]
    return value
