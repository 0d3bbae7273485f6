"""Filters: profiles are read and checked, and programs, loaded into a process, refuse calls."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hutch.errors import InvalidArgument, Unsupported
from hutch.linux import capabilities, libseccomp, seccomp
from tests.requires import requires

pytestmark = [
    requires("seccomp"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers are those of x86_64"),
]

DEFAULT_CAPS = capabilities.parse()

NUMBER = {
    "add_key": 248,
    "bpf": 321,
    "clone": 56,
    "clone3": 435,
    "fchmodat2": 452,
    "getpid": 39,
    "io_uring_setup": 425,
    "keyctl": 250,
    "listns": 470,
    "mount": 165,
    "not-yet": 900,
    "perf_event_open": 298,
    "personality": 135,
    "process_madvise": 440,
    "ptrace": 101,
    "request_key": 249,
    "setns": 308,
    "socket": 41,
    "statmount": 457,
    "umount2": 166,
    "unshare": 272,
    "userfaultfd": 323,
}
CLONE_NEWUTS = 0x04000000

# The child loads the program and then makes the calls, printing the errno of each.
CHILD = """
import ctypes, json, sys
libc = ctypes.CDLL(None, use_errno=True)
program = open(sys.argv[1], "rb").read()
class Fprog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
one = Fprog(len(program) // 8, program)
long = ctypes.c_long
assert libc.prctl(38, *map(ctypes.c_ulong, (1, 0, 0, 0))) == 0
assert libc.syscall(long(317), long(1), long(0), ctypes.byref(one)) == 0
answers = []
for call in json.loads(sys.argv[2]):
    ctypes.set_errno(0)
    result = libc.syscall(*[long(n) for n in call])
    answers.append(ctypes.get_errno() if result == -1 else 0)
print(json.dumps(answers))
"""


def answers(program: bytes, where: Path, *calls: tuple[Any, ...]) -> list[int]:
    """Return the errno (0 for success) that each call gets under the program."""
    path = where / "program.bpf"
    path.write_bytes(program)
    numbered = [
        [NUMBER[name], *arguments, *[0] * (6 - len(arguments))] for name, *arguments in calls
    ]
    done = subprocess.run(
        [sys.executable, "-S", "-c", CHILD, str(path), json.dumps(numbered)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    result: list[int] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def default_program() -> bytes:
    return seccomp.compile_program(None, DEFAULT_CAPS)


@pytest.mark.parametrize(
    "call",
    [
        ("add_key",),
        ("bpf", 999),
        ("io_uring_setup",),
        ("keyctl", 999),
        ("mount",),
        ("perf_event_open",),
        ("personality", 0x0040000),
        ("process_madvise", -1),
        ("request_key",),
        ("setns", -1),
        ("socket", 40, 1),
        ("umount2",),
        ("unshare", 0),
        ("clone", CLONE_NEWUTS | 17),
        ("userfaultfd", 0xFFFF),
    ],
    ids=lambda call: str(call[0]),
)
def test_the_default_refuses(default_program: bytes, tmp_path: Path, call: tuple[Any, ...]) -> None:
    assert answers(default_program, tmp_path, call) == [errno.EPERM]


def test_the_default_lets_ordinary_calls_through(default_program: bytes, tmp_path: Path) -> None:
    got = answers(
        default_program,
        tmp_path,
        ("getpid",),
        ("socket", 1, 1),
        ("personality", 0xFFFFFFFF),
        ("ptrace", 3, 0),
    )
    assert got == [0, 0, 0, errno.ESRCH]


def test_clone3_is_missing_so_that_programs_fall_back(
    default_program: bytes, tmp_path: Path
) -> None:
    assert answers(default_program, tmp_path, ("clone3",)) == [errno.ENOSYS]


def test_calls_of_the_future_are_missing_rather_than_forbidden(
    default_program: bytes, tmp_path: Path
) -> None:
    got = answers(default_program, tmp_path, ("listns",), ("not-yet",))
    assert got == [errno.ENOSYS, errno.ENOSYS]


def test_calls_newer_than_the_library_are_let_through_when_the_profile_names_them(
    default_program: bytes, tmp_path: Path
) -> None:
    first, second = answers(default_program, tmp_path, ("fchmodat2", -1), ("statmount",))
    assert first not in (errno.EPERM, errno.ENOSYS)
    assert second not in (errno.EPERM, errno.ENOSYS)


def test_a_capability_opens_its_calls(tmp_path: Path) -> None:
    program = seccomp.compile_program(None, DEFAULT_CAPS | capabilities.to_mask(["CAP_SYS_ADMIN"]))
    unshared, mounted, cloned, keyed = answers(
        program, tmp_path, ("unshare", 0), ("mount",), ("clone3",), ("keyctl", 999)
    )
    assert unshared == 0
    assert mounted != errno.EPERM
    assert cloned not in (errno.EPERM, errno.ENOSYS)
    assert keyed == errno.EPERM


def test_the_table_of_common_numbers_agrees_with_the_library() -> None:
    library = libseccomp._library()
    known = {
        name: library.seccomp_syscall_resolve_name(name.encode())
        for name in libseccomp._COMMON_NUMBER
    }
    agreed = {name: number for name, number in known.items() if number != -1}
    assert len(agreed) > 20
    assert agreed == {name: libseccomp._COMMON_NUMBER[name] for name in agreed}
    assert libseccomp._COMMON_NUMBER["listns"] == 470


def profile(**changes: Any) -> bytes:
    document: dict[str, Any] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["getpid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 42}],
    }
    return json.dumps({**document, **changes}).encode()


def compiled(text: bytes, caps: int = DEFAULT_CAPS, kernel: tuple[int, int] = (6, 1)) -> bytes:
    return seccomp.compile_program(seccomp.parse_profile(text), caps, kernel=kernel)


def test_a_profile_of_the_users_own_decides(tmp_path: Path) -> None:
    assert answers(compiled(profile()), tmp_path, ("getpid",), ("keyctl", 999)) == [
        42,
        errno.EOPNOTSUPP,
    ]


def test_conditions_on_one_argument_are_alternatives_and_on_several_hold_together(
    tmp_path: Path,
) -> None:
    def rule(*args: tuple[int, int]) -> dict[str, Any]:
        return {
            "names": ["socket"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": 42,
            "args": [{"index": i, "value": v, "op": "SCMP_CMP_EQ"} for i, v in args],
        }

    either = compiled(profile(syscalls=[rule((0, 1), (0, 2))]))
    both = compiled(profile(syscalls=[rule((0, 1), (1, 2))]))
    calls = (("socket", 1, 1), ("socket", 1, 2), ("socket", 2, 2))
    assert answers(either, tmp_path, *calls) == [42, 42, 42]
    assert answers(both, tmp_path, *calls) == [0, 42, 0]


@pytest.mark.parametrize(
    ("where", "caps", "kernel", "counts"),
    [
        ({"includes": {"caps": ["CAP_SYS_ADMIN"]}}, 0, (6, 1), False),
        ({"includes": {"caps": ["CAP_SYS_ADMIN"]}}, 1 << 21, (6, 1), True),
        ({"excludes": {"caps": ["CAP_SYS_ADMIN"]}}, 1 << 21, (6, 1), False),
        ({"includes": {"caps": ["CAP_OF_THE_FUTURE"]}}, (1 << 41) - 1, (6, 1), False),
        ({"includes": {"arches": ["amd64"]}}, 0, (6, 1), True),
        ({"includes": {"arches": ["s390x"]}}, 0, (6, 1), False),
        ({"excludes": {"arches": ["amd64"]}}, 0, (6, 1), False),
        ({"includes": {"minKernel": "4.8"}}, 0, (4, 7), False),
        ({"includes": {"minKernel": "4.8"}}, 0, (4, 10), True),
    ],
)
def test_rules_count_where_they_say(
    tmp_path: Path, where: dict[str, Any], caps: int, kernel: tuple[int, int], counts: bool
) -> None:
    rule = {"names": ["getpid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 42, **where}
    program = compiled(profile(syscalls=[rule]), caps, kernel)
    assert answers(program, tmp_path, ("getpid",)) == [42 if counts else 0]


def test_unknown_calls_are_skipped(tmp_path: Path) -> None:
    rule = {"names": ["no_such_call", "getpid"], "action": "SCMP_ACT_ERRNO"}
    program = compiled(profile(syscalls=[rule]))
    assert answers(program, tmp_path, ("getpid",)) == [errno.EPERM]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (b"", "seccomp: not JSON"),
        (b"[]", "seccomp: expected `object`"),
        (b"{}", "seccomp: object missing required field `defaultAction`"),
        (profile(defaultAction="ALLOW"), r"seccomp\.defaultAction: unknown action 'ALLOW'"),
        (profile(defaultErrnoRet=5000), r"seccomp\.defaultErrnoRet: "),
        (profile(syscalls=[{"names": ["x"]}]), r"seccomp\.syscalls\[0\]: .*action"),
        (profile(syscalls=[{"names": [], "action": "SCMP_ACT_LOG"}]), r"seccomp\.syscalls\[0\]"),
        (
            profile(syscalls=[{"names": [1], "action": "SCMP_ACT_LOG"}]),
            r"seccomp\.syscalls\[.*\]\.names\[.*\]: expected `str`",
        ),
        (
            profile(syscalls=[{"name": "a", "names": ["b"], "action": "SCMP_ACT_LOG"}]),
            r"seccomp\.syscalls\[0\]\.name: ",
        ),
        (
            profile(
                syscalls=[
                    {
                        "names": ["socket"],
                        "action": "SCMP_ACT_LOG",
                        "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}],
                    }
                ]
            ),
            r"seccomp\.syscalls\[0\]\.args\[0\]\.index: must be from 0 to 5",
        ),
        (
            profile(
                syscalls=[
                    {
                        "names": ["socket"],
                        "action": "SCMP_ACT_LOG",
                        "args": [{"index": 0, "value": 0, "op": "=="}],
                    }
                ]
            ),
            r"seccomp\.syscalls\[0\]\.args\[0\]\.op: unknown comparison",
        ),
        (profile(archMap=[{"architecture": "amd64"}]), r"seccomp\.archMap\[0\]\.architecture"),
        (profile(flags=["X"]), r"seccomp\.flags\[0\]"),
        (
            profile(
                syscalls=[
                    {
                        "names": ["a"],
                        "action": "SCMP_ACT_LOG",
                        "includes": {"minKernel": "new"},
                    }
                ]
            ),
            r"seccomp\.syscalls\[0\]\.includes\.minKernel",
        ),
    ],
)
def test_a_bad_profile_is_refused_with_its_place(text: bytes, where: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{where}"):
        seccomp.parse_profile(text)


def test_a_profile_that_needs_a_listener_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="defaultAction"):
        seccomp.parse_profile(profile(defaultAction="SCMP_ACT_NOTIFY"))


@requires("containers-common")
def test_dockers_own_format_is_read_whole(tmp_path: Path) -> None:
    path = Path("/usr/share/containers/seccomp.json")
    program = seccomp.compile_program(seccomp.parse_profile(path.read_bytes()), DEFAULT_CAPS)
    assert answers(program, tmp_path, ("getpid",), ("bpf", 999)) == [0, errno.EPERM]


def test_a_program_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = seccomp.cached_program(tmp_path, None, DEFAULT_CAPS)
    monkeypatch.setattr(seccomp, "compile_program", None)
    assert seccomp.cached_program(tmp_path, None, DEFAULT_CAPS) == first


def test_what_decides_the_program_is_part_of_its_name(tmp_path: Path) -> None:
    own = seccomp.parse_profile(profile())
    for caps, chosen, kernel in (
        (DEFAULT_CAPS, None, (6, 1)),
        (0, None, (6, 1)),
        (DEFAULT_CAPS, own, (6, 1)),
        (DEFAULT_CAPS, None, (4, 4)),
    ):
        seccomp.cached_program(tmp_path, chosen, caps, kernel=kernel)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", [b"", b"short", b"\0" * 400])
def test_a_damaged_program_is_compiled_again(tmp_path: Path, damage: bytes) -> None:
    first = seccomp.cached_program(tmp_path, None, DEFAULT_CAPS)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage)
    assert seccomp.cached_program(tmp_path, None, DEFAULT_CAPS) == first
    assert path.stat().st_size == len(first) + 32


def test_many_may_compile_into_one_directory_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        work = [
            pool.submit(seccomp.cached_program, tmp_path / "new", None, DEFAULT_CAPS)
            for _ in range(8)
        ]
        programs = {future.result() for future in work}
    assert len(programs) == 1
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_without_the_library_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libseccomp, "SONAME", "libseccomp.so.none")
    with pytest.raises(Unsupported, match="not installed") as caught:
        seccomp.compile_program(None, 0)
    assert "libseccomp2" in (caught.value.hint or "")
