"""Whatever a client asks of a new container, it is made a specification or told what is wrong."""

from __future__ import annotations

from typing import Any

import msgspec
import msgspec.inspect as kinds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hutch.api.docker.creating import options_of
from hutch.api.docker.front import FrontOptions
from hutch.api.docker.wire import ContainerBody
from hutch.errors import HutchError
from hutch.spec.build import ImageDefaults, build
from tests.fuzzing import thorough

_TEXT = st.text(max_size=12) | st.sampled_from(
    [
        "/", "/a", "/a:/b", "/a:/b:ro,z", "a:/b", "80", "80/tcp", "1-9/udp", "host", "none",
        "container:x", "bridge", "private", "SIGTERM", "9", "always", "on-failure", "json-file",
        "max-size", "10m", "bind", "volume", "tmpfs", "1.2.3.4", "::1", "02:42:00:00:00:01", "A=b",
        "hutch-vm", "vm", "NET_ADMIN", "ALL", "seccomp=unconfined", "CMD-SHELL", "CMD", "NONE",
        "a 1:2 rwm", "root:root", "nofile", "\0", "²", "rshared", "x:127.0.0.1", "net.a",
    ]
)  # fmt: skip
_NUMBERS = st.integers(-2, 100) | st.integers(-(2**63), 2**63 - 1)


def _any_of(kind: kinds.Type) -> st.SearchStrategy[Any]:
    """Return a strategy for JSON of a type."""
    match kind:
        case kinds.StructType(fields=fields):
            known = {field.encode_name: _later(field.type) for field in fields}
            return st.fixed_dictionaries({}, optional=known)
        case kinds.UnionType(types=types):
            return st.one_of(
                *(_any_of(one) for one in types if not isinstance(one, kinds.NoneType))
            )
        case kinds.ListType(item_type=item):
            return st.lists(_any_of(item), max_size=2)
        case kinds.DictType(value_type=value):
            return st.dictionaries(_TEXT, _any_of(value), max_size=2)
        case kinds.IntType():
            return _NUMBERS
        case kinds.BoolType():
            return st.booleans()
        case kinds.StrType():
            return _TEXT
        case kinds.NoneType():
            return st.none()
    return _TEXT | _NUMBERS | st.none() | st.dictionaries(_TEXT, _TEXT, max_size=2)


def _later(kind: kinds.Type) -> st.SearchStrategy[Any]:
    return st.deferred(lambda: _any_of(kind))


_BODIES = _any_of(kinds.type_info(ContainerBody))
_IMAGE = ImageDefaults(cmd=("sh",), volumes=("/v",), exposed_ports=("80/tcp",))


@thorough(
    settings(
        max_examples=150,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
    )
)
@given(_BODIES)
def test_any_body_is_a_specification_or_an_error_of_ours(given_body: dict[str, Any]) -> None:
    try:
        body = msgspec.convert(given_body, ContainerBody)
    except msgspec.ValidationError:
        return
    try:
        options = options_of(body, FrontOptions())
        build("img", _IMAGE, [body.cmd] if isinstance(body.cmd, str) else body.cmd, **options)
    except HutchError:
        return
