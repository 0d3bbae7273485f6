"""Docker's clients against `hutch serve` and against dockerd: the same client, in turn."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cases import Peers
from bench.measure import Action, Row, Skip, measure
from bench.peers import CLEAN_ENV, Docker
from bench.stage import IMAGE, Stage

if TYPE_CHECKING:
    from hutch.engine import Engine

__all__ = ["DOCKER_API_CASES"]

MANY = 200
LOG_BYTES = 100_000_000
_LINE = "0123456789" * 10


class Served(Docker):
    """The docker command against `hutch serve`."""

    def __init__(self, socket: Path, pid: int) -> None:
        super().__init__(socket)
        self.url = f"unix://{socket}"
        self.pid = pid


@contextmanager
def served(engine: Engine, directory: Path) -> Iterator[Served]:
    """A daemon of ours on an engine's root."""
    socket = directory / "hutch.sock"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "hutch", "--root", str(engine.root)),
            *("serve", "--docker", f"unix://{socket}", "--log-level", "error"),
        ],
        env=CLEAN_ENV,
    )
    try:
        docker = Served(socket, process.pid)
        deadline = time.monotonic() + 60
        while True:
            try:
                docker("version")
                break
            except RuntimeError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield docker
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _both(ours: Docker, peers: Peers, *arguments: str) -> dict[str, Action]:
    return {
        "hutch": lambda: ours(*arguments),
        "docker": lambda: peers.docker(*arguments),
    }


def _runs(ours: Docker, peers: Peers, rounds: int) -> Iterator[Row]:
    for network in ("bridge", "none"):
        command = ("run", "--rm", "--network", network, IMAGE, "true")
        yield measure(
            f"docker run --rm --network {network}",
            _both(ours, peers, *command),
            rounds=rounds,
            targets={"docker": 0.25},
        )


def _library(ours: Served, peers: Peers, rounds: int) -> Row:
    """docker-py: create, start, wait, remove."""
    docker: Any = import_module("docker")

    def life(url: str) -> Action:
        client = docker.DockerClient(base_url=url)

        def once() -> None:
            box = client.containers.create(IMAGE, "true")
            box.start()
            box.wait()
            box.remove()

        return once

    ways: dict[str, Action] = {"hutch": life(ours.url)}
    with suppress(Skip):
        ways["docker"] = life(f"unix://{peers.docker.socket}")
    return measure(
        "docker-py create, start, wait, remove", ways, rounds=rounds, targets={"docker": 0.2}
    )


def _execs(ours: Served, peers: Peers, rounds: int) -> Iterator[Row]:
    """By the command line, half of whose time is its own, and by docker-py."""
    docker: Any = import_module("docker")
    name = "bench-exec"
    command = ("run", "-d", "--name", name, IMAGE, "sleep", "100000")
    boxes = {}
    for way, url in ((ours, ours.url), (peers.docker, f"unix://{peers.docker.socket}")):
        way(*command)
        boxes[url] = docker.DockerClient(base_url=url).containers.get(name)
    yield measure(
        "docker exec true",
        {
            **_both(ours, peers, "exec", name, "true"),
            # What no daemon has a part in: the program's own start and end.
            "the client alone": lambda: peers.docker("--version"),
        },
        rounds=rounds,
        targets={"docker": 0.25},
    )
    ours_box, theirs = boxes.values()
    yield measure(
        "docker-py exec of true",
        {
            "hutch": lambda: ours_box.exec_run("true") and None,
            "docker": lambda: theirs.exec_run("true") and None,
        },
        rounds=rounds,
        targets={"docker": 0.25},
    )
    for way in (ours, peers.docker):
        way("rm", "-f", name)


def _logs(ours: Docker, peers: Peers, rounds: int) -> Row:
    name = "bench-logs"
    script = f"yes {_LINE} | head -c {LOG_BYTES}"
    for way in (ours, peers.docker):
        way("run", "-d", "--name", name, "--network", "none", IMAGE, "sh", "-c", script)
        way("wait", name)
    row = measure(
        "docker logs of 100 MB",
        _both(ours, peers, "logs", name),
        rounds=max(2, rounds // 5),
        targets={"docker": 1.0},
    )
    for way in (ours, peers.docker):
        way("rm", name)
    return row


def _many(ours: Served, engine: Engine, peers: Peers, rounds: int) -> Iterator[Row]:
    """Memory without containers and with many, and the list of those."""
    yield _memory("memory of the daemons, idle", ours, engine, peers)
    names = [f"bench-many-{i}" for i in range(MANY)]
    for way in (ours, peers.docker):
        for name in names:
            way("run", "-d", "--name", name, "--network", "none", IMAGE, "sleep", "100000")
    yield measure(
        f"docker ps with {MANY} containers",
        _both(ours, peers, "ps", "-q"),
        rounds=rounds,
        targets={"docker": 1.0},
    )
    yield _memory(f"memory of the daemons with {MANY} containers", ours, engine, peers)
    for way in (ours, peers.docker):
        way("rm", "-f", *names)


def _memory(case: str, ours: Served, engine: Engine, peers: Peers) -> Row:
    """PSS of all that runs beside the containers: ours with supervisors, theirs with shims."""

    def hutch() -> float:
        supervisors = [_parent(info.pid) for info in engine.list()]
        return _pss([ours.pid, *supervisors])

    def docker() -> float:
        return _pss(_related(str(peers.docker.socket.parent)))

    return measure(
        case,
        {"hutch": hutch, "docker": docker},
        rounds=1,
        warm_up=0,
        unit="kB",
        targets={"docker": 1.0},
    )


def _parent(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1])


def _related(state: str) -> list[int]:
    """Return dockerd, its containerd and their shims: all that name its directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode("utf-8", "replace")
                if state in words and ("dockerd" in words or "containerd" in words):
                    found.append(int(entry.name))
    return found


def _pss(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return float(total)


def docker_api(stage: Stage, with_peers: Peers, rounds: int) -> list[Row]:
    """Starts, programs inside, logs."""
    with ExitStack() as stack:
        engine = stack.enter_context(stage.engine())
        ours = stack.enter_context(served(engine, stage.directory))
        rows = list(_runs(ours, with_peers, rounds))
        rows.append(_library(ours, with_peers, rounds))
        rows += _execs(ours, with_peers, rounds)
        rows.append(_logs(ours, with_peers, rounds))
    return rows


def docker_many(stage: Stage, with_peers: Peers, rounds: int) -> list[Row]:
    """Many containers: the list of them, and memory."""
    with ExitStack() as stack:
        engine = stack.enter_context(stage.engine())
        ours = stack.enter_context(served(engine, stage.directory))
        return list(_many(ours, engine, with_peers, rounds))


DOCKER_API_CASES = {"docker-api": docker_api, "docker-many": docker_many}
