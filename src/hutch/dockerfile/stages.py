"""Which stages a build needs, and upon what each stands."""

from __future__ import annotations

import msgspec

from hutch.dockerfile import model
from hutch.dockerfile.mounts import mount_source
from hutch.dockerfile.scopes import Arguments
from hutch.dockerfile.source import SourceError
from hutch.dockerfile.words import expand

__all__ = ["Plan", "StagePlan", "plan_stages"]


class StagePlan(msgspec.Struct, frozen=True, kw_only=True):
    """A stage to be built: upon another (`parent`, its index) or upon an image (`image`;
    `scratch` is none). `needs` are the indices of all stages that it reads."""

    stage: model.Stage
    image: str = ""
    parent: int = -1
    platform: str = ""
    needs: tuple[int, ...] = ()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The stages to be built, in the order of the file; `target` is the index of the last."""

    stages: tuple[StagePlan, ...]
    target: int


def plan_stages(dockerfile: model.Dockerfile, arguments: Arguments, target: str = "") -> Plan:
    """Return what has to be built for the stage called `target` (its name or number; "": the
    last one). Raises `SourceError`."""
    plans: list[StagePlan] = []
    names: dict[str, int] = {}
    for stage in dockerfile.stages:
        try:
            later = {other.name for other in dockerfile.stages[stage.index :] if other.name}
            plans.append(_plan(stage, names, later, arguments, dockerfile.directives.escape))
        except SourceError as error:
            if not error.first:
                error.first = stage.base.statement.first
                error.last = stage.base.statement.last
            raise
        if stage.name:
            names[stage.name] = stage.index
    goal = _target(target, names, len(plans))
    return Plan(stages=tuple(plans[index] for index in sorted(_closure(plans, goal))), target=goal)


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


def _plan(
    stage: model.Stage,
    names: dict[str, int],
    later: set[str],
    arguments: Arguments,
    escape: str,
) -> StagePlan:
    env = arguments.for_from()
    image = expand(stage.base.image, env, escape=escape)
    platform = expand(stage.base.platform, env, escape=escape)
    if not image:
        raise SourceError(
            f"FROM {stage.base.image[:60]}: the name of the image is empty",
            hint="give the ARG before FROM a default, or use --build-arg",
        )
    parent = names.get(image.lower(), -1)
    needs = {parent} if parent >= 0 else set()
    for instruction in stage.instructions:
        for source in _sources(instruction):
            index = _stage_index(source, names, stage.index)
            if index is not None:
                needs.add(index)
            elif source.lower() in later:
                itself = source.lower() == stage.name
                raise SourceError(
                    f"stage {source!r} {'cannot read itself' if itself else 'comes later'}",
                    first=instruction.statement.first,
                    last=instruction.statement.last,
                    hint=None if itself else "a stage reads what stands above it: move it there",
                )
    return StagePlan(
        stage=stage,
        image="" if parent >= 0 else image,
        parent=parent,
        platform=platform,
        needs=tuple(sorted(needs)),
    )


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
