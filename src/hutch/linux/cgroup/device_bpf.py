"""Device rules as a BPF program, which is how version 2 controls access to devices.

The program looks at `struct bpf_cgroup_dev_ctx` (access type, major, minor) and returns
1 to allow. The last rule that matches decides, so rules are tested from the last to the
first; without a match the answer is 0.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from hutch.linux.cgroup.limits import DeviceRule

__all__ = ["assemble", "attach_rules"]

_LDX_W = 0x61
_MOV_REG = 0xBC
_MOV_IMM = 0xB4
_AND_IMM = 0x54
_RSH_IMM = 0x74
_JNE_IMM = 0x56
_JEQ_IMM = 0x16
_EXIT = 0x95

_R0, _R1, _TYPE, _ACCESS, _MAJOR, _MINOR, _SCRATCH = 0, 1, 2, 3, 4, 5, 6

_DEVICE = {"b": 1, "c": 2}
_BITS = {"m": 1, "r": 2, "w": 4}

_Instruction = tuple[int, int, int, int, int]


def _op(code: int, dst: int = 0, src: int = 0, offset: int = 0, imm: int = 0) -> _Instruction:
    return code, dst, src, offset, imm


def _prologue() -> list[_Instruction]:
    return [
        _op(_LDX_W, _TYPE, _R1, 0),
        _op(_MOV_REG, _ACCESS, _TYPE),
        _op(_AND_IMM, _TYPE, imm=0xFFFF),
        _op(_RSH_IMM, _ACCESS, imm=16),
        _op(_LDX_W, _MAJOR, _R1, 4),
        _op(_LDX_W, _MINOR, _R1, 8),
    ]


def _rule(rule: DeviceRule) -> list[_Instruction]:
    """Return the test of one rule, which falls through to what follows without a match."""
    tests: list[_Instruction] = []
    skips: list[int] = []

    def skip_unless(register: int, value: int) -> None:
        skips.append(len(tests))
        tests.append(_op(_JNE_IMM, register, imm=value))

    if rule.kind != "a":
        skip_unless(_TYPE, _DEVICE[rule.kind])
    bits = sum(_BITS[letter] for letter in set(rule.access))
    if bits != 7:
        # An allowing rule must cover all that is asked; a denying one any part of it.
        tests.append(_op(_MOV_REG, _SCRATCH, _ACCESS))
        tests.append(_op(_AND_IMM, _SCRATCH, imm=7 & ~bits if rule.allow else bits))
        skips.append(len(tests))
        tests.append(_op(_JNE_IMM if rule.allow else _JEQ_IMM, _SCRATCH, imm=0))
    if rule.kind != "a" and rule.major >= 0:
        skip_unless(_MAJOR, rule.major)
    if rule.kind != "a" and rule.minor >= 0:
        skip_unless(_MINOR, rule.minor)
    tests += [_op(_MOV_IMM, _R0, imm=int(rule.allow)), _op(_EXIT)]
    for position in skips:
        code, dst, src, _, imm = tests[position]
        tests[position] = (code, dst, src, len(tests) - position - 1, imm)
    return tests


def assemble(rules: Sequence[DeviceRule]) -> bytes:
    """Return the program for rules that are applied in order to "everything denied"."""
    program = _prologue()
    for rule in reversed(rules):
        program += _rule(rule)
        if rule.kind == "a" and set(rule.access) == set("rwm"):
            # Nothing before it can decide, and the verifier refuses unreachable code.
            break
    else:
        program += [_op(_MOV_IMM, _R0, imm=0), _op(_EXIT)]
    return b"".join(
        struct.pack("<BBhi", code, src << 4 | dst, offset, imm)
        for code, dst, src, offset, imm in program
    )


def attach_rules(directory: str, rules: Sequence[DeviceRule]) -> None:
    """Load the program and attach it to a group, replacing the one attached before."""
    from hutch.linux import bpf

    target = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        program = bpf.bpf_prog_load(bpf.BPF_PROG_TYPE_CGROUP_DEVICE, assemble(rules))
        try:
            bpf.bpf_prog_attach(target, program, bpf.BPF_CGROUP_DEVICE)
        finally:
            os.close(program)
    finally:
        os.close(target)
