"""What is asked of jobs, and files of them: read, checked, and refused with the field."""

from __future__ import annotations

from typing import Any

import pytest

from hutch.engine.jobs.records import Condition, Dependency
from hutch.engine.jobs.request import read_array, read_dependencies, read_request
from hutch.engine.jobs.specfile import read_jobs
from hutch.errors import InvalidArgument, NotFound

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "indices"),
    [
        (None, ()),
        (3, (0, 1, 2)),
        ("0-3", (0, 1, 2, 3)),
        ("1-9:4", (1, 5, 9)),
        ("7,1,7-8", (7, 1, 8)),
        ([4, 2], (4, 2)),
    ],
)
def test_an_array_is_a_count_a_list_or_ranges(text: Any, indices: tuple[int, ...]) -> None:
    assert read_array(text, "array") == indices


@pytest.mark.parametrize(
    "text", ["", "x", "3-1", "1-", "1-5:0", "0-99999999", 0, -1, [-1], "9" * 40, "1-2-3"]
)
def test_what_is_no_array_is_refused(text: Any) -> None:
    with pytest.raises(InvalidArgument, match="array"):
        read_array(text, "array")


def test_dependencies_name_a_job_and_how_it_must_have_ended() -> None:
    assert read_dependencies(["7", 8, "9:any"], "after") == (
        Dependency(job=7),
        Dependency(job=8),
        Dependency(job=9, condition=Condition.ANY),
    )


@pytest.mark.parametrize("value", ["x", "7:perhaps", "-1", "1.5", "²", ["7", "1" * 20]])
def test_what_is_no_dependency_is_refused(value: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"after\["):
        read_dependencies(value, "after")


def test_a_request_has_defaults_and_leaves_the_instance_its_options() -> None:
    request = read_request({"memory": "1g", "env": ["A=1"], "estimate": "90s"}, owner="ada")
    assert (request.queue, request.cores, request.memory) == ("default", 1.0, 1 << 30)
    assert (request.estimate_s, request.owner) == (90.0, "ada")
    assert request.options == {"memory": "1g", "env": ["A=1"], "cpus": 1.0}


def test_a_file_may_hold_one_job_or_many_with_defaults() -> None:
    one = read_jobs(b"image: busybox\ncommand: [echo, hi]\nqueue: nightly\n")
    assert [(w.image, w.command, w.options) for w in one] == [
        ("busybox", ["echo", "hi"], {"queue": "nightly"})
    ]
    many = read_jobs(b"defaults: {image: a, cpus: 2}\njobs: [{command: x}, {image: b}]\n")
    assert [(w.image, w.command, w.options) for w in many] == [
        ("a", "x", {"cpus": 2}),
        ("b", None, {"cpus": 2}),
    ]


def test_a_matrix_makes_a_job_of_each_combination() -> None:
    made = read_jobs(
        b"image: 'app:{version}'\ncommand: run --rate {rate} ${HOME} {x}\n"
        b"matrix: {version: [1, 2], rate: [0.1]}\nenv: {R: '{rate}'}\n"
    )
    assert [(w.image, w.command, w.options["env"]) for w in made] == [
        ("app:1", "run --rate 0.1 ${HOME} {x}", {"R": "0.1"}),
        ("app:2", "run --rate 0.1 ${HOME} {x}", {"R": "0.1"}),
    ]


def test_dependencies_in_a_file_are_names_or_numbers() -> None:
    made = read_jobs(b"[{image: a, name: x}, {image: a, after: {x: any, 7: ok}}]")
    assert made[1].after_names == (("x", "any"),)
    assert made[1].options["after"] == ["7:ok"]


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (b"", "jobs[0]"),
        (b"[]", "jobs"),
        (b"- image: a\n  comand: x\n", "jobs[0].comand"),
        (b"jobs: [{image: a}]\nqueue: x\n", "queue"),
        (b"command: x\n", "jobs[0].image"),
        (b"image: a\nmatrix: {x: 1}\n", "jobs[0].matrix.x"),
        (b"image: a\nafter: {x: perhaps}\n", "jobs[0].after.x"),
        (b"image: [\n", "line 2"),
        (b"image: !!python/object:os.system {}\n", "jobs"),
        (b"\xff\xfe\x00", "jobs"),
    ],
)
def test_a_bad_file_is_refused_by_its_field(text: bytes, field: str) -> None:
    with pytest.raises((InvalidArgument, NotFound)) as caught:
        read_jobs(text)
    assert field in str(caught.value)
