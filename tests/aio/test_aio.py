"""The engine for asyncio, and that cancelling leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

import hutch
from hutch import aio
from hutch.errors import Exhausted, InvalidArgument, NotFound, OperationTimeout
from hutch.process.frames import Output
from hutch.testing import ensure_image
from tests.requires import requires

pytestmark = [requires("root", "overlayfs", "cgroup", "busybox"), pytest.mark.integration]
T = TypeVar("T")
Test = Callable[[aio.Engine], Coroutine[Any, Any, T]]


@pytest.fixture(scope="module")
def busybox_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root with an image that no other engine of this process has open: SQLite keeps the
    descriptors of closed connections for as long as others on the same file are open."""
    root = tmp_path_factory.mktemp("aio")
    with hutch.Engine(root) as engine:
        ensure_image(engine, "busybox")
    yield root
    with hutch.Engine(root) as engine:
        engine.networks.teardown()
    shutil.rmtree(root)


@pytest.fixture
def play(busybox_root: Path) -> Callable[[Test[T]], T]:
    """Run a coroutine with an async engine of its own."""

    def run(test: Test[T]) -> T:
        async def main() -> T:
            async with aio.Engine(busybox_root) as engine:
                return await asyncio.wait_for(test(engine), 60)

        return asyncio.run(main())

    return run


def fresh() -> str:
    return f"aio-{uuid.uuid4().hex[:12]}"


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + 60
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def exists(engine: aio.Engine, name: str) -> bool:
    return bool(await engine.list(all=True, filters={"name": [name]}))


async def runs(engine: aio.Engine, name: str) -> bool:
    return bool(await engine.list(filters={"name": [name]}))


def test_run_collects_both_streams_and_feeds_input(play: Any) -> None:
    data = os.urandom(300_000)

    async def test(engine: aio.Engine) -> hutch.Completed:
        script = "cat; echo err >&2; exit 3"
        return await engine.run("busybox", ["sh", "-c", script], input=data, network="none")

    done = play(test)
    assert (done.exit_code, done.stdout, done.stderr) == (3, data, b"err\n")


def test_many_runs_at_once(play: Any) -> None:
    async def test(engine: aio.Engine) -> list[bytes]:
        work = (engine.run("busybox", ["echo", str(i)], network="none") for i in range(24))
        return [done.stdout for done in await asyncio.gather(*work)]

    assert play(test) == [f"{i}\n".encode() for i in range(24)]


def test_a_cancelled_run_kills_and_removes_its_instance(play: Any) -> None:
    async def test(engine: aio.Engine) -> None:
        name = fresh()
        task = asyncio.ensure_future(
            engine.run("busybox", ["sleep", "1000"], name=name, network="none")
        )
        await until(lambda: runs(engine, name))
        pid = (await (await engine.get(name)).info()).pid
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not await exists(engine, name)
        assert not os.path.exists(f"/proc/{pid}")

    play(test)


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.005, 0.02])
def test_a_start_cancelled_at_any_moment_leaves_nothing(play: Any, delay: float) -> None:
    async def test(engine: aio.Engine) -> None:
        name = fresh()
        task = asyncio.ensure_future(
            engine.start("busybox", ["sleep", "1000"], name=name, network="none")
        )
        await asyncio.sleep(delay)
        task.cancel()
        try:
            await (await task).remove(force=True)
        except asyncio.CancelledError:
            pass
        assert not await exists(engine, name)

    play(test)


def test_a_run_that_takes_too_long_or_writes_too_much_is_ended(play: Any) -> None:
    async def test(engine: aio.Engine) -> None:
        name = fresh()
        with pytest.raises(OperationTimeout):
            await engine.run("busybox", ["sleep", "1000"], name=name, timeout=0.2, network="none")
        assert not await exists(engine, name)
        with pytest.raises(Exhausted) as caught:
            await engine.run("busybox", ["yes"], name=name, limit=100_000, network="none")
        assert caught.value.stdout == b"y\n" * 50_000
        assert not await exists(engine, name)

    play(test)


def test_a_program_that_takes_too_long_has_not_written_in_vain(play: Any) -> None:
    async def test(engine: aio.Engine) -> tuple[bytes, bytes]:
        async with await engine.start("busybox", ["sleep", "1000"], network="none") as box:
            session = await box.exec_stream(["sh", "-c", "echo early; exec sleep 1000"])
            async with asyncio.timeout(60):
                while not session._pieces:
                    await session._change()
            with pytest.raises(OperationTimeout) as caught:
                await session.collect(input=None, timeout=0.1, limit=100)
            return caught.value.stdout, caught.value.stderr

    assert play(test) == (b"early\n", b"")


def test_a_run_that_was_killed_for_its_memory_says_so(play: Any) -> None:
    async def test(engine: aio.Engine) -> hutch.Completed:
        script = "dd if=/dev/zero of=/dev/null bs=200M count=1"
        limits: dict[str, Any] = {"memory": "16m", "memory_swap": "16m"}
        return await engine.run("busybox", ["sh", "-c", script], network="none", **limits)

    done = play(test)
    assert (done.exit_code, done.oom_killed) == (137, True)


def test_input_may_be_text_and_nothing_else_than_that_and_bytes(play: Any) -> None:
    async def test(engine: aio.Engine) -> str:
        async with await engine.start("busybox", ["sleep", "1000"], network="none") as box:
            with pytest.raises(InvalidArgument, match=r"^input: expected bytes"):
                await box.exec(["cat"], input=5)  # type: ignore[arg-type]
            inside = await box.exec(["cat"], input="é")
        return (await engine.run("busybox", ["cat"], input=inside.text, network="none")).text

    assert play(test) == "é"


