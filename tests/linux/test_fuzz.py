"""Whatever the text, a parser answers with a value or with our own error."""

from __future__ import annotations

import json
import struct

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from hutch.errors import HutchError, InvalidArgument
from hutch.linux import capabilities, idmap, seccomp
from hutch.linux.cgroup import Limits
from hutch.linux.cgroup.limits import validate
from hutch.linux.seccomp_profile import ACTIONS, COMPARISONS

names = st.lists(st.sampled_from(["socket", "getpid", "bpf", "mseal", "x"]) | st.text(max_size=8))
argument = st.fixed_dictionaries(
    {
        "index": st.integers(-1, 7),
        "value": st.integers(-1, 1 << 64),
        "op": st.sampled_from([*COMPARISONS, "=="]),
    }
)
syscall = st.fixed_dictionaries(
    {"names": names, "action": st.sampled_from([*ACTIONS, "SCMP_ACT_NOTIFY"])},
    optional={
        "args": st.lists(argument, max_size=3),
        "errnoRet": st.integers(-1, 5000),
        "includes": st.fixed_dictionaries({"minKernel": st.sampled_from(["", "4.8", "x"])}),
    },
)
document = st.fixed_dictionaries(
    {"defaultAction": st.sampled_from(list(ACTIONS)), "syscalls": st.lists(syscall, max_size=3)}
)


@given(st.binary(max_size=200))
def test_any_bytes_as_a_profile(data: bytes) -> None:
    try:
        seccomp.parse_profile(data)
    except InvalidArgument as exc:
        assert exc.field is not None
        assert exc.field.startswith("seccomp")


@given(document)
def test_any_profile_of_the_right_shape_compiles_to_whole_instructions(
    value: dict[str, object],
) -> None:
    try:
        profile = seccomp.parse_profile(json.dumps(value))
        program = seccomp.compile_program(profile, 0, machine="x86_64", kernel=(6, 1))
    except HutchError:
        return
    codes = [code for code, *_ in struct.iter_unpack("=HBBI", program)]
    assert codes[-1] == 0x06
    assert len(codes) <= 4096


@given(st.lists(st.text("0123456789:-x ", max_size=20), max_size=5))
def test_any_map(lines: list[str]) -> None:
    try:
        ranges = idmap.parse_mapping(lines, field="map")
    except InvalidArgument:
        return
    outside = [idmap.to_outside(ranges, one.inside) for one in ranges]
    assert outside == [one.outside for one in ranges]


@given(st.lists(st.text(max_size=12), max_size=3), st.lists(st.text(max_size=12), max_size=3))
def test_any_capability_names(add: list[str], drop: list[str]) -> None:
    try:
        mask = capabilities.parse(add, drop, last=40)
    except InvalidArgument:
        return
    assert 0 <= mask < 1 << 41


@given(st.dictionaries(st.sampled_from(Limits.__struct_fields__[:8]), st.integers(-5, 5)))
def test_any_numbers_as_limits(values: dict[str, int]) -> None:
    try:
        limits = msgspec.convert(values, Limits)
        validate(limits)
    except (InvalidArgument, msgspec.ValidationError):
        return
    assert limits.memory is None or limits.memory == -1 or limits.memory > 0
