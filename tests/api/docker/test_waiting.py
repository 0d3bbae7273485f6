"""Who waits for what does not come: attached clients, programs that nobody starts."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hutch.api.docker import Front, execs
from hutch.api.docker.errors import ApiError
from hutch.api.docker.execs import Exec, ExecBody, Execs, StartBody
from hutch.api.docker.feeds import Client
from hutch.api.docker.http import Gone
from hutch.engine import Engine
from hutch.errors import NotFound
from tests.requires import requires

pytestmark = requires("root", "overlayfs", "cgroup")


def test_who_waits_for_a_start_that_fails_early_waits_for_the_next(hutch_engine: Engine) -> None:
    async def attempt() -> None:
        front = Front(hutch_engine)
        client = Client(
            cast("Any", None),
            stdin=False,
            stdout=True,
            stderr=True,
            multiplexed=True,
            ends_input=False,
            keys=b"",
        )
        try:
            front.lives.expect_start("nothing", client)
            with pytest.raises(NotFound):
                await front.lives.start("nothing")
            assert front.lives.forget("nothing", client)
        finally:
            await front.close()

    asyncio.run(attempt())


def test_programs_that_nobody_started_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execs, "_MOST", 3)
    known = Execs()
    made = [Exec("container", ExecBody(cmd=["true"])) for _ in range(4)]
    made[0].begun = True
    for one in made:
        known.add(one)
    assert known.of("container") == [made[0].id, made[2].id, made[3].id]
    for one in made:
        one.begun = True
    with pytest.raises(ApiError):
        known.add(Exec("container", ExecBody(cmd=["true"])))


def test_a_program_whose_client_left_before_it_began_is_over() -> None:
    known = Execs()
    one = Exec("container", ExecBody(cmd=["true"]))
    known.add(one)

    async def read(kind: type[StartBody]) -> StartBody:
        return kind()

    async def leave(headers: object) -> None:
        raise Gone

    request = SimpleNamespace(
        front=SimpleNamespace(execs=known),
        params={"id": one.id},
        version=(1, 51),
        upgrade=True,
        optional_json=read,
        hijack=leave,
    )
    with pytest.raises(Gone):
        asyncio.run(cast("Any", execs._start(cast("Any", request))))
    assert known.of("container") == []
