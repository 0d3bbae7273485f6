"""What is amiss in a Dockerfile without being wrong: Docker's build checks, by their names."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from hutch.dockerfile import model

__all__ = ["Finding", "check_dockerfile"]

_SECRET_WORDS = ("apikey", "auth", "credential", "credentials", "key", "password", "pword",
                 "passwd", "secret", "token")  # fmt: skip
_PUBLIC = ("public",)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One finding: the rule's name in Docker, the line, and what it is."""

    rule: str
    line: int
    message: str


def check_dockerfile(dockerfile: model.Dockerfile) -> list[Finding]:
    """Return what the checks find, by line; those that `# check=skip=` names are left out."""
    skipped = dockerfile.directives.skipped_checks
    if "all" in skipped:
        return []
    found = [*_lines(dockerfile), *_stages(dockerfile)]
    for stage in dockerfile.stages:
        found += _stage(stage)
    return sorted(
        (one for one in found if one.rule not in skipped), key=lambda one: (one.line, one.rule)
    )


def _lines(dockerfile: model.Dockerfile) -> Iterator[Finding]:
    for line in dockerfile.joined_over_blank:
        yield Finding(
            rule="NoEmptyContinuation",
            line=line,
            message="an empty line in a continued instruction",
        )
    statements = [
        instruction.statement
        for stage in dockerfile.stages
        for instruction in (stage.base, *stage.instructions)
    ]
    words = [s.written.split(None, 1)[0] for s in statements if s.written]
    majority = sum(word.isupper() for word in words) * 2 >= len(words)
    for statement, word in zip(statements, words, strict=False):
        if word != (word.upper() if majority else word.lower()):
            yield Finding(
                rule="ConsistentInstructionCasing",
                line=statement.first,
                message=f"{word!r} is not written as the other instructions are",
            )


def _stages(dockerfile: model.Dockerfile) -> Iterator[Finding]:
    seen: set[str] = set()
    for stage in dockerfile.stages:
        line = stage.base.statement.first
        words = stage.base.statement.text.split()
        if len(words) == 3:
            if words[2] != words[2].lower():
                yield Finding(
                    rule="StageNameCasing", line=line, message=f"{words[2]!r} has capitals"
                )
            keyword = stage.base.statement.written.split(None, 1)[0]
            if words[1].isupper() != keyword.isupper():
                yield Finding(
                    rule="FromAsCasing", line=line, message="FROM and AS differ in their case"
                )
        if stage.name in ("scratch", "context"):
            yield Finding(
                rule="ReservedStageName", line=line, message=f"{stage.name!r} means something else"
            )
        if stage.name and stage.name in seen:
            yield Finding(
                rule="DuplicateStageName", line=line, message=f"{stage.name!r} is there twice"
            )
        seen.add(stage.name)


def _stage(stage: model.Stage) -> Iterator[Finding]:
    counts = {"CMD": 0, "ENTRYPOINT": 0, "HEALTHCHECK": 0}
    workdir_known = False
    for instruction in stage.instructions:
        statement = instruction.statement
        line = statement.first
        if statement.keyword in counts:
            counts[statement.keyword] += 1
            if counts[statement.keyword] > 1:
                yield Finding(
                    rule="MultipleInstructionsDisallowed",
                    line=line,
                    message=f"only the last {statement.keyword} of a stage counts",
                )
        match instruction:
            case model.Maintainer():
                yield Finding(
                    rule="MaintainerDeprecated", line=line, message="use LABEL maintainer=…"
                )
            case model.Command(argv=None):
                yield Finding(
                    rule="JSONArgsRecommended",
                    line=line,
                    message=f"{statement.keyword} as a list lets signals reach the program",
                )
            case model.Workdir(path=path):
                if not path.startswith(("/", "$")) and not workdir_known:
                    yield Finding(
                        rule="WorkdirRelativePath",
                        line=line,
                        message=f"{path!r} counts from whatever the base image has",
                    )
                workdir_known = True
            case model.Env() | model.Label():
                yield from _pairs(instruction)
            case model.Arg(pairs=pairs):
                yield from _secrets([name for name, _ in pairs], line)


def _pairs(instruction: model.Env | model.Label) -> Iterator[Finding]:
    statement = instruction.statement
    if len(instruction.pairs) == 1 and not statement.text.startswith(f"{instruction.pairs[0][0]}="):
        yield Finding(rule="LegacyKeyValueFormat", line=statement.first, message="write NAME=VALUE")
    if isinstance(instruction, model.Env):
        yield from _secrets([name for name, _ in instruction.pairs], statement.first)


def _secrets(names: list[str], line: int) -> Iterator[Finding]:
    for name in names:
        words = name.lower().replace("-", "_").split("_")
        if any(word in _SECRET_WORDS for word in words) and not set(words) & set(_PUBLIC):
            yield Finding(
                rule="SecretsUsedInArgOrEnv",
                line=line,
                message=f"{name!r} stays in the image: use RUN --mount=type=secret",
            )
