"""`hutch sched`: no engine, no root directory; figures, files, and errors that name a field."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from hutch.cli.main import run

CONVOY = "id,submit,runtime\na,0,24\nb,0,3\nc,0,3\n"


@pytest.fixture
def convoy(tmp_path: Path) -> str:
    path = tmp_path / "convoy.csv"
    path.write_text(CONVOY)
    return str(path)


def test_figures_as_json_have_the_promised_shape(
    convoy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["sched", "simulate", convoy, "--cores", "1", "-o", "json"]
    assert run([*argv, "--policy", "fcfs", "--policy", "rr:quantum=4"]) == 0
    fcfs, turns = json.loads(capsys.readouterr().out)
    assert (fcfs["policy"], turns["policy"]) == ("fcfs", "rr:quantum=4")
    assert (fcfs["jobs"], fcfs["makespan"], fcfs["utilisation"]) == (3, 30, 1)
    for metric in ("turnaround", "waiting", "response", "slowdown", "bounded_slowdown"):
        assert set(fcfs[metric]) == {"mean", "median", "p95", "p99"}
    assert fcfs["waiting"]["mean"] == 17
    assert turns["waiting"]["mean"] == pytest.approx(17 / 3)


def test_policies_are_told_apart_from_their_parameters(
    convoy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["sched", "compare", convoy, "--cores", "1", "-o", "csv"]
    assert run([*argv, "-p", "fcfs,mlfq:levels=2,quantum=4,sjf"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["policy"] for row in rows] == ["fcfs", "mlfq:levels=2,quantum=4", "sjf"]


def test_comparing_without_names_takes_every_policy(
    convoy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from hutch.sched import POLICIES

    assert run(["sched", "compare", convoy, "--cores", "1", "-o", "json"]) == 0
    assert [entry["policy"] for entry in json.loads(capsys.readouterr().out)] == [*POLICIES]


def test_processes_side_by_side_give_the_same_figures(
    convoy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for parallel in ("1", "2"):
        argv = ["sched", "compare", convoy, "--cores", "1", "-p", "fcfs,rr,sjf", "-o", "json"]
        assert run([*argv, "--parallel", parallel]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]


def test_files_are_written_whole(
    convoy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    argv = ["sched", "simulate", convoy, "--cores", "1", "-p", "fcfs,srtf"]
    argv += ["--gantt", f"{out}/g.svg", "--cdf", f"{out}/c.svg", "--html", f"{out}/r.html"]
    assert run([*argv, "--per-job", f"{out}/j.csv", "--show", "gantt", "--show", "cdf"]) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == ["c.svg", "g-fcfs.svg", "g-srtf.svg", "j.csv", "r.html"]
    rows = list(csv.DictReader((out / "j.csv").open()))
    assert [(r["policy"], r["id"], r["waiting"]) for r in rows[:3]] == [
        ("fcfs", "a", "0"),
        ("fcfs", "b", "24"),
        ("fcfs", "c", "27"),
    ]
    assert "█" in capsys.readouterr().out


def test_jobs_as_json_lines(convoy: str, tmp_path: Path) -> None:
    where = tmp_path / "j.jsonl"
    argv = ["sched", "simulate", convoy, "--cores", "1", "-p", "sjf", "--per-job", str(where)]
    assert run(argv) == 0
    first = json.loads(where.read_text().splitlines()[0])
    assert (first["id"], first["finish"], first["bounded_slowdown"]) == ("b", 3, 1)


def test_a_generated_workload_is_written_and_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, table = tmp_path / "l.swf", tmp_path / "l.csv"
    assert run(["sched", "generate", "lublin:jobs=20,cores=32,seed=4", str(log)]) == 0
    assert run(["sched", "generate", str(log), str(table)]) == 0
    assert "20 jobs" in capsys.readouterr().out
    figures = []
    for name in (str(log), str(table), "lublin:jobs=20,cores=32,seed=4"):
        assert run(["sched", "simulate", name, "--cores", "32", "-p", "easy", "-o", "json"]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[0] == figures[1] == figures[2]


def test_a_generator_makes_jobs_for_the_machine_that_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["sched", "generate", "lublin", "--cores", "16", "--jobs", "30", "--to", "csv"]
    assert run(argv) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 30 and max(int(row["cores"]) for row in rows) <= 16
    assert run(["sched", "simulate", "lublin:jobs=30", "--cores", "16", "-p", "fcfs"]) == 0


def test_queues_are_one_more_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "q.csv"
    table.write_text("id,submit,runtime,queue\n1,0,5,batch\n2,0,5,day\n")
    argv = ["sched", "simulate", str(table), "--cores", "1", "-o", "json"]
    assert run([*argv, "--queue", "day=rr:quantum=1;weight=3", "--queue", "batch=fcfs"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["policy"], entry["jobs"]) == ("queues", 2)


def test_higher_numbers_can_be_the_more_urgent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "p.csv"
    table.write_text("id,submit,runtime,priority\n1,0,10,1\n2,0,1,5\n")
    argv = ["sched", "simulate", str(table), "--cores", "1", "-p", "priority", "-o", "json"]
    waits = []
    for more in ([], ["--high-priority-first"]):
        assert run([*argv, *more]) == 0
        waits.append(json.loads(capsys.readouterr().out)[0]["waiting"]["mean"])
    assert waits == [5, 0.5]


@pytest.mark.parametrize(
    ("more", "words", "code"),
    [
        (["-p", "fcfs"], "cores: the trace does not say", 1),
        (["-p", "fcfs", "--cores", "0"], "cores: must be above 0", 1),
        (["--cores", "1"], "policy: name at least one", 1),
        (["--cores", "1", "-p", "fcsf"], "did you mean fcfs", 1),
        (["--cores", "1", "-p", "rr:quantum=-1"], "policy rr.quantum", 1),
        (["--cores", "1", "-p", "fcfs", "--memory", "lots"], "memory: expected a size", 1),
        (["--cores", "1", "-p", "fcfs", "--estimator", "x"], "no such estimator", 1),
        (["--cores", "1", "-p", "fcfs", "--gantt", "x.gif"], "--gantt: expected a name in", 125),
        (["--cores", "1", "-p", "fcfs", "--html", "no/x.html"], "html: no such directory", 1),
        (["--cores", "1", "-p", "fcfs", "--window", "5"], "--window: expected FROM:TO", 125),
        (["--cores", "1", "-p", "fcfs", "--metric", "joy"], "--metric: no such metric", 125),
        (["--cores", "1", "-p", "fcfs", "-o", "xml"], "expected table, json or csv", 125),
        (["--cores", "1", "--queue", "a=rr;hue=1"], "queue a: no such setting", 1),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_written(
    convoy: str, capsys: pytest.CaptureFixture[str], more: list[str], words: str, code: int
) -> None:
    assert run(["sched", "simulate", convoy, *more]) == code
    captured = capsys.readouterr()
    assert words in captured.err and not captured.out


def test_a_job_that_never_fits_is_named_and_no_file_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "w.csv"
    table.write_text("id,submit,runtime,cores\n1,0,5,1\nwide,1,5,9\n")
    argv = ["sched", "simulate", str(table), "--cores", "4", "-p", "fcfs"]
    assert run([*argv, "--per-job", str(tmp_path / "j.csv")]) == 1
    assert "cores: job wide needs 9, there are 4" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["w.csv"]
    table.write_text("id,submit,runtime,memory\n1,0,5,2G\n")
    assert run([*argv, "--memory", "512M"]) == 1
    assert "memory: job 1 needs 2GiB, there are 512MiB" in capsys.readouterr().err


@pytest.mark.parametrize("row", ["1,0,1e308", "1,1e308,1e308", "1,0,99999999999999"])
def test_times_that_cannot_be_told_apart_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: str
) -> None:
    """Their sum is no number, or a turn adds nothing to it: the job would be lost."""
    table = tmp_path / "far.csv"
    table.write_text(f"id,submit,runtime\n0,0,1\n{row}\n")
    for policy in ("fcfs", "rr:quantum=0.001"):
        argv = ["sched", "simulate", str(table), "--cores", "1", "-p", policy, "-o", "json"]
        assert run(argv) == 1
        said = capsys.readouterr()
        assert "must be from 0 to 1e+12 seconds" in said.err and not said.out


def test_everything_that_can_be_named_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sched", "policies", "-o", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["Kind"] for row in rows} == {"policy", "estimator", "generator"}
    names = {row["Name"] for row in rows}
    assert {"conservative", "stride", "last-two", "lublin"} <= names
