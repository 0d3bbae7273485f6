"""Compacted filters answer as the long ones do, for every architecture, number and argument."""

from __future__ import annotations

import errno
import os
import random
import struct
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hutch.linux import capabilities, libseccomp, seccomp
from hutch.linux.seccomp_compact import compact
from hutch.linux.seccomp_profile import Profile, parse_profile
from tests.requires import requires

pytestmark = requires("seccomp")

X86_64, I386, AARCH64 = 0xC000003E, 0x40000003, 0xC00000B7
X32_BIT = 0x40000000
MACHINES = ("x86_64", "aarch64", "riscv64")  # of this byte order
KERNEL = (6, 1)


def evaluate(program: bytes, arch: int, number: int, arguments: tuple[int, ...]) -> int:
    """Return what the program answers: classic BPF as the kernel's seccomp_bpf(2) runs it."""
    data = struct.pack("=IIQ6Q", number, arch, 0x7F0000001000, *arguments)
    at, value = 0, 0
    for _ in range(len(program) // 8):
        code, jt, jf, k = struct.unpack_from("=HBBI", program, at * 8)
        at += 1
        if code == 0x20:
            value = int.from_bytes(data[k : k + 4], sys.byteorder)
        elif code == 0x54:
            value &= k
        elif code == 0x06:
            return int(k)
        elif code == 0x05:
            at += k
        else:
            taken = {0x15: value == k, 0x25: value > k, 0x35: value >= k, 0x45: bool(value & k)}
            at += jt if taken[code] else jf
    raise AssertionError("the program does not end")


def constants(program: bytes) -> set[int]:
    return {k for code, _, _, k in struct.iter_unpack("=HBBI", program) if code & 7 == 5}


def near(values: set[int]) -> list[int]:
    return sorted({(v + d) & 0xFFFFFFFF for v in values for d in (-1, 0, 1)})


def argument_lists(values: list[int]) -> Iterator[tuple[int, ...]]:
    """Yield arguments that meet and miss the program's conditions, with high halves too."""
    chosen = random.Random(7)
    for value in (0, 1, 2, 40, 0xFFFFFFFF, *chosen.sample(values, min(len(values), 8))):
        yield (value,) * 6
    for _ in range(6):
        yield tuple(chosen.choice(values) | chosen.choice((0, 1)) << 32 for _ in range(6))


def assert_same(long: bytes, short: bytes) -> None:
    interesting = near(constants(long) | constants(short) | set(range(0, 500, 7)) | {X32_BIT})
    argument_choices = list(argument_lists(interesting))
    for arch in (*(t for t in interesting if t > 1 << 30), X86_64, I386, AARCH64, 0):
        for number in interesting:
            for arguments in argument_choices[:1] if arch == 0 else argument_choices:
                assert evaluate(short, arch, number, arguments) == evaluate(
                    long, arch, number, arguments
                ), (hex(arch), number, arguments)


@pytest.fixture(scope="module")
def long_default() -> bytes:
    return libseccomp.compile_profile(
        seccomp.default_profile(), capabilities.parse(), machine="x86_64", kernel=KERNEL
    )


def test_the_default_is_several_times_shorter(long_default: bytes) -> None:
    assert len(compact(long_default)) * 3 < len(long_default)


def test_every_number_of_the_default_has_the_same_answer(long_default: bytes) -> None:
    short = compact(long_default)
    for arch in (X86_64, I386, AARCH64, 0, 0xFFFFFFFF):
        for base in (0, X32_BIT, 0xFFFFFFFF - 600):
            for number in range(base, base + 600):
                for arguments in ((0,) * 6, (0xFFFFFFFF,) * 6, (40, 1, 0, 0, 0, 0)):
                    assert evaluate(short, arch, number, arguments) == evaluate(
                        long_default, arch, number, arguments
                    ), (hex(arch), number, arguments)


@pytest.mark.parametrize("machine", MACHINES)
def test_conditions_on_arguments_stay_as_they_are(machine: str) -> None:
    text = b"""{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
        {"names": ["read", "write", "openat", "close", "futex"], "action": "SCMP_ACT_ALLOW"},
        {"names": ["socket"], "action": "SCMP_ACT_ALLOW",
         "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}]},
        {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
         "args": [{"index": 0, "value": 2114060288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
        {"names": ["prctl"], "action": "SCMP_ACT_TRACE",
         "args": [{"index": 1, "value": 4294967296, "op": "SCMP_CMP_GE"},
                  {"index": 2, "value": 7, "op": "SCMP_CMP_LT"}]},
        {"names": ["ioctl"], "action": "SCMP_ACT_KILL_PROCESS"}]}"""
    long = libseccomp.compile_profile(parse_profile(text), 0, machine=machine, kernel=KERNEL)
    assert_same(long, compact(long))


NAMES = (
    "read write open close stat fstat poll lseek mmap mprotect brk ioctl access pipe select "
    "socket connect clone fork execve exit kill uname fcntl chdir mkdir unlink ptrace getuid "
    "personality prctl mount futex openat unshare setns bpf keyctl getrandom clone3 statmount"
).split()
ACTIONS = ("SCMP_ACT_ALLOW", "SCMP_ACT_KILL", "SCMP_ACT_LOG", "SCMP_ACT_TRAP", "SCMP_ACT_ERRNO")
arguments = st.fixed_dictionaries(
    {
        "index": st.integers(0, 5),
        "value": st.integers(0, 2**64 - 1) | st.integers(0, 64),
        "valueTwo": st.integers(0, 255),
        "op": st.sampled_from(["SCMP_CMP_" + op for op in "EQ NE LT LE GE GT MASKED_EQ".split()]),
    }
)
rules = st.fixed_dictionaries(
    {
        "names": st.lists(st.sampled_from(NAMES), min_size=1, max_size=12),
        "action": st.sampled_from(ACTIONS),
        "args": st.lists(arguments, max_size=2),
    }
)


@settings(max_examples=40, deadline=None)
@given(st.lists(rules, min_size=1, max_size=6), st.sampled_from(ACTIONS))
def test_any_profile_has_the_same_answers(listed: list[dict[str, object]], default: str) -> None:
    import msgspec

    text = msgspec.json.encode({"defaultAction": default, "syscalls": listed})
    profile: Profile = parse_profile(text)
    try:
        long = libseccomp.compile_profile(profile, 0, machine="x86_64", kernel=KERNEL)
    except Exception:  # two rules that the library does not take together
        return
    short = compact(long)
    assert len(short) <= len(long)
    chosen = random.Random(len(long))
    interesting = near(constants(long))
    for _ in range(3000):
        arch = chosen.choice((X86_64, X86_64, I386, AARCH64))
        number = chosen.choice((chosen.choice(interesting), chosen.randrange(500)))
        words = tuple(chosen.choice(interesting) | chosen.choice((0, 1)) << 32 for _ in range(6))
        assert evaluate(short, arch, number, words) == evaluate(long, arch, number, words)


def test_far_jumps_are_made_in_two_steps() -> None:
    """As many answers as there are numbers: nothing can be shared, and jumps get long."""
    code = [(0x20, 0, 0, 4), (0x15, 1, 0, X86_64), (0x06, 0, 0, 0), (0x20, 0, 0, 0)]
    for number in range(700):
        code += [(0x15, 0, 1, 2 * number), (0x06, 0, 0, 0x50000 | number)]
        code += [(0x15, 0, 1, 2 * number), (0x06, 0, 0, 1)]  # cannot be reached
        code += [(0x15, 0, 2, 2 * number + 1), (0x20, 0, 0, 16), (0x15, 0, 0, number)]
        code += [(0x06, 0, 0, 0x60000 | number)]
    code.append((0x06, 0, 0, 0x7FFF0000))
    long = b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
    short = compact(long)
    assert len(short) < len(long)
    for number in range(1500):
        for arch in (X86_64, I386):
            assert evaluate(short, arch, number, (3,) * 6) == evaluate(long, arch, number, (3,) * 6)


@pytest.mark.parametrize(
    "strange",
    [
        (0x61, 0, 0, 0),  # scratch memory
        (0x45, 0, 0, 1),  # a bit test of the number
        (0x54, 0, 0, 0xFF),  # the number, masked
    ],
)
def test_a_program_made_otherwise_is_left_alone(strange: tuple[int, int, int, int]) -> None:
    code = [(0x20, 0, 0, 0), strange]
    code += [(0x15, 0, 1, 5), (0x06, 0, 0, errno.EPERM)] * 20
    code.append((0x06, 0, 0, 0x7FFF0000))
    program = b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
    assert compact(program) == program


def test_programs_in_the_cache_are_compact(tmp_path: os.PathLike[str]) -> None:
    program = seccomp.cached_program(tmp_path, None, capabilities.parse(), machine="x86_64")
    assert compact(program) == program
