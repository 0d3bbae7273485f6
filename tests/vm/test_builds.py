"""Steps of builds in virtual machines: what they write is a layer like any other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hutch.engine import Engine
from tests.engine.building import Builder
from tests.vm.machines import NEEDS, machine_root

pytestmark = list(NEEDS)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with machine_root(tmp_path_factory.mktemp("built") / "root") as opened:
        yield opened


def test_a_step_runs_in_a_machine_and_its_files_are_kept(engine: Engine) -> None:
    build = Builder(engine)
    found = build.files(
        "FROM busybox\nRUN --isolation=vm --network=none --mount=target=/c "
        "--mount=type=secret,id=s cat /proc/cmdline /c/f /run/secrets/s; echo made > /made\n",
        {"f": "from context\n", "hidden": "h", ".dockerignore": "hidden\n"},
        secrets={"s": b"secret"},
        memory="128M",
    )
    assert "console=" in build.output() and "from context\nsecret" in build.output()
    assert found["made"][1] == b"made\n"
    assert not {"c", "run/secrets", "run/secrets/s"} & set(found)
    assert engine.list(all=True) == []
