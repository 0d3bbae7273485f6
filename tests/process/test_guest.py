"""The bytes of the guest's protocol: requests as documented, answers that nobody can bend."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hutch.errors import IntegrityError, InvalidArgument
from hutch.plan import guest, guest_answers
from hutch.process.errors import GuestCallFailed, LaunchFailed
from hutch.process.frames import decode_frame
from tests.process.test_wire import Reader

TEXT = st.text("abcäß€/ .=\n\U0001f600", max_size=40)
KINDS = {
    "u": st.integers(0, 2**32 - 1),
    "q": st.integers(0, 2**64 - 1),
    "s": TEXT,
    "b": st.binary(max_size=40),
}
DECODERS: list[Callable[[bytes], Any]] = [
    guest_answers.decode_answer,
    guest_answers.decode_count,
    guest_answers.decode_files_head,
    guest_answers.decode_listing,
    guest_answers.decode_processes,
    guest_answers.decode_stat,
    guest_answers.decode_stats,
]


def operations() -> st.SearchStrategy[guest.SetupOp]:
    def one(item: tuple[type[guest.SetupOp], tuple[int, str]]) -> st.SearchStrategy[guest.SetupOp]:
        kind, (_, letters) = item
        fields = {name: KINDS[x] for name, x in zip(kind.__struct_fields__, letters, strict=True)}
        return st.builds(kind, **fields)

    return st.sampled_from(list(guest.SETUP_CODES.items())).flatmap(one)


def test_every_operation_has_a_number_of_its_own() -> None:
    assert set(guest.SETUP_CODES) == set(guest.SetupOp.__subclasses__())
    assert set(guest.FILES_CODES) == set(guest.Files.__subclasses__())
    for codes in (guest.SETUP_CODES, guest.FILES_CODES):
        numbers = [code for code, _ in codes.values()]
        assert len(set(numbers)) == len(numbers)
        for kind, (_, letters) in codes.items():
            assert len(kind.__struct_fields__) == len(letters), kind


@given(st.lists(operations(), max_size=8))
def test_a_setup_is_what_is_documented(wanted: list[guest.SetupOp]) -> None:
    data = guest.encode_setup(wanted)
    reader = Reader(data)
    assert reader.unpack("<I") == (len(wanted),)
    for op in wanted:
        code, letters = guest.SETUP_CODES[type(op)]
        number, zero, length = reader.unpack("<HHI")
        end = reader.at + length
        assert (number, zero) == (code, 0)
        assert tuple(reader.field(x) for x in letters) == msgspec.structs.astuple(op)
        assert reader.at == end
    assert reader.at == len(data)


@pytest.mark.parametrize(
    "op",
    [
        guest.Hostname(name="a\0b"),
        guest.Mkdir(path="/x", mode=-1),
        guest.Mkdir(path="/x", mode=1 << 32),
        guest.Clock(seconds=-1),
    ],
)
def test_a_value_that_does_not_fit_is_refused(op: guest.SetupOp) -> None:
    with pytest.raises(InvalidArgument):
        guest.encode_setup([op])


def test_a_request_that_is_too_large_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="too large"):
        guest.encode_call(guest.Call.SETUP, bytes(4 << 20))


@given(st.binary(max_size=200))
def test_an_answer_that_nobody_meant_is_refused(data: bytes) -> None:
    for decode in DECODERS:
        try:
            decode(data)
        except IntegrityError:
            pass


def text(value: str) -> bytes:
    return struct.pack("<I", len(value.encode())) + value.encode() + b"\0"


def record(name: str, target: str = "") -> bytes:
    fields = struct.pack("<IIIQqIIII", 0o100644, 1, 2, 5, 1_000, 7, 1, 0, 0)
    return text(name) + fields + text(target)


def stats(blocks: tuple[bytes, ...] = (b"vda 1 2 3 4",)) -> bytes:
    listed = b"".join(struct.pack("<I", len(block)) + block for block in blocks)
    return struct.pack("<8QI", *range(1, 9), len(blocks)) + listed


def process() -> bytes:
    return struct.pack("<IIIQQ", 10, 1, 0, 55, 66) + text("pts/0") + text("sleep 1")


GOOD: list[tuple[Callable[[bytes], Any], bytes]] = [
    (guest_answers.decode_answer, struct.pack("<II", 2, 3) + text("/x")),
    (guest_answers.decode_count, struct.pack("<I", 7)),
    (guest_answers.decode_listing, record("a") + record("b", "t") + text("")),
    (guest_answers.decode_stat, record("a")),
    (guest_answers.decode_stats, stats()),
]


@pytest.mark.parametrize(("decode", "data"), GOOD)
def test_a_cut_answer_is_refused_at_every_length(
    decode: Callable[[bytes], Any], data: bytes
) -> None:
    decode(data)
    for size in range(len(data)):
        with pytest.raises(IntegrityError):
            decode(data[:size])


def test_answers_are_read() -> None:
    answer = guest_answers.decode_answer(struct.pack("<II", 2, 3) + text("/x") + b"rest")
    assert msgspec.structs.astuple(answer) == (2, 3, "/x", b"rest")
    (one, two) = guest_answers.decode_listing(record("a") + record("b", "t") + text(""))
    assert (one.name, one.mtime_ns, two.target) == ("a", 1_000_000_000_007, "t")
    found = guest_answers.decode_stats(stats())
    assert (found.memory_total, found.oom_kills) == (1, 8)
    assert msgspec.structs.astuple(found.blocks[0]) == ("vda", 1, 2, 3, 4)
    (ps,) = guest_answers.decode_processes(process())
    assert (ps.pid, ps.cpu_ticks, ps.tty, ps.command) == (10, 66, "pts/0", "sleep 1")


@pytest.mark.parametrize("name", ["../x", "a/b", ".", ".."])
def test_a_listed_name_cannot_lead_elsewhere(name: str) -> None:
    with pytest.raises(IntegrityError, match="name"):
        guest_answers.decode_listing(record(name) + text(""))


@pytest.mark.parametrize("block", [b"vda 1 2 3", b"vda 1 2 3 x", b"vda 1 2 3 -4", b""])
def test_figures_that_are_no_numbers_are_refused(block: bytes) -> None:
    with pytest.raises(IntegrityError):
        guest_answers.decode_stats(stats((block,)))


def test_a_text_of_any_length_is_not_waited_for() -> None:
    with pytest.raises(IntegrityError, match="bytes"):
        guest_answers.decode_files_head(struct.pack("<II", 0, 1 << 31))


@pytest.mark.parametrize("number", [4096, 0x7FFFFFFF, 0xFFFFFFFF])
def test_an_error_number_that_is_none_is_told_all_the_same(number: int) -> None:
    said = guest_answers.decode_answer(struct.pack("<II", number, 3) + text("/x"))
    refused = GuestCallFailed(1, said.index, said.errno, said.detail)
    assert refused.message == f"guest: call 1: /x: unknown error {number}"
    assert refused.errno == number
    event = decode_frame(68, 3, struct.pack("<II", 7, number) + b"/bin/x")
    assert isinstance(event, LaunchFailed)
    assert event.message.startswith("launch: child[7]: /bin/x: unknown error ")


def test_figures_beyond_all_bounds_are_refused() -> None:
    good = stats()
    assert guest_answers.decode_stats(good).oom_kills == 8
    with pytest.raises(IntegrityError, match="beyond all bounds"):
        guest_answers.decode_stats(struct.pack("<8QI", *[1 << 63] * 8, 0))


@pytest.mark.parametrize("seconds", [-(1 << 63), (1 << 63) - 1])
def test_a_file_of_any_time_is_shown(seconds: int) -> None:
    fields = struct.pack("<IIIQqIIII", 0o100644, 1, 2, 5, seconds, 0xFFFFFFFF, 1, 0, 0)
    found = guest_answers.decode_stat(text("a") + fields + text(""))
    assert -(1 << 63) <= found.mtime_ns < 1 << 63
    assert msgspec.json.decode(msgspec.json.encode(found))["mtime_ns"] == found.mtime_ns
