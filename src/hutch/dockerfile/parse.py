"""Turn statements into instructions, and a Dockerfile into stages."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import msgspec

from hutch.decoding import decode_json
from hutch.dockerfile import model
from hutch.dockerfile.lines import decode, read_statement, read_statements
from hutch.dockerfile.model import Dockerfile, Instruction, Stage, Statement
from hutch.dockerfile.source import SourceError
from hutch.dockerfile.words import split_words
from hutch.errors import InvalidArgument

__all__ = ["parse_dockerfile", "parse_instruction", "parse_trigger"]

_STAGE_NAME = re.compile(r"[a-z][a-z0-9-_.]*")
_BOOLEANS = {"": True, "true": True, "1": True, "false": False, "0": False}
_DURATIONS = {
    "interval": "Interval",
    "timeout": "Timeout",
    "start-period": "StartPeriod",
    "start-interval": "StartInterval",
}


def parse_dockerfile(data: bytes, name: str = "Dockerfile") -> Dockerfile:
    """Parse a Dockerfile; raise `SourceError` that points at the line."""
    text = decode(data, name)
    lines = tuple(text.split("\n"))
    try:
        directives, statements, blanks = read_statements(text)
        arguments, stages = _stages(statements, directives.escape)
    except SourceError as error:
        raise error.locate(name, lines) from error.__cause__
    return Dockerfile(
        lines=lines,
        directives=directives,
        arguments=tuple(arguments),
        stages=tuple(stages),
        joined_over_blank=tuple(blanks),
    )


def _stages(statements: Sequence[Statement], escape: str) -> tuple[list[model.Arg], list[Stage]]:
    arguments: list[model.Arg] = []
    stages: list[Stage] = []
    base: model.From | None = None
    body: list[Instruction] = []
    for statement in statements:
        instruction = parse_instruction(statement, escape)
        if isinstance(instruction, model.From):
            if base is not None:
                stages.append(_stage(len(stages), base, body))
            base, body = instruction, []
        elif base is not None:
            body.append(instruction)
        elif isinstance(instruction, model.Arg):
            arguments.append(instruction)
        else:
            raise SourceError(
                f"no stage yet: {statement.keyword} comes before FROM",
                first=statement.first,
                last=statement.last,
                hint="begin with FROM; only ARG may stand before it",
            )
    if base is None:
        raise SourceError("there is no FROM: nothing to build")
    return arguments, [*stages, _stage(len(stages), base, body)]


def _stage(index: int, base: model.From, body: list[Instruction]) -> Stage:
    return Stage(index=index, name=base.name, base=base, instructions=tuple(body))


def parse_instruction(statement: Statement, escape: str = "\\") -> Instruction:
    """Return what a statement means, nothing expanded yet."""
    parser = _PARSERS.get(statement.keyword)
    try:
        if parser is None:
            raise SourceError(
                f"unknown instruction {statement.keyword[:40]!r}", hint=_near(statement.keyword)
            )
        if not statement.text and not statement.flags and statement.keyword != "CMD":
            raise SourceError(f"{statement.keyword} needs an argument")
        return parser(statement, _Flags(statement), escape)
    except SourceError as error:
        if not error.first:
            error.first, error.last = statement.first, statement.last
        raise


def parse_trigger(text: str, escape: str = "\\") -> Instruction:
    """Return the instruction of an ONBUILD of a base image, which has no lines."""
    head, newline, _ = text.partition("\n")
    if newline and "<<" in head:
        _, statements, _ = read_statements(text)
        if len(statements) != 1:
            raise SourceError(f"ONBUILD: expected one instruction, got {text[:60]!r}")
        statement = msgspec.structs.replace(statements[0], first=0, last=0)
    else:
        keyword, flags, words = read_statement(text, escape)
        statement = Statement(
            keyword=keyword, flags=flags, text=words, heredocs=(), first=0, last=0, written=text
        )
    if statement.keyword in ("ONBUILD", "FROM", "MAINTAINER"):
        raise SourceError(f"ONBUILD {statement.keyword} is not allowed")
    return parse_instruction(statement, escape)


def _near(keyword: str) -> str | None:
    from difflib import get_close_matches

    near = get_close_matches(keyword, list(_PARSERS), 1)
    return f"did you mean {near[0]}?" if near else None


class _Flags:
    """The flags of a statement, taken one by one; what is left is unknown."""

    def __init__(self, statement: Statement) -> None:
        self._keyword = statement.keyword
        self._given: list[tuple[str, str, bool]] = []
        for flag in statement.flags:
            name, equals, value = flag[2:].partition("=")
            self._given.append((name, value, bool(equals)))

    def every(self, name: str) -> tuple[str, ...]:
        found = tuple(value for key, value, _ in self._given if key == name)
        for key, _, has_value in self._given:
            if key == name and not has_value:
                raise SourceError(f"{self._keyword} --{name} needs a value: --{name}=…")
        self._given = [given for given in self._given if given[0] != name]
        return found

    def text(self, name: str) -> str:
        found = self.every(name)
        if len(found) > 1:
            raise SourceError(f"{self._keyword} --{name} is given more than once")
        return found[0] if found else ""

    def boolean(self, name: str) -> bool | None:
        found = [value for key, value, _ in self._given if key == name]
        self._given = [given for given in self._given if given[0] != name]
        if not found:
            return None
        if found[-1].lower() not in _BOOLEANS:
            raise SourceError(f"{self._keyword} --{name}: expected true or false")
        return _BOOLEANS[found[-1].lower()]

    def done(self) -> None:
        if self._given:
            raise SourceError(
                f"{self._keyword}: unknown flag --{self._given[0][0][:40]}",
                hint="see docs/reference/dockerfile.md for what is known",
            )


def _json(text: str) -> tuple[str, ...] | None:
    """Return a JSON list of strings, None where the text is for a shell."""
    if not text.startswith("["):
        return None
    try:
        found = decode_json(text.encode("utf-8", "surrogatepass"), list[str])
    except msgspec.ValidationError:
        raise SourceError("only strings are allowed in a list") from None
    except (msgspec.DecodeError, UnicodeError):
        return None
    return tuple(found)


def _fields(text: str) -> list[str]:
    return text.split()


def _pairs(statement: Statement, escape: str) -> tuple[tuple[str, str], ...]:
    words = split_words(statement.text, escape)
    if "=" not in words[0]:
        # The old form: one name, and its value up to the end of the line.
        name, _, value = statement.text.partition(" ")
        name, tab, more = name.partition("\t")
        value = f"{more} {value}" if tab and value else more or value
        if not value.strip():
            raise SourceError(f"{statement.keyword} needs two arguments: NAME=VALUE")
        return ((name, value.strip()),)
    pairs = []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise SourceError(
                f"{statement.keyword}: cannot read {word[:60]!r}",
                hint="write NAME=VALUE; a value with blanks goes in quotes",
            )
        if not name.strip("'\""):
            raise SourceError(f"{statement.keyword}: a name is empty")
        pairs.append((name, value))
    return tuple(pairs)


# ---- one function per instruction -------------------------------------------------------


def _from(statement: Statement, flags: _Flags, escape: str) -> model.From:
    platform = flags.text("platform")
    flags.done()
    words = _fields(statement.text)
    name = ""
    if len(words) == 3 and words[1].lower() == "as":
        name = words[2].lower()
        if not _STAGE_NAME.fullmatch(name):
            raise SourceError(
                f"invalid name of a stage: {words[2][:60]!r}",
                hint="it begins with a letter; letters, digits, '-', '_' and '.' follow",
            )
    elif len(words) != 1:
        raise SourceError("FROM takes an image, or an image AS a name")
    return model.From(statement=statement, image=words[0], platform=platform, name=name)


def _run(statement: Statement, flags: _Flags, escape: str) -> model.Run:
    mounts = flags.every("mount")
    network, security = flags.text("network"), flags.text("security")
    isolation = flags.text("isolation")
    devices = flags.every("device")
    flags.done()
    if network not in ("", "default", "none", "host"):
        raise SourceError(f"RUN --network: expected default, none or host, got {network[:40]!r}")
    if security not in ("", "sandbox"):
        raise SourceError(
            f"RUN --security={security[:40]}: a build has no more rights than a container",
            hint="leave it out, or do what needs them with `hutch run --privileged` and commit",
        )
    if isolation not in ("", "container", "vm"):
        raise SourceError(f"RUN --isolation: expected container or vm, got {isolation[:40]!r}")
    if devices:
        raise SourceError("RUN --device: a build is given no devices")
    if not statement.text:
        raise SourceError("RUN needs a command")
    argv = None if statement.heredocs else _json(statement.text)
    if argv == ():
        raise SourceError("RUN needs a command")
    return model.Run(
        statement=statement,
        argv=argv,
        line="" if argv is not None else statement.text,
        heredocs=statement.heredocs,
        mounts=mounts,
        network=network,
        isolation=isolation,
    )


def _command(statement: Statement, flags: _Flags, escape: str) -> model.Command:
    flags.done()
    argv = _json(statement.text)
    if not statement.text:
        argv = ()
    return model.Command(
        statement=statement,
        keyword=statement.keyword,
        argv=argv,
        line="" if argv is not None else statement.text,
    )


def _copy(statement: Statement, flags: _Flags, escape: str) -> model.Copy:
    add = statement.keyword == "ADD"
    common = {
        "chown": flags.text("chown"),
        "chmod": flags.text("chmod"),
        "exclude": flags.every("exclude"),
        "link": bool(flags.boolean("link")),
    }
    if add:
        own: dict[str, object] = {
            "checksum": flags.text("checksum"),
            "keep_git_dir": bool(flags.boolean("keep-git-dir")),
            "unpack": flags.boolean("unpack"),
        }
    else:
        own = {"source": flags.text("from"), "parents": bool(flags.boolean("parents"))}
    flags.done()
    listed = _json(statement.text)
    words = list(listed) if listed is not None else _fields(statement.text)
    if len(words) < 2:
        raise SourceError(
            f"{statement.keyword} needs at least two arguments: sources and a destination"
        )
    documents = {f"{h.fd}<<{'-' if h.strip_tabs else ''}{h.name}" for h in statement.heredocs}
    sources = [w for w in words[:-1] if w.replace("'", "").replace('"', "") not in documents]
    return msgspec.convert(
        {
            "statement": statement,
            "sources": tuple(sources),
            "destination": words[-1],
            "heredocs": statement.heredocs,
            "add": add,
            **common,
            **own,
        },
        model.Copy,
    )


def _env(statement: Statement, flags: _Flags, escape: str) -> model.Env:
    flags.done()
    return model.Env(statement=statement, pairs=_pairs(statement, escape))


def _label(statement: Statement, flags: _Flags, escape: str) -> model.Label:
    flags.done()
    return model.Label(statement=statement, pairs=_pairs(statement, escape))


def _arg(statement: Statement, flags: _Flags, escape: str) -> model.Arg:
    flags.done()
    pairs: list[tuple[str, str | None]] = []
    for word in split_words(statement.text, escape):
        name, equals, value = word.partition("=")
        if not name.strip("'\""):
            raise SourceError("ARG: a name is empty")
        pairs.append((name, value if equals else None))
    return model.Arg(statement=statement, pairs=tuple(pairs))


def _single(statement: Statement, flags: _Flags) -> str:
    flags.done()
    return statement.text


def _user(statement: Statement, flags: _Flags, escape: str) -> model.User:
    return model.User(statement=statement, user=_single(statement, flags))


def _workdir(statement: Statement, flags: _Flags, escape: str) -> model.Workdir:
    return model.Workdir(statement=statement, path=_single(statement, flags))


def _stopsignal(statement: Statement, flags: _Flags, escape: str) -> model.StopSignal:
    return model.StopSignal(statement=statement, signal=_single(statement, flags))


def _maintainer(statement: Statement, flags: _Flags, escape: str) -> model.Maintainer:
    return model.Maintainer(statement=statement, name=_single(statement, flags))


def _expose(statement: Statement, flags: _Flags, escape: str) -> model.Expose:
    flags.done()
    return model.Expose(statement=statement, ports=tuple(split_words(statement.text, escape)))


def _volume(statement: Statement, flags: _Flags, escape: str) -> model.Volume:
    flags.done()
    listed = _json(statement.text)
    paths = listed if listed is not None else tuple(_fields(statement.text))
    if not paths or not all(path.strip() for path in paths):
        raise SourceError("VOLUME: a path is empty")
    return model.Volume(statement=statement, paths=paths)


def _shell(statement: Statement, flags: _Flags, escape: str) -> model.Shell:
    flags.done()
    argv = _json(statement.text)
    if not argv:
        raise SourceError(
            "SHELL takes a JSON list of strings", hint='for example SHELL ["/bin/bash", "-c"]'
        )
    return model.Shell(statement=statement, argv=argv)


def _healthcheck(statement: Statement, flags: _Flags, escape: str) -> model.Healthcheck:
    options = []
    for name, key in _DURATIONS.items():
        if text := flags.text(name):
            options.append((key, _nanoseconds(text, name)))
    if text := flags.text("retries"):
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise SourceError(f"HEALTHCHECK --retries: expected a number, got {text[:20]!r}")
        options.append(("Retries", int(text)))
    flags.done()
    word, command = (*statement.text.split(maxsplit=1), "", "")[:2]
    if word.upper() == "NONE" and not command:
        return model.Healthcheck(statement=statement, test=("NONE",))
    if word.upper() != "CMD" or not command:
        raise SourceError("HEALTHCHECK takes NONE, or CMD and a command")
    listed = _json(command)
    test = ("CMD", *listed) if listed is not None else ("CMD-SHELL", command)
    return model.Healthcheck(statement=statement, test=test, options=tuple(options))


def _nanoseconds(text: str, name: str) -> int:
    from hutch.units import parse_duration

    try:
        seconds = parse_duration(text, field=f"HEALTHCHECK --{name}")
    except InvalidArgument as error:
        raise SourceError(error.message, hint=error.hint) from None
    if 0 < seconds < 0.001:
        raise SourceError(f"HEALTHCHECK --{name}: must be 0 or at least 1ms")
    return int(seconds * 1_000_000_000)


def _onbuild(statement: Statement, flags: _Flags, escape: str) -> model.OnBuild:
    flags.done()
    parts = [statement.text]
    for document in statement.heredocs:
        parts.append(document.content.rstrip("\n"))
        parts.append(document.name)
    trigger = "\n".join(parts)
    parse_trigger(trigger, escape)
    return model.OnBuild(statement=statement, trigger=trigger)


_PARSERS: dict[str, Callable[[Statement, _Flags, str], Instruction]] = {
    "ADD": _copy,
    "ARG": _arg,
    "CMD": _command,
    "COPY": _copy,
    "ENTRYPOINT": _command,
    "ENV": _env,
    "EXPOSE": _expose,
    "FROM": _from,
    "HEALTHCHECK": _healthcheck,
    "LABEL": _label,
    "MAINTAINER": _maintainer,
    "ONBUILD": _onbuild,
    "RUN": _run,
    "SHELL": _shell,
    "STOPSIGNAL": _stopsignal,
    "USER": _user,
    "VOLUME": _volume,
    "WORKDIR": _workdir,
}
