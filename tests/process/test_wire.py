"""The bytes of a launch plan: what is encoded is what is documented, and no more fits."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hutch.errors import InvalidArgument
from hutch.plan import ops, wire

EXEC = ops.Exec(argv=("true",), env=())


def all_ops() -> list[type[ops.Op]]:
    return list(ops.Op.__subclasses__())


def test_every_operation_has_a_number_of_its_own() -> None:
    assert set(wire.CODES) == set(all_ops())
    numbers = [number for number, _ in wire.CODES.values()]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))


def test_every_field_has_a_kind() -> None:
    for kind, (_, letters) in wire.CODES.items():
        assert len(kind.__struct_fields__) == len(letters), kind


class Reader:
    """Decode the format from its documentation, to compare with what was encoded."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return values

    def field(self, letter: str) -> Any:
        if letter in "uiq":
            return self.unpack({"u": "<I", "i": "<i", "q": "<Q"}[letter])[0]
        if letter in "sb":
            (length,) = self.unpack("<I")
            raw = self.data[self.at : self.at + length]
            self.at += length
            if letter == "b":
                return raw
            assert self.data[self.at] == 0
            self.at += 1
            return raw.decode("utf-8", "surrogateescape")
        (count,) = self.unpack("<I")
        if letter == "M":
            return tuple(
                ops.Idmap(inside=a, outside=b, size=c)
                for a, b, c in (self.unpack("<III") for _ in range(count))
            )
        return tuple(self.field({"S": "s", "B": "b", "U": "u"}[letter]) for _ in range(count))

    def op(self) -> ops.Op:
        number, zero, length = self.unpack("<HHI")
        end = self.at + length
        kind = next(k for k, (n, _) in wire.CODES.items() if n == number)
        values = [self.field(letter) for letter in wire.CODES[kind][1]]
        assert (zero, self.at) == (0, end)
        return msgspec.convert(
            dict(zip(kind.__struct_fields__, values, strict=True)), kind, strict=False
        )


def decode(data: bytes) -> ops.Plan:
    reader = Reader(data)
    magic, total, clone_flags, cgroup_slot, slots, prepare, child = reader.unpack("<4sIQiIII")
    assert (magic, total) == (b"HPL1", len(data))
    flags, oom, max_bytes, max_files = reader.unpack("<IiQI")
    directory, log_path, name, exit_command = (reader.field(letter) for letter in "sssS")
    health = None
    if flags & 32:
        interval, timeout, start_period, start, retries = reader.unpack("<QQQQI")
        health = ops.HealthProbe(
            plan=reader.field("b"),
            interval_s=interval / 1e9,
            timeout_s=timeout / 1e9,
            start_period_s=start_period / 1e9,
            start_interval_s=start / 1e9,
            retries=retries,
        )
    plan = ops.Plan(
        clone_flags=clone_flags,
        cgroup_slot=cgroup_slot,
        slots=slots,
        prepare=tuple(reader.op() for _ in range(prepare)),  # type: ignore[misc]
        child=tuple(reader.op() for _ in range(child)),  # type: ignore[misc]
        supervision=ops.Supervision(
            directory=directory,
            log_path=log_path,
            name=name,
            exit_command=exit_command,
            log_max_bytes=max_bytes,
            log_max_files=max_files,
            stdin_open=bool(flags & 1),
            stdin_once=bool(flags & 2),
            tty=bool(flags & 4),
            linger=bool(flags & 8),
            exit_command_always=bool(flags & 16),
            oom_score_adj=oom if flags & 64 else None,
            health=health,
        ),
    )
    assert reader.at == len(data)
    return plan


TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20)
U32 = st.integers(0, 2**32 - 1)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "u": U32,
    "i": st.integers(-(2**31), 2**31 - 1),
    "q": st.integers(0, 2**64 - 1),
    "s": TEXT,
    "b": st.binary(max_size=40),
    "S": st.lists(TEXT, max_size=4).map(tuple),
    "B": st.lists(st.binary(max_size=9), max_size=3).map(tuple),
    "U": st.lists(U32, max_size=4).map(tuple),
    "M": st.lists(st.builds(ops.Idmap, inside=U32, outside=U32, size=U32), max_size=3).map(tuple),
}
BOOLEAN = st.booleans()


def operations() -> st.SearchStrategy[ops.Op]:
    def of(kind: type[ops.Op]) -> st.SearchStrategy[ops.Op]:
        fields = {}
        for info, letter in zip(msgspec.structs.fields(kind), wire.CODES[kind][1], strict=True):
            fields[info.name] = BOOLEAN if info.type in (bool, "bool") else VALUES[letter]
        return st.builds(kind, **fields)

    return st.sampled_from(all_ops()).flatmap(of)


@settings(deadline=None)
@given(
    st.lists(operations(), max_size=6),
    st.lists(operations(), max_size=6),
    st.integers(0, 2**64 - 1),
    st.integers(-1, 63),
    st.integers(0, 64),
    TEXT,
    BOOLEAN,
)
def test_a_plan_is_encoded_as_documented(
    prepare: list[Any],
    child: list[Any],
    clone_flags: int,
    cgroup_slot: int,
    slots: int,
    text: str,
    flag: bool,
) -> None:
    health = ops.HealthProbe(
        plan=b"p",
        interval_s=1.5,
        timeout_s=2.0,
        retries=3,
        start_period_s=0.25,
        start_interval_s=0.5,
    )
    plan = ops.Plan(
        prepare=tuple(prepare),
        child=tuple(child),
        clone_flags=clone_flags,
        cgroup_slot=cgroup_slot,
        slots=slots,
        supervision=ops.Supervision(
            directory=text,
            log_path=text,
            exit_command=(text, text),
            tty=flag,
            linger=not flag,
            oom_score_adj=-5 if flag else None,
            health=health if flag else None,
        ),
    )
    assert decode(wire.encode(plan)) == plan


def test_names_that_are_not_utf_8_pass_unchanged() -> None:
    plan = ops.Plan(child=(ops.Mkdir(path="a\udcffb"), EXEC))
    assert b"a\xffb\0" in wire.encode(plan)


@pytest.mark.parametrize(
    "plan",
    [
        ops.Plan(child=(ops.Mkdir(path="a\0b"), EXEC)),
        ops.Plan(child=(ops.Umask(mask=-1), EXEC)),
        ops.Plan(child=(ops.Umask(mask=2**32), EXEC)),
        ops.Plan(child=(ops.Rlimit(resource=1, soft=-1, hard=2**64), EXEC)),
        ops.Plan(child=(ops.Setns(slot=2**40, nstype=0), EXEC)),
        ops.Plan(child=(EXEC,), slots=65),
        ops.Plan(child=(EXEC,), slots=-1),
        ops.Plan(child=(ops.WriteFile(path="x", content=bytes(5 << 20)), EXEC)),
    ],
)
def test_what_the_format_cannot_carry_is_refused(plan: ops.Plan) -> None:
    with pytest.raises(InvalidArgument):
        wire.encode(plan)
