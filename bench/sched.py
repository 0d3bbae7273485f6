"""The simulator and the policies: a million jobs, a whole comparison, one decision, and
AccaSim on the same log.

The log is `HUTCH_BENCH_LOG` (an SWF file; the published figures are of the NASA iPSC log of
the Parallel Workloads Archive) or else a generated one of the same size.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from bench.measure import Action, Row, Skip, measure

if TYPE_CHECKING:
    from bench.cases import Peers
    from bench.stage import Stage

__all__ = ["SCHED_CASES", "fetch_accasim", "remove_accasim"]

_WHERE = "HUTCH_BENCH_ACCASIM"
_LOG = "HUTCH_BENCH_LOG"
_MILLION = "lublin:jobs=1000000,cores=256,load=0.7"
_TWELVE = "fcfs,sjf,srtf,priority,rr,mlfq,hrrn,fair,lottery,stride,easy,conservative"
# AccaSim was written for Python up to 3.9, where `collections` had these names too.
_DRIVER = """
import collections, collections.abc, json, os, sys, time
for name in ("Callable", "Iterable", "Mapping", "MutableMapping", "Sequence"):
    setattr(collections, name, getattr(collections.abc, name))
from accasim.base.allocator_class import FirstFit
from accasim.base.scheduler_class import FirstInFirstOut, ShortestJobFirst
from accasim.base.simulator_class import Simulator
policy = {"fcfs": FirstInFirstOut, "sjf": ShortestJobFirst}[sys.argv[1]]
simulator = Simulator(
    sys.argv[2], sys.argv[3], policy(FirstFit()), scheduling_output=True,
    statistics_output=False, show_statistics=False, RESULTS_FOLDER_NAME="results",
)
began = time.perf_counter()
written = simulator.start_simulation()
json.dump([time.perf_counter() - began, list(written.values())[0]], open(sys.argv[4], "w"))
"""


def fetch_accasim() -> str:
    """Install AccaSim into an environment of its own; return why not, or nothing."""
    where = tempfile.mkdtemp(prefix="hutch-bench-accasim-")
    os.environ[_WHERE] = where
    python = f"{where}/bin/python"
    for argv in (
        [sys.executable, "-m", "venv", where],
        [python, "-m", "pip", "install", "--quiet", "accasim"],
    ):
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            remove_accasim()
            return f"AccaSim could not be installed: {done.stderr.strip()[-200:]}"
    return ""


def remove_accasim() -> None:
    """Remove what `fetch_accasim` made."""
    if where := os.environ.pop(_WHERE, ""):
        shutil.rmtree(where, ignore_errors=True)


def _hutch(*argv: str) -> bytes:
    done = subprocess.run(
        [sys.executable, "-m", "hutch", "sched", *argv], capture_output=True, check=True
    )
    return done.stdout


def million(_stage: Stage, _peers: Peers, rounds: int) -> list[Row]:
    """Generate and simulate a million jobs on 256 cores, start of the command included. The CPU
    time of each run is told too: one process that never waits needs no more on a quiet machine."""
    rows = []
    for policy, most_s in (("fcfs", 15), ("sjf", 15), ("easy", 60)):

        def run(policy: str = policy) -> None:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            _hutch("simulate", _MILLION, "--policy", policy, "-o", "json")
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            print(f"{policy}: {spent:.1f} s of CPU time")

        case = f"1,000,000 generated jobs on 256 cores, {policy}"
        rows.append(
            measure(
                case,
                {"hutch": run},
                rounds=max(1, rounds // 10),
                targets={"ms": most_s * 1000.0},
                warm_up=0,
            )
        )
    return rows


def _log(stage: Stage) -> tuple[Path, str]:
    """Return the log, with the run times as estimates, so that all sides know the same."""
    from hutch.sched.traces import open_trace, write_trace

    source = os.environ.get(_LOG) or "lublin:jobs=18239,cores=128,load=0.47"
    target = stage.directory / "log.swf"
    if not target.exists():
        trace = open_trace(source)
        with open(target, "w") as file:
            jobs = (
                msgspec.structs.replace(job, estimate=max(job.runtime, 1), memory=0)
                for job in trace
            )
            write_trace(jobs, file, "swf", cores=trace.cores)
    return target, os.path.basename(source)


def compare(stage: Stage, _peers: Peers, rounds: int) -> Row:
    """Compare twelve policies on the log."""
    log, name = _log(stage)

    def run() -> None:
        _hutch("compare", str(log), "--policy", _TWELVE, "-o", "json")

    return measure(
        f"12 policies compared on {name}",
        {"hutch": run},
        rounds=max(2, rounds // 5),
        targets={"ms": 30_000},
    )


def accasim(stage: Stage, _peers: Peers, rounds: int) -> list[Row]:
    """The same log and policy in AccaSim; both read the log and write every job's start."""
    log, name = _log(stage)
    cores = next(
        int(line.split()[-1]) for line in log.read_text().splitlines() if "MaxProcs" in line
    )
    rows = []
    for policy in ("fcfs", "sjf"):
        theirs = _accasim(stage, log, cores, policy)

        def ours(policy: str = policy) -> float:
            out = stage.directory / f"{policy}.csv"
            began = time.perf_counter()
            _hutch("simulate", str(log), "--policy", policy, "--per-job", str(out))
            return time.perf_counter() - began

        row = measure(
            f"{policy} on {name}",
            {"hutch": ours, "accasim": theirs},
            rounds=max(1, rounds // 10),
            targets={"accasim": 0.1},
            warm_up=0,
        )
        rows.append(row)
        if row.ways["accasim"].seconds:
            _say_whether_alike(stage, policy)
    return rows


def _accasim(stage: Stage, log: Path, cores: int, policy: str) -> Action:
    folder = stage.directory / f"accasim-{policy}"

    def run() -> float:
        where = os.environ.get(_WHERE)
        if not where:
            raise Skip("AccaSim could not be installed")
        folder.mkdir(exist_ok=True)
        config = {
            "groups": {"node": {"core": cores, "mem": 1}},
            "resources": {"node": 1},
            "system_name": "one node",
            "start_time": 0,
            "equivalence": {"processor": {"core": 1}},
        }
        (folder / "system.json").write_bytes(msgspec.json.encode(config))
        (folder / "driver.py").write_text(_DRIVER)
        answer = folder / "answer.json"
        subprocess.run(
            [f"{where}/bin/python", "driver.py", policy, str(log), "system.json", str(answer)],
            cwd=folder,
            check=True,
            capture_output=True,
            env={**os.environ, "TZ": "UTC"},
        )
        return float(msgspec.json.decode(answer.read_bytes())[0])

    return run


def _say_whether_alike(stage: Stage, policy: str) -> None:
    """Print whether both started every job at the same time."""
    import csv
    from datetime import UTC, datetime

    answer = msgspec.json.decode((stage.directory / f"accasim-{policy}/answer.json").read_bytes())
    theirs = {}
    for line in Path(answer[1]).read_text().splitlines():
        # id;user;submitted__nodes__started;ended;…
        first, _, last = line.split("__")
        started = datetime.fromisoformat(last.split(";")[0]).replace(tzinfo=UTC)
        theirs[first.split(";")[0]] = started.timestamp()
    with open(stage.directory / f"{policy}.csv") as file:
        ours = {row["id"]: float(row["start"]) for row in csv.DictReader(file)}
    apart = sum(theirs.get(job) != start for job, start in ours.items())
    print(f"{policy}: {len(ours)} jobs, {apart} of them started at another time by AccaSim")


def decision(_stage: Stage, _peers: Peers, rounds: int) -> list[Row]:
    """One decision after a job has ended, with 100,000 pending."""
    rows = []
    for policy in ("fcfs", "srtf", "fair", "hrrn", "lottery", "easy"):
        case = f"decision of {policy} with 100,000 jobs pending"
        rows.append(
            measure(
                case,
                {"hutch": _decider(policy)},
                rounds=max(20, rounds),
                targets={"median ms": 2},
                gap_s=0.01,
            )
        )
    return rows


def _decider(text: str) -> Callable[[], float]:
    from hutch.sched import Capacity, Job, create

    chance = random.Random(1)
    policy = create(text, Capacity(cores=256, memory=1 << 40))
    for n in range(100_300):
        policy.submit(
            Job(
                id=n, seq=n, arrival=n / 1000, cores=chance.choice((1, 2, 4, 8, 16, 3, 64)),
                estimate=chance.expovariate(1 / 600), memory=chance.randrange(1 << 32),
                user=f"u{n % 40}", weight=1 + n % 3,
            ),
            n / 1000,
        )  # fmt: skip
    now = 101.0
    running = list(policy.decide(now).start)

    def once() -> float:
        nonlocal now
        now += 1
        policy.finish(running.pop(chance.randrange(len(running))), now)
        began = time.perf_counter()
        decisions = policy.decide(now)
        taken = time.perf_counter() - began
        paused = {id(job) for job in decisions.pause}
        running[:] = [job for job in running if id(job) not in paused] + list(decisions.start)
        return taken

    return once


SCHED_CASES: dict[str, Callable[[Stage, Peers, int], Row | list[Row]]] = {
    "sched-decision": decision,
    "sched-compare": compare,
    "sched-accasim": accasim,
    "sched-million": million,
}
