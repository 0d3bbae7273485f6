"""Which stages a build needs, and upon what each stands."""

from __future__ import annotations

from collections.abc import Collection, Container
from heapq import heappop, heappush
from itertools import pairwise

import msgspec

from hutch.dockerfile import model
from hutch.dockerfile.mounts import mount_source
from hutch.dockerfile.scopes import Arguments
from hutch.dockerfile.source import SourceError
from hutch.dockerfile.words import expand

__all__ = ["Plan", "StagePlan", "plan_stages"]


class StagePlan(msgspec.Struct, frozen=True, kw_only=True):
    """A stage to be built: upon another (`parent`, its index) or upon an image (`image`;
    `scratch` is none). `needs` are the indices of all stages that it reads. A stage that is
    `replaced` is what a context of its name has: nothing of it is built."""

    stage: model.Stage
    image: str = ""
    parent: int = -1
    platform: str = ""
    needs: tuple[int, ...] = ()
    replaced: bool = False


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The stages to be built, each after those that it needs, and else in the order of the
    file; `target` is the index of the one that is wanted."""

    stages: tuple[StagePlan, ...]
    target: int


Readers = dict[tuple[int, int], model.Statement]
"""Which instruction makes a stage read another."""


def plan_stages(
    dockerfile: model.Dockerfile,
    arguments: Arguments,
    target: str = "",
    contexts: Container[str] = (),
) -> Plan:
    """Return what has to be built for the stage called `target` (its name or number; "": the
    last one). A stage that has the name of one of the contexts is that. Raises `SourceError`.
    """
    plans: list[StagePlan] = []
    above: dict[str, int] = {}
    names = {stage.name: stage.index for stage in dockerfile.stages if stage.name}
    readers: Readers = {}
    for stage in dockerfile.stages:
        try:
            if stage.name and stage.name in contexts:
                base, needs = _replaced(stage), set()
            else:
                base = _base(stage, above, arguments, dockerfile.directives.escape)
                needs = _needs(stage, names, len(dockerfile.stages), readers)
        except SourceError as error:
            if not error.first:
                error.first = stage.base.statement.first
                error.last = stage.base.statement.last
            raise
        if base.parent >= 0:
            needs.add(base.parent)
        plans.append(msgspec.structs.replace(base, needs=tuple(sorted(needs))))
        if stage.name:
            above[stage.name] = stage.index
    goal = _target(target, names, len(plans))
    order = _ordered(plans, _closure(plans, goal), readers)
    return Plan(stages=tuple(plans[index] for index in order), target=goal)


def _target(target: str, names: dict[str, int], count: int) -> int:
    if not target:
        return count - 1
    index = _stage_index(target, names, count)
    if index is None:
        known = ", ".join(sorted(names)) or "none has a name"
        raise SourceError(f"target stage {target[:60]!r} is not there", hint=f"stages: {known}")
    return index


def _stage_index(name: str, names: dict[str, int], count: int) -> int | None:
    if name.lower() in names:
        return names[name.lower()]
    if name.isascii() and name.isdigit() and len(name) < 6 and int(name) < count:
        return int(name)
    return None


def _replaced(stage: model.Stage) -> StagePlan:
    """Return the plan of a stage that a context stands for: without its instructions."""
    return StagePlan(
        stage=msgspec.structs.replace(stage, instructions=()), image=stage.name, replaced=True
    )


def _base(
    stage: model.Stage, above: dict[str, int], arguments: Arguments, escape: str
) -> StagePlan:
    """Return upon what a stage stands: a stage above it, or an image."""
    env = arguments.for_from()
    image = expand(stage.base.image, env, escape=escape)
    platform = expand(stage.base.platform, env, escape=escape)
    if not image:
        raise SourceError(
            f"FROM {stage.base.image[:60]}: the name of the image is empty",
            hint="give the ARG before FROM a default, or use --build-arg",
        )
    parent = above.get(image.lower(), -1)
    return StagePlan(
        stage=stage, image="" if parent >= 0 else image, parent=parent, platform=platform
    )


def _needs(stage: model.Stage, names: dict[str, int], count: int, readers: Readers) -> set[int]:
    """Return the stages that the instructions of a stage read, wherever they stand."""
    needs = set()
    for instruction in stage.instructions:
        for source in _sources(instruction):
            index = _stage_index(source, names, count)
            if index is not None:
                needs.add(index)
                readers.setdefault((stage.index, index), instruction.statement)
    return needs


def _sources(instruction: model.Instruction) -> list[str]:
    """Return the stages or images that an instruction reads."""
    if isinstance(instruction, model.Copy) and instruction.source:
        if "$" in instruction.source:
            raise SourceError(
                "COPY --from takes no variables",
                first=instruction.statement.first,
                last=instruction.statement.last,
                hint="name a stage with FROM ${…} AS name, and that one here",
            )
        return [instruction.source]
    if isinstance(instruction, model.Run):
        try:
            found = [mount_source(text) for text in instruction.mounts]
        except SourceError as error:
            error.first = error.first or instruction.statement.first
            error.last = instruction.statement.last
            raise
        return [source for source in found if source]
    return []


def _closure(plans: list[StagePlan], goal: int) -> set[int]:
    found: set[int] = set()
    pending = [goal]
    while pending:
        index = pending.pop()
        if index not in found:
            found.add(index)
            pending += plans[index].needs
    return found


def _ordered(plans: list[StagePlan], wanted: set[int], readers: Readers) -> list[int]:
    """Return indices such that each comes after those that it needs; the lowest goes first."""
    left = {index: len(plans[index].needs) for index in wanted}
    needed_by: dict[int, list[int]] = {}
    for index in wanted:
        for need in plans[index].needs:
            needed_by.setdefault(need, []).append(index)
    ready = sorted(index for index, count in left.items() if not count)
    order = []
    while ready:
        index = heappop(ready)
        order.append(index)
        del left[index]
        for reader in needed_by.get(index, ()):
            left[reader] -= 1
            if not left[reader]:
                heappush(ready, reader)
    if left:
        raise _circle(plans, left.keys(), readers)
    return order


def _circle(plans: list[StagePlan], left: Collection[int], readers: Readers) -> SourceError:
    """Return an error that names stages of which each reads the next."""
    path = [min(left)]
    while path.count(path[-1]) < 2:
        path.append(next(need for need in plans[path[-1]].needs if need in left))
    circle = path[path.index(path[-1]) :]
    names = [repr(plans[index].stage.name or str(index)) for index in circle]
    if len(circle) == 2:
        text = f"stage {names[0]} cannot read itself"
    else:
        text = f"stages read each other: {' reads '.join(names)}"
    edge = next(edge for edge in pairwise(circle) if edge in readers)
    statement = readers[edge]
    return SourceError(text, first=statement.first, last=statement.last)
