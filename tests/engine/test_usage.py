"""What is shown of a guest's processes, whatever it says of them."""

from __future__ import annotations

import pytest

from hutch.api.docker.times import timestamp
from hutch.drivers.base import ProcessRow
from hutch.drivers.vm.files import _failure
from hutch.engine.usage import _guest_table


@pytest.mark.parametrize("started", [-1.8e17, 1.8e17, 1e300, 0.0])
def test_a_guest_process_of_any_age_has_a_row(started: float) -> None:
    row = ProcessRow(
        pid=1, ppid=0, uid=0, started=started, cpu_s=1.8e17, tty="", command="\udcff\x1b[31m"
    )
    table = _guest_table([row], ())
    assert table.rows[0][1] == "1"
    assert (table.rows[0][4] == "?") == (started != 0.0)


def test_a_failure_of_no_known_number_is_a_failure() -> None:
    assert _failure(0xFFFFFFFF, "/x").message == "/x: unknown error 4294967295"
    assert _failure(2, "/x").message == "/x: no such file or directory"


@pytest.mark.parametrize(
    ("time_ns", "shown"),
    [
        (0, "0001-01-01T00:00:00Z"),
        (1_500_000_000, "1970-01-01T00:00:01.5Z"),
        (-(10**30), "0001-01-01T00:00:00Z"),
        (10**30, "9999-12-31T23:59:59.999999999Z"),
        (-50_000_000_000 * 10**9, "0385-07-25T07:06:40Z"),
    ],
)
def test_a_moment_that_no_calendar_has_is_shown_as_the_nearest(time_ns: int, shown: str) -> None:
    assert timestamp(time_ns) == shown