def test_errors_are_those_of_the_engine(play: Any) -> None:
    async def test(engine: aio.Engine) -> None:
        with pytest.raises(InvalidArgument):
            await engine.run("busybox", ["true"], memory="1m")
        with pytest.raises(NotFound):
            await engine.get("no-such-thing")
        with pytest.raises(hutch.CommandError):
            await engine.run("busybox", ["false"], check=True, network="none")
        with pytest.raises(hutch.HutchError):
            await engine.run("busybox", ["nosuch"], network="none")

    play(test)


def test_exec_files_logs_and_leaving_the_block(play: Any) -> None:
    async def test(engine: aio.Engine) -> None:
        name = fresh()
        script = "for i in 1 2 3; do echo $i; sleep 0.1; done; sleep 1000"
        box = await engine.start("busybox", ["sh", "-c", script], name=name, network="none")
        async with box:
            done = await box.exec(["cat"], input=b"in")
            assert done.stdout == b"in"
            await box.files.write("/tmp/f", b"data")
            assert await box.files.read("/tmp/f") == b"data"
            seen = []
            async for record in box.logs(follow=True):
                seen.append(record.data)
                if len(seen) == 3:
                    break
            assert seen == [b"1\n", b"2\n", b"3\n"]
            assert (await box.info()).name == name
            assert (await box.stats()).pids.current >= 1
        assert not await exists(engine, name)

    play(test)


def test_a_cancelled_exec_ends_its_program(play: Any) -> None:
    async def test(engine: aio.Engine) -> None:
        async with await engine.start("busybox", ["sleep", "1000"], network="none") as box:
            task = asyncio.ensure_future(box.exec(["sleep", "987"]))

            async def sleeps() -> bool:
                return any("sleep 987" in " ".join(row) for row in (await box.top()).rows)

            await until(sleeps)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not await sleeps()

    play(test)


def test_an_exec_that_is_cancelled_while_it_begins_ends_its_program(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, cancelled = threading.Event(), threading.Event()
    made: list[hutch.Session] = []
    begin = hutch.Instance.exec_stream

    def begin_slowly(*args: Any, **options: Any) -> hutch.Session:
        made.append(begin(*args, **options))
        begun.set()
        assert cancelled.wait(60)
        return made[0]

    async def test(engine: aio.Engine) -> None:
        async with await engine.start("busybox", ["sleep", "1000"], network="none") as box:
            monkeypatch.setattr(hutch.Instance, "exec_stream", begin_slowly)
            task = asyncio.ensure_future(box.exec(["sleep", "986"]))
            assert await asyncio.to_thread(begun.wait, 60)
            task.cancel()
            cancelled.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            status = made[0].link.exit_status
            assert status is not None and status.signal == signal.SIGKILL
            assert "sleep 986" not in str((await box.top()).rows)

    play(test)


def test_a_session_is_read_and_written_by_turns(play: Any) -> None:
    async def test(engine: aio.Engine) -> None:
        async with await engine.start("busybox", ["sleep", "1000"], network="none") as box:
            async with await box.exec_stream(["cat"], stdin=True) as session:
                pieces = session.output()
                for word in (b"one\n", b"two\n"):
                    await session.send(word)
                    assert await anext(pieces) == Output(1, word)
                await session.close_stdin()
                assert await session.wait() == 0
            async with await box.exec_stream(["sh", "-c", "kill -STOP $$"]) as session:
                await session.signal(9)
                assert await session.wait() == 137

    play(test)


def test_a_slow_reader_holds_the_program_back(play: Any) -> None:
    async def test(engine: aio.Engine) -> int:
        async with await engine.start("busybox", ["sleep", "1000"], network="none") as box:
            script = "dd if=/dev/zero bs=64k count=200 2>/dev/null"
            async with await box.exec_stream(["sh", "-c", script]) as session:
                total = 0
                async for piece in session.output():
                    total += len(piece.data) if isinstance(piece, Output) else 0
                    await asyncio.sleep(0)
                assert await session.wait() == 0
                return total

    assert play(test) == 200 * 65536


def test_waiting_can_be_cancelled_and_the_instance_goes_on(play: Any) -> None:
    async def test(engine: aio.Engine) -> None:
        async with await engine.start("busybox", ["sleep", "1000"], network="none") as box:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(box.wait(), 0.1)
            with pytest.raises(OperationTimeout):
                await box.wait(timeout=0.1)
            await box.kill()
            assert await box.wait() == 137

    play(test)


def test_events_come_in_order_and_the_stream_can_be_left(play: Any) -> None:
    async def test(engine: aio.Engine) -> list[str]:
        name = fresh()
        seen: list[str] = []

        async def watch() -> None:
            async for event in engine.events(filters={"container": [name]}):
                seen.append(event.action)
                if event.action == "destroy":
                    return

        begin = asyncio.ensure_future(watch())
        await asyncio.sleep(0)
        await engine.run("busybox", ["true"], name=name, network="none")
        await begin
        return seen

    assert play(test) == ["create", "start", "die", "destroy"]


def test_images_volumes_and_networks_are_there(play: Any) -> None:
    async def test(engine: aio.Engine) -> None:
        name = fresh()
        assert (await engine.images.get("busybox")).names
        assert (await engine.volumes.create(name)).name == name
        await engine.volumes.remove(name)
        assert "bridge" in [network.name for network in await engine.networks.list()]
        assert (await engine.info()).images >= 1
        assert (await engine.resources.decide(memory="1G")).fits
        assert (await engine.resources.memory()).total > 0

    play(test)


def test_the_facade_is_an_attribute_of_the_package() -> None:
    """Which mypy, over this file, has to find too."""
    assert hutch.aio.Engine is aio.Engine
    assert hutch.testing.ensure_image is ensure_image
