"""The messages of CRIU's worker, and one that does not answer as it should."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hutch.drivers.container.criu import criu_failure
from hutch.process.criu import call_criu, decode_fields, encode_fields


def test_fields_are_encoded_as_protobuf_has_them() -> None:
    # type=NOTIFY, notify_success=true; then a text, and the int32 -1, which takes ten bytes.
    assert encode_fields([(1, 6), (3, True)]) == b"\x08\x06\x18\x01"
    assert encode_fields([(37, "a")]) == b"\xaa\x02\x01a"
    assert encode_fields([(1, -1)]) == b"\x08" + b"\xff" * 9 + b"\x01"


@given(
    st.dictionaries(st.integers(1, 500), st.integers(0, (1 << 64) - 1) | st.binary(max_size=300))
)
def test_what_was_encoded_is_read_back(fields: dict[int, int | bytes]) -> None:
    assert decode_fields(encode_fields(list(fields.items()))) == fields


@given(st.binary(max_size=100))
def test_any_bytes_are_fields_or_an_error(data: bytes) -> None:
    try:
        decode_fields(data)
    except ValueError:
        pass


def test_a_worker_that_ends_without_an_answer_is_a_failure(tmp_path: Path) -> None:
    program = tmp_path / "criu"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    answer = call_criu([str(program)], b"\x08\x01", env={})
    assert not answer.success
    assert answer.message


def test_the_first_error_that_counts_is_told(tmp_path: Path) -> None:
    log = tmp_path / "dump.log"
    log.write_text(
        "Error (criu/util.c:1): rlimit: Can't setup RLIMIT_NOFILE for self\n"
        "Error (criu/sk.c:2): inet: Can't bind inet socket (id 3): Address already in use\n"
        "Error (criu/cr.c:3): Restoring FAILED.\n"
    )
    error = criu_failure("restore", str(log))
    assert "somebody else has by now" in error.message
    assert "(criu/sk.c:2)" in error.message
    assert error.hint


@pytest.mark.parametrize("text", ["", "no error at all\n"])
def test_without_an_error_in_the_log_the_answer_is_told(tmp_path: Path, text: str) -> None:
    log = tmp_path / "dump.log"
    log.write_text(text)
    assert "out of sorts" in criu_failure("save", str(log), "out of sorts").message
