"""Completion scripts for bash, zsh and fish, and the hidden command they ask."""

from __future__ import annotations

from hutch.cli.command import Command
from hutch.cli.main import GLOBAL_OPTIONS, group_of, load_command
from hutch.cli.options import UsageError
from hutch.cli.session import Invocation
from hutch.cli.table import ALIASES, GROUPS, HIDDEN, TABLE

__all__ = ["COMMANDS", "candidates"]

_SCRIPTS = {
    "bash": """\
# bash completion for hutch: source it, or put it into /etc/bash_completion.d/hutch
_hutch() {
    local IFS=$'\\n'
    COMPREPLY=($(compgen -W "$(hutch _complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)" \\
        -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _hutch hutch
""",
    "zsh": """\
#compdef hutch
# zsh completion for hutch: put it into a directory of $fpath as _hutch
_hutch() {
    local -a words_found
    words_found=("${(@f)$(hutch _complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    compadd -a words_found || _files
}
compdef _hutch hutch
""",
    "fish": """\
# fish completion for hutch: put it into ~/.config/fish/completions/hutch.fish
function __hutch_complete
    set -l words (commandline -opc) (commandline -ct)
    hutch _complete -- $words[2..-1] 2>/dev/null
end
complete -c hutch -a '(__hutch_complete)'
""",
}
_IMAGE_COMMANDS = frozenset(
    ("run", "create", "push", "tag", "rmi", "history", "save", "image rm", "image push",
     "image tag", "image save", "image history", "image inspect")
)  # fmt: skip
_INSTANCE_COMMANDS = frozenset(
    """start stop restart kill pause unpause rm wait rename update port top stats logs diff cp
    export commit inspect exec attach""".split()
)


def candidates(invocation: Invocation, words: list[str]) -> list[str]:
    """Return what may stand for the last of `words`."""
    *before, current = words or [""]
    plain = [word for word in before if not word.startswith("-")]
    if not plain:
        if current.startswith("-"):
            return [f"--{option[0]}" for option in GLOBAL_OPTIONS]
        firsts = {name.split()[0] for name in (*TABLE, *GROUPS) if name not in HIDDEN}
        return sorted(firsts)
    group = group_of(plain)
    depth = len(group.split())
    if group and depth == len(plain) and not current.startswith("-"):
        return _members(group)
    names = " ".join(plain[: depth + 1])
    names = ALIASES.get(names, names)
    if names not in TABLE and plain[0] == "container" and len(plain) > 1:
        names = plain[1]
    if names not in TABLE:
        return []
    if current.startswith("-"):
        return [f"--{option[0]}" for option in load_command(names).options] + ["--help"]
    return _objects(invocation, names, len(plain) - len(names.split()))


def _members(group: str) -> list[str]:
    if group == "container":
        return sorted(_INSTANCE_COMMANDS | {"run", "create", "prune", "ls"})
    depth = len(group.split())
    return sorted({name.split()[depth] for name in TABLE if name.startswith(group + " ")})


def _objects(invocation: Invocation, names: str, given: int) -> list[str]:
    """Return the names of the objects that a command takes."""
    from hutch.cli.object_shapes import familiar

    engine = invocation.engine
    if names == "completion":
        return list(_SCRIPTS)
    if names in _IMAGE_COMMANDS:
        if names in ("run", "create") and given:
            return []
        return [familiar(name) for image in engine.images.list() for name in image.names]
    if names in _INSTANCE_COMMANDS:
        if names == "exec" and given:
            return []
        return [info.name for info in engine.list(all=True)]
    if names.startswith("network "):
        return [network.name for network in engine.networks.list()]
    if names.startswith("vm kernel "):
        return [kernel.release for kernel in engine.kernels.list()]
    if names.startswith("volume "):
        return [volume.name for volume in engine.volumes.list()]
    return []


def _completion(invocation: Invocation) -> int:
    shell = invocation.arguments[0]
    if shell not in _SCRIPTS:
        raise UsageError(f"completion: expected {', '.join(_SCRIPTS)}; got {shell!r}", exit_code=1)
    print(_SCRIPTS[shell], end="")
    return 0


def _complete(invocation: Invocation) -> int:
    for word in candidates(invocation, invocation.arguments):
        print(word)
    return 0


COMMANDS = {
    "completion": Command(
        handler=_completion,
        summary="Write a completion script for bash, zsh or fish.",
        arguments="SHELL",
        low=1,
        high=1,
        examples=(
            "hutch completion bash > /etc/bash_completion.d/hutch",
            "hutch completion fish > ~/.config/fish/completions/hutch.fish",
        ),
    ),
    "_complete": Command(
        handler=_complete, summary="Answer a shell's completion.", arguments="WORD...", high=-1
    ),
}
