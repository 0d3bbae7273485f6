"""A machine's memory from the host's pool of huge pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.engine import Engine
from hutch.resources.admission import NoRoom
from tests.requires import requires

pytestmark = [
    pytest.mark.integration,
    pytest.mark.serial,
    requires("root", "qemu", "busybox", "apt-mirror", "huge-pages"),
]

MIB = 1 << 20
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


@pytest.fixture
def pool() -> Iterator[None]:
    """Room for one machine of 256 MiB more than there was, set aside for the test."""
    before = int((_POOL / "nr_hugepages").read_text())
    (_POOL / "nr_hugepages").write_text(str(before + 136))
    try:
        yield
    finally:
        (_POOL / "nr_hugepages").write_text(str(before))


def free() -> int:
    """What somebody else could have: what a guest does not use stays reserved for it."""
    pages = (int((_POOL / f"{name}_hugepages").read_text()) for name in ("free", "resv"))
    return (next(pages) - next(pages)) * 2 * MIB


def test_a_machine_takes_its_memory_from_the_pool_and_gives_it_back(
    machines: Engine, pool: None
) -> None:
    options: dict[str, object] = {
        "isolation": "vm",
        "memory": "256M",
        "network": "none",
        "placement": "huge=2M",
    }
    before = free()
    with machines.start("busybox", ["sleep", "1000"], name="first", **options) as box:  # type: ignore[arg-type]
        assert before - free() == 256 * MIB
        assert box.exec(["true"]).exit_code == 0
        (holding,) = machines.resources.use().holdings
        assert holding.huge == {2 * MIB: 256 * MIB} and holding.memory == 128 * MIB
        total = int((_POOL / "nr_hugepages").read_text()) * 2 * MIB
        if total < 512 * MIB:
            with pytest.raises(NoRoom, match=r"huge pages of 2MiB.*held by first"):
                machines.start("busybox", ["true"], **options)  # type: ignore[arg-type]
    assert free() == before
