"""Traces: what is read from each format, what is refused, and what generators make."""

from __future__ import annotations

import gzip
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hutch.errors import HutchError, InvalidArgument
from hutch.sched.traces import generate, open_trace, write_trace
from hutch.sched.traces.batsim import read_batsim
from hutch.sched.traces.swf import read_swf
from hutch.sched.traces.table import read_csv
from hutch.sched.workload import TraceJob
from tests.sched.test_properties import some

SWF = """; Version: 2.2
; MaxProcs: 64
; Note: a note
  1    0  10 100  4 -1 2048  8 300 1024  1  7  1  3  2 -1 -1 -1
  2   50  -1  -1  4 -1   -1  4 300   -1  5  7  1  3  2 -1 -1 -1
  3   60.5 -1  20 16 -1  -1 -1  -1   -1  1 -1 -1 -1 -1 -1 -1 -1
"""


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, str], str]:
    def make(name: str, text: str) -> str:
        path = tmp_path / name
        data = text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return make


@pytest.mark.parametrize("name", ["log.swf", "log.swf.gz"])
def test_a_log_is_read_with_its_header(file: Callable[[str, str], str], name: str) -> None:
    trace = open_trace(file(name, SWF))
    first, last = list(trace)
    assert trace.cores == 64 and trace.skipped == 1
    assert first == TraceJob(1, 0, 100, 8, 8 * 1024 * 1024, 300, user="7", queue="2", key="3")
    assert (last.id, last.submit, last.cores, last.estimate, last.user) == (3, 60.5, 16, None, "")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("1 2 3", r"log:2: line: expected 18 fields, got 3"),
        ("1 0 -1 ten 4 -1 -1 4 -1 -1 1 1 1 1 1 -1 -1 -1", r"log:2: field 4 \(run time\)"),
        ("1 0 -1 9 4 -1 -1 4.5 -1 -1 1 1 1 1 1 -1 -1 -1", r"field 8 \(requested processors\)"),
        ("1 0 -1 nan 4 -1 -1 4 -1 -1 1 1 1 1 1 -1 -1 -1", r"field 4 \(run time\)"),
        ("1 -5 -1 9 4 -1 -1 4 -1 -1 1 1 1 1 1 -1 -1 -1", r"submit time: must not be negative"),
    ],
)
def test_a_bad_line_of_a_log_is_named(line: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as raised:
        list(read_swf(["; Version: 2.2", line], where="log"))
    assert raised.value.hint


def test_a_table_needs_three_columns_and_knows_more() -> None:
    (job,) = read_csv(["id,submit,runtime", "a,1,2"])
    assert job == TraceJob("a", 1, 2)
    (job,) = read_csv(
        [
            "id,submit,runtime,cores,memory,estimate,priority,user,deadline,weight",
            "b,1.5,1m30s,4,512M,2h,-1,ann,100,2",
        ]
    )
    assert job == TraceJob("b", 1.5, 90.0, 4, 512 << 20, 7200.0, -1, "ann", 2, 100)


def test_empty_cells_and_comments_of_a_table_are_passed_over() -> None:
    rows = ["# made by hand", "id,submit,runtime,cores,user", "", "1,0,5,,", "# end"]
    assert list(read_csv(rows)) == [TraceJob(1, 0, 5)]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], r"t:1: header: is empty"),
        (["id,submit"], r"t:1: header: has no column 'runtime'"),
        (["id,submit,runtime,colour"], r"unknown column 'colour'"),
        (["id,submit,runtime,id"], r"two columns 'id'"),
        (["id,submit,runtime", "1,2"], r"t:2: line: expected 3 cells, got 2"),
        (["id,submit,runtime", "1,0,", "2,0,1"], r"t:2: runtime: must not be empty"),
        (["id,submit,runtime", "1,0,1", "2,-1,1"], r"t:3: submit: must not be negative"),
        (["id,submit,runtime", "1,0,inf"], r"t:2: runtime: expected seconds"),
        (["id,submit,runtime,cores", "1,0,1,0"], r"t:2: cores: must be above 0"),
        (["id,submit,runtime,memory", "1,0,1,much"], r"t:2: memory: expected bytes"),
        (["id,submit,runtime,priority", "1,0,1,x"], r"t:2: priority: expected a number"),
    ],
)
def test_a_bad_line_of_a_table_is_named(rows: list[str], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as raised:
        list(read_csv(rows, where="t"))
    assert raised.value.hint


def test_only_one_job_is_read_ahead() -> None:
    read = 0

    def lines() -> Iterator[str]:
        nonlocal read
        for n in range(1000):
            read += 1
            yield f"{n} {n} -1 1 1 -1 -1 1 -1 -1 1 1 1 1 1 -1 -1 -1"

    list(islice(read_swf(lines()), 3))
    assert read == 3


BATSIM = {
    "nb_res": 4,
    "jobs": [
        {"id": "w!2", "subtime": 10, "walltime": 100, "res": 4, "profile": "wait"},
        {"id": "w!1", "subtime": 0, "res": 2, "profile": "twice"},
        {"id": 3, "subtime": 20.5, "walltime": -1, "res": 2, "profile": "count"},
    ],
    "profiles": {
        "wait": {"type": "delay", "delay": 7.5},
        "twice": {"type": "sequential_composition", "repeat": 2, "seq": ["wait", "wait"]},
        "count": {"type": "parallel_homogeneous", "cpu": 4e9, "com": 0},
    },
}


def test_a_batsim_workload_takes_its_run_times_from_profiles() -> None:
    cores, jobs = read_batsim(json.dumps(BATSIM).encode(), flops=1e9)
    assert cores == 4
    assert [(j.id, j.submit, j.runtime, j.cores, j.estimate) for j in jobs] == [
        ("w!1", 0, 30, 2, None),
        ("w!2", 10, 7.5, 4, 100),
        (3, 20.5, 4, 2, None),
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, r"profiles.count: a parallel_homogeneous needs the speed"),
        ({"jobs": 3}, r"jobs: has no list of jobs"),
        ({"profiles": None}, r"profiles: has no profiles"),
        ({"jobs": [{"id": 1, "subtime": 0, "res": 0, "profile": "wait"}]}, r"jobs\[0\]\.res"),
        ({"jobs": [{"id": 1, "subtime": "0", "res": 1}]}, r"jobs\[0\]\.subtime"),
        ({"jobs": [{"id": 1, "subtime": 0, "profile": "x"}]}, r"no such profile: 'x'"),
        (
            {
                "jobs": [{"id": 1, "subtime": 0, "profile": "a"}],
                "profiles": {"a": {"type": "composed", "repeat": 1, "seq": ["a"]}},
            },
            r"contains itself",
        ),
        (
            {
                "jobs": [{"id": 1, "subtime": 0, "profile": "a"}],
                "profiles": {"a": {"type": "smpi"}},
            },
            r"unknown type: 'smpi'",
        ),
    ],
)
def test_a_bad_batsim_workload_is_named(change: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        read_batsim(json.dumps(BATSIM | change).encode())
    with pytest.raises(InvalidArgument, match="is no JSON"):
        read_batsim(b"{")


def test_a_log_never_gives_two_users_one_number() -> None:
    out = io.StringIO()
    names = ["ann", "1", "bob", "2", "ann", "1", "7"]
    jobs = [TraceJob(n, n, 1, user=name) for n, name in enumerate(names)]
    write_trace(jobs, out, "swf")
    users = [line.split()[11] for line in out.getvalue().splitlines() if line[0] != ";"]
    assert len(dict(zip(names, users, strict=True))) == len(set(users)) == 5
    assert users[:2] == users[4:6] and users[6] == "7"


@pytest.mark.parametrize("kind", ["swf", "csv", "batsim"])
@some
@given(
    st.lists(
        st.builds(
            TraceJob,
            id=st.integers(1, 10**6),
            submit=st.integers(0, 10**6),
            runtime=st.one_of(
                st.integers(0, 10**5), st.floats(0.001, 1e5).map(lambda v: round(v, 3))
            ),
            cores=st.integers(1, 64),
            estimate=st.one_of(st.none(), st.integers(1, 10**5)),
            user=st.sampled_from(["", "1", "2"]),
        ),
        min_size=1,
        unique_by=lambda job: job.id,
    ).map(lambda jobs: sorted(jobs, key=lambda job: job.submit))
)
def test_what_is_written_is_read_back(kind: str, jobs: list[TraceJob]) -> None:
    out = io.StringIO()
    assert write_trace(jobs, out, kind, cores=64) == len(jobs)
    text = out.getvalue()
    back: Iterable[TraceJob]
    match kind:
        case "swf":
            back = read_swf(text.splitlines())
        case "csv":
            back = read_csv(text.splitlines())
        case _:
            back = read_batsim(text.encode())[1]

    def facts(job: TraceJob) -> tuple[object, ...]:
        return str(job.id), job.submit, job.runtime, job.cores, job.estimate, job.user

    assert {facts(job) for job in back} == {facts(job) for job in jobs}


@pytest.mark.parametrize("text", ["lublin", "poisson:width=4", "uniform:load=1.1"])
def test_a_generator_makes_the_same_jobs_for_the_same_seed(text: str) -> None:
    made = [list(islice(generate(text, seed=seed).jobs(), 200)) for seed in (7, 7, 8)]
    assert made[0] == made[1] != made[2]
    assert all(a.submit <= b.submit for a, b in pairwise(made[0]))
    assert {job.id for job in made[0]} == set(range(1, 201))


def test_estimates_change_nothing_else() -> None:
    plain, inflated = (
        list(generate(f"lublin:jobs=50,inflate={inflate}").jobs()) for inflate in (0, 2)
    )
    assert [(j.submit, j.runtime, j.cores) for j in plain] == [
        (j.submit, j.runtime, j.cores) for j in inflated
    ]
    assert all(
        j.estimate is not None and j.runtime <= j.estimate <= 3 * j.runtime + 1 for j in inflated
    )


def test_lublins_model_has_the_shape_of_the_paper() -> None:
    jobs = list(generate("lublin:jobs=20000,cores=128").jobs())
    serial = sum(job.cores == 1 for job in jobs) / len(jobs)
    powers = sum(math.log2(job.cores).is_integer() for job in jobs) / len(jobs)
    by_hour = [0] * 24
    for job in jobs:
        by_hour[int(job.submit // 3600) % 24] += 1
    assert 0.15 < serial < 0.3 and 0.75 < powers < 0.97
    assert max(job.cores for job in jobs) <= 128
    assert max(job.runtime for job in jobs) <= math.exp(12)
    assert max(by_hour[10:17]) > 4 * min(by_hour[2:7])


@pytest.mark.parametrize("load", [0.5, 1.0])
def test_the_load_that_is_asked_for_is_made(load: float) -> None:
    for text, slack in (
        ("poisson:width=8,cores=64,jobs=20000", 0.1),
        ("lublin:cores=64,jobs=2000", 0.15),
        ("lublin:cores=200,jobs=20000", 0.1),
    ):
        jobs = list(generate(f"{text},load={load}").jobs())
        cores = 200 if "200," in text else 64
        made = sum(j.cores * j.runtime for j in jobs) / (cores * jobs[-1].submit)
        assert made == pytest.approx(load, rel=slack)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lublim:jobs=3", "no such trace"),
        ("missing.swf", "no such file"),
        ("notes.txt", "cannot tell the format"),
        ("lublin:jobs=0", "generator lublin.jobs: must be at least 1"),
        ("poisson:width=200", "generator poisson.width: is above the cores"),
    ],
)
def test_a_trace_that_cannot_be_had_is_named(name: str, words: str) -> None:
    with pytest.raises(HutchError, match=words):
        open_trace(name)


def test_a_damaged_file_is_named(file: Callable[[str, str], str]) -> None:
    path = Path(file("log.swf.gz", SWF * 50))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InvalidArgument, match=r"log\.swf\.gz: the compressed file is damaged"):
        list(open_trace(str(path)))


def test_a_trace_can_be_changed_while_it_is_read(file: Callable[[str, str], str]) -> None:
    table = "id,submit,runtime,estimate,priority\n1,5,10,4,2\n2,0,3,9,1\n"
    trace = open_trace(file("t.csv", table)).sorted().high_priority_first()
    jobs = list(trace.killed_at_estimate())
    assert [(j.id, j.runtime, j.priority) for j in jobs] == [(2, 3, -1), (1, 4, -2)]
