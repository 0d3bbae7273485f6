"""Equal pages of virtual machines, merged by the host's kernel under pressure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.engine import Engine
from tests.requires import requires

pytestmark = [
    pytest.mark.integration,
    pytest.mark.serial,
    requires("root", "qemu", "busybox", "apt-mirror", "idle-ksm"),
]

SHORT = {"watermarks.low": "0.998", "watermarks.high": "0.999", "watermarks.critical": "0"}
_RUN = Path("/sys/kernel/mm/ksm/run")


@pytest.fixture
def quiet() -> Iterator[None]:
    """Merging as it was before, afterwards."""
    before = _RUN.read_text().strip()
    yield
    _RUN.write_text(before)


def test_merging_goes_on_while_memory_is_short(machines: Engine, quiet: None) -> None:
    resources = machines.resources
    options: dict[str, object] = {"isolation": "vm", "memory": "192M", "network": "none"}
    try:
        resources.configure({"ladder": "merge", **SHORT})
        with machines.start("busybox", ["sleep", "1000"], **options):  # type: ignore[arg-type]
            # Nobody asked for it.
            assert resources.reclaim().steps == ()
        options["placement"] = "merge=on"
        with machines.start("busybox", ["sleep", "1000"], **options):  # type: ignore[arg-type]
            assert [(s.rung, s.error) for s in resources.reclaim().steps] == [("merge", "")]
            assert _RUN.read_text().strip() == "1"
            assert resources.reclaim().steps == ()
            resources.configure(dict.fromkeys(SHORT, "none"))
            assert [(s.rung, s.undone) for s in resources.reclaim().steps] == [("merge", True)]
            assert _RUN.read_text().strip() == "0"
    finally:
        resources.release()
        (machines.root / "resources.json").unlink()
