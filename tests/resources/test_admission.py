"""Whether there is room, and what is said where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from hutch.engine import Engine
from hutch.errors import InvalidArgument
from hutch.resources.admission import NoRoom, decide
from hutch.resources.demand import Demand, Holding, demand_of
from hutch.resources.inventory import Cpu, HugePages, Inventory, Node, Room
from hutch.resources.settings import (
    Overcommit,
    Reserved,
    Settings,
    load_settings,
    save_settings,
    with_values,
)
from hutch.spec.build import ImageDefaults, build

GIB = 1 << 30
HOST = Inventory(
    cpus=tuple(Cpu(id=n, core=n, cache=0, node=0, package=0) for n in range(4)),
    nodes=(Node(id=0, cpus=(0, 1, 2, 3), memory=4 * GIB, free=GIB),),
    memory=4 * GIB + (64 << 20),  # of which the huge pages are not given out otherwise
    available=GIB,
    huge=(HugePages(size=2 << 20, total=32, free=32),),
    rooms=(Room(path="/", total=100 * GIB, free=50 * GIB),),
)
ONCE = Settings(overcommit=Overcommit(memory=1.0, cpus=1.0, disk=1.0))


def held(name: str, **what: object) -> Holding:
    return Holding(id=name * 8, name=name, **what)  # type: ignore[arg-type]


def explain(settings: Settings, holdings: Sequence[Holding], **demand: object) -> str:
    decision = decide(HOST, settings, holdings, Demand(**demand))  # type: ignore[arg-type]
    assert not decision.fits
    return decision.explain()


def test_nothing_is_refused_where_nothing_is_configured() -> None:
    many = [held("a", memory=90 * GIB, cpus=64.0, disk=10**15)]
    assert decide(HOST, Settings(), many, Demand(memory=99 * GIB, cpus=99.0, disk=10**15)).fits


def test_a_refusal_says_what_is_short_who_has_it_and_what_helps() -> None:
    holdings = [held("web", memory=2 * GIB), held("db", memory=GIB), held("idle", cpus=1.0)]
    decision = decide(HOST, ONCE, holdings, Demand(memory=2 * GIB))
    assert decision.explain() == ("memory: needs 2GiB; 1GiB free of 4GiB: 3GiB held by web and db")
    error = NoRoom("big", decision)
    assert error.message.startswith("no room for big: memory: needs 2GiB")
    assert error.hint == "fits if db ends or --memory is at most 1GiB"
    assert error.decision.shortages[0].free == GIB


def test_the_fewest_that_must_end_are_named() -> None:
    holdings = [held(name, memory=GIB // 2) for name in "abcdefgh"]
    decision = decide(HOST, ONCE, holdings, Demand(memory=3 * GIB))
    assert decision.shortages[0].cures == ("a, b, c, d and 2 more end",)
    assert "4GiB held by a, b, c, d and 4 more" in decision.explain()


def test_what_the_host_keeps_is_not_given_out() -> None:
    kept = Settings(reserved=Reserved(memory=GIB, cpus=1.0))
    assert decide(HOST, kept, [], Demand(memory=3 * GIB, cpus=3.0)).fits
    assert "4GiB; 3GiB free of 3GiB" in explain(kept, [], memory=4 * GIB)
    assert "cpus: needs 3.5; 3 free of 3" in explain(kept, [], cpus=3.5)


def test_overcommitment_counts_for_each_by_itself() -> None:
    twice = Settings(overcommit=Overcommit(memory=2.0))
    assert decide(HOST, twice, [held("a", memory=6 * GIB)], Demand(memory=2 * GIB, cpus=99.0)).fits
    assert "8GiB" in explain(twice, [held("a", memory=7 * GIB)], memory=2 * GIB)


def test_all_instances_together_have_what_the_root_has() -> None:
    bounded = Settings(memory=GIB)
    assert "1GiB free of 1GiB" in explain(bounded, [], memory=2 * GIB)


def test_several_shortages_are_all_told() -> None:
    text = explain(ONCE, [held("a", cpus=4.0)], memory=5 * GIB, cpus=1.0, disk=101 * GIB)
    assert [part.partition(":")[0] for part in text.split("; ") if ": needs" in part] == [
        "memory",
        "cpus",
        "disk",
    ]


def test_processors_of_ones_own_do_not_need_configuration() -> None:
    decision = decide(HOST, Settings(), [], Demand(exclusive=2))
    assert decision.fits and decision.cpus == (1, 2)
    holdings = [held("a", exclusive=(1, 2)), held("b", pinned=(3,))]
    assert "exclusive cpus: needs 2; 0 free of 3: 3 held by a and b" in explain(
        Settings(), holdings, exclusive=2
    )


def test_named_processors_that_are_somebody_elses() -> None:
    text = explain(Settings(), [held("a", exclusive=(1,))], pinned=(1, 2))
    assert text.startswith("cpuset_cpus: needs 2; 1 free of 4 (processors that are somebody's")


def test_huge_pages_and_devices_are_never_given_twice() -> None:
    big = held("a", huge={2 << 20: 48 << 20}, devices=("vfio=0000:01:00.0",))
    assert decide(HOST, Settings(), [big], Demand(huge={2 << 20: 16 << 20})).fits
    text = explain(Settings(), [big], huge={2 << 20: 32 << 20})
    assert "huge pages of 2MiB: needs 32MiB; 16MiB free of 64MiB: 48MiB held by a" in text
    assert "1GiB free" not in explain(Settings(), [], huge={1 << 30: 1 << 30})
    assert "held by a" in explain(Settings(), [big], devices=("vfio=0000:01:00.0",))


# ---- what a specification needs ---------------------------------------------------------


def needs(settings: Settings | None = None, **options: object) -> Demand:
    spec = build("i", ImageDefaults(), ["true"], **options)  # type: ignore[arg-type]
    return demand_of(spec, settings or Settings())


def test_memory_is_the_reservation_else_the_limit() -> None:
    assert needs().memory == 0
    assert needs(memory="1G").memory == GIB
    assert needs(memory="1G", memory_reservation="256M").memory == 256 << 20
    assert needs(memory="1G", memory_reservation="64M", memory_min="128M").memory == 128 << 20


def test_a_machine_needs_its_memory_and_qemus() -> None:
    assert needs(isolation="vm").memory == (512 + 128) << 20
    assert needs(isolation="vm", memory="1G", cpus=2).cpus == 2.0


def test_a_machines_huge_pages_are_all_of_its_memory_and_counted_apart() -> None:
    found = needs(isolation="vm", memory="256M", placement="huge=2M")
    assert found.huge == {2 << 20: 256 << 20} and found.memory == 128 << 20
    for placement in ("huge=2M:128M", "huge=1G", "huge=2M,huge=1G"):
        with pytest.raises(InvalidArgument, match=r"placement\.huge"):
            needs(isolation="vm", memory="256M", placement=placement)
    with pytest.raises(InvalidArgument, match=r"placement\.huge"):
        needs(placement="huge=2M")


def test_processor_time_from_either_way_of_saying_it() -> None:
    assert needs(cpus=1.5).cpus == 1.5
    assert needs(cpu_quota=50_000).cpus == 0.5


def test_the_static_policy_gives_whole_processors_to_who_is_bounded() -> None:
    static = Settings(cpu_policy="static")
    assert needs(static, cpus=2, memory="1G").exclusive == 2
    assert needs(static, cpus=2).exclusive == 0
    assert needs(static, cpus=1.5, memory="1G").exclusive == 0
    assert needs(static, cpus=2, memory="1G", placement="cpus=shared").exclusive == 0
    assert needs(static, cpus=1, memory="1G", cpuset_cpus="0").exclusive == 0


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"cpus": 1.5}, "placement.cpus"),
        ({}, "placement.cpus"),
        ({"cpus": 1, "cpuset_cpus": "0"}, "placement.cpus"),
    ],
)
def test_exclusive_processors_are_whole(options: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        needs(None, placement="cpus=exclusive", **options)
    assert caught.value.field == field


# ---- settings -----------------------------------------------------------------------------


def test_settings_are_changed_by_name_and_put_back() -> None:
    changed = with_values(
        Settings(), {"reserved.memory": "2G", "overcommit.cpus": "4", "ladder": "cache, kill"}
    )
    assert changed.reserved.memory == 2 * GIB and changed.overcommit.cpus == 4.0
    assert changed.ladder == ("cache", "kill") and changed.admits
    back = with_values(
        changed, {"reserved.memory": "none", "overcommit.cpus": "none", "ladder": "none"}
    )
    assert back == Settings() and not back.admits


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nothing", "1"),
        ("reserved", "1"),
        ("reserved.memory", "-1"),
        ("reserved.cpus", "two"),
        ("reserved.cpus", "-1"),
        ("reserved.cpus", "nan"),
        ("overcommit.memory", "0"),
        ("watermarks.low", "0.9"),
        ("ladder", "cache,cache"),
        ("ladder", "shout"),
        ("parent", "../x"),
        ("fit", "loose"),
        ("idle_s", "soon"),
    ],
)
def test_a_wrong_setting_is_named(name: str, text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        with_values(Settings(), {name: text})
    assert (caught.value.field or "").startswith(name.partition(".")[0])


def test_a_choice_that_there_is_not_is_told_what_there_is() -> None:
    with pytest.raises(InvalidArgument, match="fit: expected one of first, best, worst, pack"):
        with_values(Settings(), {"fit": "loose"})


@pytest.mark.parametrize("name", ["memory", "cpus", "disk"])
def test_the_host_cannot_keep_all_that_it_has(tmp_path: Path, name: str) -> None:
    with Engine(tmp_path / "root") as engine:
        with pytest.raises(InvalidArgument, match=f"reserved.{name}: leaves nothing"):
            engine.resources.configure({f"reserved.{name}": "99999" + "T" * (name != "cpus")})
        assert engine.resources.settings == Settings()


@pytest.mark.parametrize("text", ["{", "[]", '{"reserved": {"memory": -1}}', '{"unknown": 1}'])
def test_a_wrong_file_of_settings_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "resources.json").write_text(text)
    with pytest.raises(InvalidArgument, match=r"resources\.json"):
        load_settings(tmp_path)


def test_settings_are_kept_and_read_again(tmp_path: Path) -> None:
    changed = with_values(Settings(), {"memory": "1G", "parent": "a/b", "cdi": "/x,/y"})
    save_settings(tmp_path, changed)
    assert load_settings(tmp_path) == changed
    assert [path.name for path in tmp_path.iterdir()] == ["resources.json"]
