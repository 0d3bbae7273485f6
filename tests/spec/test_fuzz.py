"""Whatever is asked, only `InvalidArgument` escapes, and it names a field."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hutch.errors import InvalidArgument
from hutch.spec.build import OPTIONS, ImageDefaults, build

_PIECES = st.sampled_from(
    [
        "", "/", "/a", "a", ":", ",", "=", "-", "..", "ro", "rw", "type=bind", "source=/x", "[::1]",
        "target=/y", "80", "65536", "/udp", "1.5", "512m", "-1", "nofile", "SIGTERM", "no",
        "container:x", "name=n", "ip=1.2.3.4", "{", '"', "\0", "\ud800", "é", " ", "%", "size=1m",
        "none", "host", "true", "99999999999999999999", "cap_sys_admin", "seccomp", "10.0.0.1", "²",
    ]
)  # fmt: skip
_TEXT = st.lists(_PIECES, max_size=6).map("".join) | st.text(max_size=20)
_PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | _TEXT
    | st.binary(max_size=4)
)  # fmt: skip
_VALUES = st.recursive(
    _PLAIN,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(_TEXT | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)
_OPTIONS = st.dictionaries(st.sampled_from(sorted(OPTIONS)), _VALUES, max_size=5)
_IMAGE = ImageDefaults(cmd=("sh",), volumes=("/v",), exposed_ports=("80/tcp",))


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(command=_VALUES, options=_OPTIONS)
def test_nothing_but_invalid_argument_escapes(command: Any, options: dict[str, Any]) -> None:
    try:
        spec = build("img", _IMAGE, command, **options)
    except InvalidArgument as exc:
        assert exc.field
        return
    assert spec.process.argv
    assert all(mount.target.startswith("/") for mount in spec.mounts)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(option=st.sampled_from(sorted(OPTIONS)), text=_TEXT)
def test_one_option_of_any_text(option: str, text: str) -> None:
    try:
        build("img", _IMAGE, None, **_any({option: text}))
    except InvalidArgument as exc:
        assert exc.field


def _any(options: dict[str, str]) -> dict[str, Any]:
    return dict(options)
