"""The cases of `make bench`: starts, exec, throughput, memory. Pulls are in `bench.pulls`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.measure import Row, Samples, Skip, measure
from bench.peers import Docker, Podman, bundle, crun_worker, dockerd, run
from bench.stage import IMAGE, Stage

__all__ = ["CASES", "Peers", "peers"]

IN_FLIGHT = 16
IDLE = 200
HUTCH = Path(sys.executable).parent / "hutch"


class Peers:
    """Docker and podman with the image, or the reason why one is not there."""

    def __init__(self, stage: Stage, stack: ExitStack, *, start: bool = True) -> None:
        self._docker: Docker | None = None
        self._podman: Podman | None = None
        self.reasons: dict[str, str] = {}
        if not start:
            self.reasons = {"docker": "not started", "podman": "not started"}
            return
        try:
            self._docker = stack.enter_context(dockerd(stage.directory / "docker"))
            self._docker("import", str(stage.tar), IMAGE)
        except (OSError, RuntimeError) as exc:
            self.reasons["docker"] = str(exc)
        try:
            self._podman = Podman(stage.directory / "podman")
            self._podman("import", str(stage.tar), IMAGE)
        except (OSError, RuntimeError) as exc:
            self.reasons["podman"] = str(exc)

    @property
    def docker(self) -> Docker:
        if self._docker is None or "docker" in self.reasons:
            raise Skip(self.reasons.get("docker", "not started"))
        return self._docker

    @property
    def podman(self) -> Podman:
        if self._podman is None or "podman" in self.reasons:
            raise Skip(self.reasons.get("podman", "not started"))
        return self._podman


@contextmanager
def peers(stage: Stage, *, start: bool = True) -> Iterator[Peers]:
    """Have the peers for the length of the block; where they are not to be started, they
    are left out of the cases."""
    with ExitStack() as stack:
        yield Peers(stage, stack, start=start)


# Podman raises limits by default, which needs a capability this machine may lack.
_PODMAN_RUN = ("run", "--rm", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096")


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"exit code {code}")


def library_start(stage: Stage, with_peers: Peers, rounds: int) -> Row:
    """`engine.run(image, ["true"])` to its known exit, without a network."""
    directory = stage.directory
    ready = bundle(directory / "bundle", stage.rootfs, ["true"])

    def runc() -> None:
        run(["runc", "--root", str(directory / "runc"), "run", "-b", str(ready), stage.name()])

    def bwrap() -> None:
        root = str(stage.rootfs)
        mounts = ["--bind", root, "/", "--proc", "/proc", "--dev", "/dev"]
        run(["bwrap", "--unshare-all", *mounts, "true"])

    with crun_worker() as worker, stage.engine() as engine:
        crun = ["crun", "--root", str(directory / "crun"), "run", "-b", str(ready)]
        return measure(
            "library run, no network",
            {
                "hutch": lambda: _check(engine.run(IMAGE, ["true"], network="none").exit_code),
                "runc": runc,
                "crun": lambda: worker.run([*crun, stage.name()]),
                "bwrap": bwrap,
                "docker": lambda: with_peers.docker(
                    "run", "--rm", "--network", "none", IMAGE, "true"
                ),
                "podman": lambda: with_peers.podman(
                    *_PODMAN_RUN, "--network", "none", IMAGE, "true"
                ),
            },
            rounds=rounds,
            targets={"ms": 8, "runc": 0.4, "crun": 0.7, "docker": 1 / 25},
        )


def library_bridge(stage: Stage, with_peers: Peers, rounds: int) -> Row:
    """The same on the default bridge, with an address and NAT."""
    with stage.engine() as engine:
        return measure(
            "library run, default bridge",
            {
                "hutch": lambda: _check(engine.run(IMAGE, ["true"]).exit_code),
                "docker": lambda: with_peers.docker("run", "--rm", IMAGE, "true"),
                "podman": lambda: with_peers.podman(*_PODMAN_RUN, IMAGE, "true"),
            },
            rounds=rounds,
            targets={"ms": 10, "docker": 1 / 25},
        )


def command_line(stage: Stage, with_peers: Peers, rounds: int) -> Row:
    """`hutch run --rm IMAGE true` on the default bridge."""
    with stage.engine() as engine:
        command = [str(HUTCH), "--root", str(engine.root), "run", "--rm", IMAGE, "true"]
        return measure(
            "command line run --rm, default bridge",
            {
                "hutch": lambda: run(command),
                "docker": lambda: with_peers.docker("run", "--rm", IMAGE, "true"),
                "podman": lambda: with_peers.podman(*_PODMAN_RUN, IMAGE, "true"),
            },
            rounds=rounds,
            targets={"docker": 0.25, "podman": 0.5},
        )


def execute(stage: Stage, with_peers: Peers, rounds: int) -> Row:
    """A program in a running container."""
    with stage.engine() as engine, ExitStack() as stack:
        box = engine.start(IMAGE, ["sleep", "100000"], network="none")
        podman_options = [*(o for o in _PODMAN_RUN if o != "--rm"), "-d", "--network", "none"]
        for name in ("docker", "podman"):
            if name in with_peers.reasons:
                continue
            peer: Any = getattr(with_peers, name)
            start = ["run", "-d", "--network", "none"] if name == "docker" else podman_options
            peer(*start, "--name", "bench-exec", IMAGE, "sleep", "100000")
            stack.callback(peer, "rm", "-f", "bench-exec")
        return measure(
            "exec in a running container",
            {
                "hutch": lambda: _check(box.exec(["true"]).exit_code),
                "docker": lambda: with_peers.docker("exec", "bench-exec", "true"),
                "podman": lambda: with_peers.podman("exec", "bench-exec", "true"),
            },
            rounds=rounds,
            targets={"ms": 2, "docker": 1 / 20},
        )


def _per_second(action: Callable[[], None], count: int) -> float:
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        began = time.perf_counter()
        for future in [pool.submit(action) for _ in range(count)]:
            future.result()
        return count / (time.perf_counter() - began)


def throughput(stage: Stage, with_peers: Peers, rounds: int) -> Row:
    """Containers per second with 16 in flight, no network."""
    turns = max(2, rounds // 8)
    with stage.engine() as engine:
        return measure(
            f"containers per second, {IN_FLIGHT} in flight",
            {
                "hutch": lambda: _per_second(
                    lambda: _check(engine.run(IMAGE, ["true"], network="none").exit_code), 320
                ),
                "docker": lambda: _per_second(
                    lambda: with_peers.docker("run", "--rm", "--network", "none", IMAGE, "true"),
                    2 * IN_FLIGHT,
                ),
            },
            rounds=turns,
            targets={"per_s": 100, "docker": 10},
            unit="per_s",
            warm_up=0,
        )


def _pss_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _available_kb() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1])
    raise RuntimeError("no MemAvailable")


def _settled_available_kb() -> int:
    """Return available memory after freed pages came home."""
    os.sync()
    time.sleep(2)
    return _available_kb()


def memory(stage: Stage, with_peers: Peers, rounds: int) -> list[Row]:
    """The supervisor of an idle container, and what 200 of them add."""
    with stage.engine() as engine:
        before = _settled_available_kb()
        boxes = [engine.start(IMAGE, ["sleep", "100000"], network="none") for _ in range(IDLE)]
        pids = [box.info().pid for box in boxes]
        supervisors = [_pss_kb(_parent(pid)) for pid in pids]
        own = sum(_pss_kb(pid) for pid in pids)
        added = before - _settled_available_kb() - own
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda box: box.remove(force=True), boxes))
    largest = Row(
        case="supervisor of an idle container (the largest)",
        ways={"hutch": Samples(seconds=[float(max(supervisors))])},
        targets={"kB": 200},
        unit="kB",
    )
    together = Row(
        case=f"{IDLE} idle containers, beyond what their processes use",
        ways={"hutch": Samples(seconds=[float(added)])},
        targets={"kB": 100 * 1024},
        unit="kB",
    )
    return [largest, together]


CASES: dict[str, Callable[[Stage, Peers, int], Row | list[Row]]] = {
    "run": library_start,
    "bridge": library_bridge,
    "cli": command_line,
    "exec": execute,
    "throughput": throughput,
    "memory": memory,
}
