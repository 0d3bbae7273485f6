"""Steps of builds in virtual machines: what they write is a layer like any other."""

from __future__ import annotations

import pytest

from hutch.dockerfile import StepFailed
from hutch.engine import Engine
from tests.engine.building import Builder, kinds
from tests.vm.machines import NEEDS

pytestmark = list(NEEDS)


def test_a_step_runs_in_a_machine_and_its_files_are_kept(machines: Engine) -> None:
    build = Builder(machines)
    before = {info.id for info in machines.list(all=True)}
    files = {"f": "from context\n", "hidden": "h", ".dockerignore": "hidden\nDockerfile\n"}
    options = {"memory": "128M", "network": "none"}
    step = (
        "RUN --isolation=vm --mount=target=/c --mount=type=secret,id=s "
        "cat /proc/cmdline /c/f /run/secrets/s; echo made > /made; rm -r /bin/true\n"
    )
    found = build.files(f"FROM busybox\n{step}", files, secrets={"s": b"secret"}, **options)
    assert "console=" in build.output() and "from context\nsecret" in build.output()
    assert found["made"][1] == b"made\n" and found["made"][0].uid == 0
    assert not {"c", "run/secrets", "run/secrets/s", "bin/true"} & set(found)
    with pytest.raises(StepFailed) as caught:
        build(
            f"FROM busybox\n{step}RUN cat /proc/cmdline /made; exit 7\n",
            files, secrets={"s": b"other"}, isolation="vm", **options,
        )  # fmt: skip
    assert caught.value.exit_code == 7
    assert kinds(build, "RUN") == ["cached", "error"]
    assert "console=" in build.output() and "made" in build.output()
    assert {info.id for info in machines.list(all=True)} == before
