"""Device programs decide as the rules say: run by a small interpreter of their instructions."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from hutch.linux.cgroup import ALL_DEVICES, DEFAULT_DEVICES, DeviceRule
from hutch.linux.cgroup.device_bpf import assemble

KINDS = {"b": 1, "c": 2}
BITS = {"m": 1, "r": 2, "w": 4}


def run(program: bytes, kind: str, major: int, minor: int, access: str) -> bool:
    """Execute the program as the kernel would, with registers of 32 bits."""
    asked = sum(BITS[letter] for letter in access)
    context = {0: asked << 16 | KINDS[kind], 4: major, 8: minor}
    registers = [0] * 11
    position = 0
    while True:
        code, both, offset, imm = struct.unpack_from("<BBhi", program, position * 8)
        dst, src = both & 15, both >> 4
        position += 1
        match code:
            case 0x61:
                registers[dst] = context[offset]
            case 0xBC:
                registers[dst] = registers[src]
            case 0xB4:
                registers[dst] = imm
            case 0x54:
                registers[dst] &= imm
            case 0x74:
                registers[dst] >>= imm
            case 0x56:
                position += offset if registers[dst] != imm else 0
            case 0x16:
                position += offset if registers[dst] == imm else 0
            case 0x95:
                return bool(registers[0])
            case _:
                raise AssertionError(hex(code))


def expected(rules: Sequence[DeviceRule], kind: str, major: int, minor: int, access: str) -> bool:
    for rule in reversed(rules):
        asked, named = set(access), set(rule.access)
        applies = asked <= named if rule.allow else bool(asked & named)
        if rule.kind != "a":
            applies = applies and rule.kind == kind
            applies = applies and rule.major in (-1, major) and rule.minor in (-1, minor)
        if applies:
            return rule.allow
    return False


accesses = st.sets(st.sampled_from("rwm"), min_size=1).map(lambda s: "".join(sorted(s)))
numbers = st.integers(0, 3)
rule = st.builds(
    DeviceRule,
    allow=st.booleans(),
    kind=st.sampled_from("abc"),
    major=st.integers(-1, 3),
    minor=st.integers(-1, 3),
    access=accesses,
)


@settings(deadline=None)
@given(
    rules=st.lists(rule, max_size=8),
    kind=st.sampled_from("bc"),
    major=numbers,
    minor=numbers,
    access=accesses,
)
def test_the_program_decides_as_the_last_rule_that_matches(
    rules: list[DeviceRule], kind: str, major: int, minor: int, access: str
) -> None:
    got = run(assemble(rules), kind, major, minor, access)
    assert got == expected(rules, kind, major, minor, access)


def test_no_rules_deny_everything() -> None:
    assert not run(assemble(()), "c", 1, 3, "r")


def test_the_default_lets_nodes_be_made_but_not_opened() -> None:
    program = assemble(DEFAULT_DEVICES)
    assert run(program, "b", 8, 0, "m")
    assert not run(program, "b", 8, 0, "r")
    assert run(program, "c", 136, 17, "rw")


def test_all_devices_are_one_short_program() -> None:
    program = assemble(ALL_DEVICES)
    assert run(program, "b", 8, 0, "rwm")
    assert len(program) == 8 * 8
