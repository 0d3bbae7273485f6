"""What a Dockerfile says, as data: statements as they stand there, instructions as they mean."""

from __future__ import annotations

import msgspec

__all__ = [
    "Arg",
    "Command",
    "Copy",
    "Directives",
    "Dockerfile",
    "Env",
    "Expose",
    "From",
    "Healthcheck",
    "Heredoc",
    "Instruction",
    "Label",
    "Maintainer",
    "OnBuild",
    "Run",
    "Shell",
    "Stage",
    "Statement",
    "StopSignal",
    "User",
    "Volume",
    "Workdir",
]


class Heredoc(msgspec.Struct, frozen=True, kw_only=True):
    """A document in the Dockerfile; `expand` where its mark was not quoted, `tag` as a whole
    (`<<-EOF`) for the text of a command."""

    name: str
    content: str
    expand: bool
    strip_tabs: bool = False
    fd: str = ""


class Statement(msgspec.Struct, frozen=True, kw_only=True):
    """One instruction as it is written: lines `first` to `last` (from 1), continuations joined."""

    keyword: str
    flags: tuple[str, ...]
    text: str
    heredocs: tuple[Heredoc, ...]
    first: int
    last: int
    written: str


class Instruction(msgspec.Struct, frozen=True, kw_only=True):
    """What every instruction has: where it stands."""

    statement: Statement


class From(Instruction, frozen=True, kw_only=True):
    """FROM: a stage begins upon an image or another stage."""

    image: str
    platform: str = ""
    name: str = ""


class Command(Instruction, frozen=True, kw_only=True):
    """CMD or ENTRYPOINT: `argv` of the JSON form, or `line` for the shell."""

    keyword: str
    argv: tuple[str, ...] | None = None
    line: str = ""


class Run(Instruction, frozen=True, kw_only=True):
    """RUN; `mounts` are the values of --mount as written."""

    argv: tuple[str, ...] | None = None
    line: str = ""
    heredocs: tuple[Heredoc, ...] = ()
    mounts: tuple[str, ...] = ()
    network: str = ""
    isolation: str = ""


class Copy(Instruction, frozen=True, kw_only=True):
    """COPY, or ADD with `add`. `unpack` is ADD's --unpack, None where it is not given."""

    sources: tuple[str, ...]
    destination: str
    heredocs: tuple[Heredoc, ...] = ()
    add: bool = False
    source: str = ""
    chown: str = ""
    chmod: str = ""
    link: bool = False
    parents: bool = False
    exclude: tuple[str, ...] = ()
    checksum: str = ""
    keep_git_dir: bool = False
    unpack: bool | None = None


class Env(Instruction, frozen=True, kw_only=True):
    """ENV."""

    pairs: tuple[tuple[str, str], ...]


class Label(Instruction, frozen=True, kw_only=True):
    """LABEL."""

    pairs: tuple[tuple[str, str], ...]


class Arg(Instruction, frozen=True, kw_only=True):
    """ARG; a default of None is none."""

    pairs: tuple[tuple[str, str | None], ...]


class User(Instruction, frozen=True, kw_only=True):
    """USER."""

    user: str


class Workdir(Instruction, frozen=True, kw_only=True):
    """WORKDIR."""

    path: str


class Expose(Instruction, frozen=True, kw_only=True):
    """EXPOSE."""

    ports: tuple[str, ...]


class Volume(Instruction, frozen=True, kw_only=True):
    """VOLUME."""

    paths: tuple[str, ...]


class StopSignal(Instruction, frozen=True, kw_only=True):
    """STOPSIGNAL."""

    signal: str


class Shell(Instruction, frozen=True, kw_only=True):
    """SHELL."""

    argv: tuple[str, ...]


class Healthcheck(Instruction, frozen=True, kw_only=True):
    """HEALTHCHECK: `test` as the image's configuration has it, durations in nanoseconds."""

    test: tuple[str, ...]
    options: tuple[tuple[str, int], ...] = ()


class OnBuild(Instruction, frozen=True, kw_only=True):
    """ONBUILD: an instruction for the builds upon this image."""

    trigger: str


class Maintainer(Instruction, frozen=True, kw_only=True):
    """MAINTAINER."""

    name: str


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """A stage: its FROM and what follows. `name` is in small letters, "" for none."""

    index: int
    name: str
    base: From
    instructions: tuple[Instruction, ...]


class Directives(msgspec.Struct, frozen=True, kw_only=True):
    """The parser directives at the top."""

    escape: str = "\\"
    syntax: str = ""
    skipped_checks: tuple[str, ...] = ()
    checks_are_errors: bool = False


class Dockerfile(msgspec.Struct, frozen=True, kw_only=True):
    """A Dockerfile, parsed: ARGs before the first FROM, then stages."""

    lines: tuple[str, ...]
    directives: Directives
    arguments: tuple[Arg, ...]
    stages: tuple[Stage, ...]
    joined_over_blank: tuple[int, ...] = ()
