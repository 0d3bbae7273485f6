"""List instances, with Docker's filters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hutch.engine.context import Context
from hutch.engine.describe import describe
from hutch.engine.finish import refresh
from hutch.engine.lookup import all_records, find_id, load
from hutch.engine.results import InstanceInfo
from hutch.errors import Exhausted, InvalidArgument, NotFound
from hutch.lifecycle import State

__all__ = ["list_instances"]

_SHOWN = (State.STARTING, State.RUNNING, State.PAUSED, State.RESTARTING)
Test = Callable[[InstanceInfo, str], bool]


def list_instances(
    context: Context,
    *,
    all_states: bool,
    filters: Mapping[str, Sequence[str]] | None = None,
) -> list[InstanceInfo]:
    """Return descriptions, newest first. Filters on status or exit code look at all states.

    Values of one filter are alternatives, different filters must all hold; every label
    must be there.
    """
    wanted = dict(filters or {})
    for key, values in wanted.items():
        if key not in _TESTS:
            raise InvalidArgument(
                f"unknown filter {key!r}", field="filters", hint=f"use {', '.join(_TESTS)}"
            )
        if key == "status":
            for value in values:
                if value not in tuple(State):
                    raise InvalidArgument(
                        f"unknown status {value!r}",
                        field="filters.status",
                        hint=f"use {', '.join(State)}",
                    )
    bounds = {
        key: [_created(context, value) for value in wanted.pop(key)]
        for key in ("before", "since")
        if key in wanted
    }
    everything = all_states or "status" in wanted or "exited" in wanted
    found = []
    for record in all_records(context):
        try:
            record = refresh(context, record)
        except NotFound:
            continue
        except Exhausted:  # no room to note that it has ended: told as it was noted last
            pass
        if not everything and record.state not in _SHOWN:
            continue
        if any(record.created_ns >= bound for bound in bounds.get("before", ())):
            continue
        if any(record.created_ns <= bound for bound in bounds.get("since", ())):
            continue
        info = describe(context, record)
        if _matches(info, wanted):
            found.append(info)
    return found


def _created(context: Context, name: str) -> int:
    return load(context, find_id(context, name)).created_ns


def _matches(info: InstanceInfo, wanted: Mapping[str, Sequence[str]]) -> bool:
    for key, values in wanted.items():
        test = _TESTS[key]
        results = [test(info, value) for value in values]
        if not (all(results) if key == "label" else any(results)):
            return False
    return True


def _label(info: InstanceInfo, value: str) -> bool:
    name, equals, content = value.partition("=")
    return name in info.labels and (not equals or info.labels[name] == content)


def _image(info: InstanceInfo, value: str) -> bool:
    plain = info.image_id.removeprefix("sha256:")
    return (
        value in (info.image, info.image_id)
        or info.image.split(":")[0] == value
        or (len(value) >= 4 and plain.startswith(value.removeprefix("sha256:")))
    )


def _network(info: InstanceInfo, value: str) -> bool:
    names = [attachment.name for attachment in info.spec.networks] or [info.spec.network_mode]
    return value in names or any(
        getattr(endpoint, "network_id", "").startswith(value) for endpoint in info.endpoints
    )


def _volume(info: InstanceInfo, value: str) -> bool:
    return any(value in (mount.name, mount.source, mount.target) for mount in info.mounts)


def _published(info: InstanceInfo, value: str) -> bool:
    port, _, protocol = value.partition("/")
    return any(
        str(mapping.container_port) == port and mapping.protocol == (protocol or "tcp")
        for mapping in info.spec.ports
    )


_TESTS: dict[str, Test] = {
    "id": lambda info, value: info.id.startswith(value),
    "name": lambda info, value: value.removeprefix("/") in info.name,
    "label": _label,
    "status": lambda info, value: info.state == value,
    "exited": lambda info, value: info.state == State.EXITED and str(info.exit_code) == value,
    "ancestor": _image,
    "health": lambda info, value: (info.health.status if info.health else "none") == value,
    "network": _network,
    "volume": _volume,
    "publish": _published,
    "expose": lambda info, value: value in info.spec.exposed,
    "isolation": lambda info, value: info.spec.isolation == value,
    "before": lambda _info, _value: True,
    "since": lambda _info, _value: True,
}
