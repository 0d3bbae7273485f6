"""Completion scripts for bash, zsh and fish, and the hidden command they ask."""

from __future__ import annotations

from hutch.cli.command import Command
from hutch.cli.main import GLOBAL_OPTIONS, find_command, group_of, load_command
from hutch.cli.options import Option, UsageError
from hutch.cli.session import Invocation
from hutch.cli.table import GROUPS, HIDDEN, TABLE

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
    set -l found (hutch _complete -- $words[2..-1] 2>/dev/null)
    if test -n "$found"
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c hutch -f -a '(__hutch_complete)'
""",
}
_IMAGE_COMMANDS = frozenset(
    ("run", "create", "push", "tag", "rmi", "history", "save", "image rm", "image push",
     "image tag", "image save", "image history", "image inspect")
)  # fmt: skip
_INSTANCE_COMMANDS = frozenset(
    """start stop restart kill pause unpause fork suspend rm wait rename update port top stats
    logs diff cp export commit inspect exec attach""".split()
)
_ONE_OBJECT = frozenset(
    """run create exec fork rename port top logs diff export commit attach tag history
    push""".split()
) | {"snapshot create", "snapshot ls"}
_OUTPUT: Option = ("output", "o", "text", "FORMAT", "")
_CHOICES: dict[str, tuple[str, ...]] = {
    "archive-format": ("docker", "oci-archive", "oci-dir"),
    "cgroupns": ("private", "host"),
    "isolation": ("container", "vm"),
    "log-driver": ("local", "json-file", "none"),
    "pull": ("always", "missing", "never"),
    "restart": ("no", "always", "unless-stopped", "on-failure"),
    "type": ("container", "image", "network", "volume"),
}


def candidates(invocation: Invocation, words: list[str]) -> list[str]:
    """Return what may stand for the last of `words`."""
    *before, current = words or [""]
    rest, waiting = _arguments(GLOBAL_OPTIONS, before, interspersed=False)
    if waiting:
        return ["table", "json"] if waiting == "output" else []
    if not rest:
        if current.startswith("-"):
            return [f"--{option[0]}" for option in GLOBAL_OPTIONS]
        firsts = {name.split()[0] for name in (*TABLE, *GROUPS) if name not in HIDDEN}
        return sorted(firsts)
    group = group_of(rest)
    if group and len(rest) == len(group.split()):
        return [] if current.startswith("-") else _members(group)
    try:
        names, rest = find_command(rest)
    except UsageError:
        return []
    command = load_command(names)
    options = (*command.options, _OUTPUT)
    given, waiting = _arguments(options, rest, interspersed=command.interspersed)
    if waiting:
        return _values(invocation, waiting)
    if current.startswith("-") and (command.interspersed or not given):
        return [f"--{option[0]}" for option in command.options] + ["--help"]
    return _objects(invocation, names, given)


def _arguments(
    table: tuple[Option, ...], words: list[str], *, interspersed: bool
) -> tuple[list[str], str]:
    """Return the words that are no options, and the option that waits for its value, or ""."""
    longs = {f"--{option[0]}": option for option in table}
    shorts = {option[1]: option for option in table if option[1]}
    plain: list[str] = []
    waiting = ""
    for i, word in enumerate(words):
        if waiting:
            # bash takes `--network=x` apart at the equals sign.
            waiting = waiting if word == "=" else ""
        elif word.startswith("-") and len(word) > 1:
            option = longs.get(word) or _last_short(shorts, word)
            waiting = option[0] if option is not None and option[2] != "flag" else ""
        else:
            plain.append(word)
            if not interspersed:
                return plain + words[i + 1 :], ""
    return plain, waiting


def _last_short(shorts: dict[str, Option], word: str) -> Option | None:
    """Return the option that `-itv` ends with, None where its value is in the word."""
    for position, letter in enumerate(word[1:] if not word.startswith("--") else ""):
        option = shorts.get(letter)
        if option is None:
            return None
        if option[2] != "flag":
            return option if position == len(word) - 2 else None
    return None


def _values(invocation: Invocation, option: str) -> list[str]:
    """Return what an option's value may be; nothing where that may be anything."""
    if option == "output":
        return ["table", "json"]
    if option in _CHOICES:
        return list(_CHOICES[option])
    if option in ("network", "net"):
        return [network.name for network in invocation.engine.networks.list()]
    if option == "volumes-from":
        return _instances(invocation)
    return []


def _members(group: str) -> list[str]:
    if group == "container":
        return sorted(_INSTANCE_COMMANDS | {"run", "create", "prune", "ls"})
    depth = len(group.split())
    return sorted({name.split()[depth] for name in TABLE if name.startswith(group + " ")})


def _objects(invocation: Invocation, names: str, given: list[str]) -> list[str]:
    """Return the names of the objects that a command takes after those given."""
    first = not given
    if names == "completion":
        return list(_SCRIPTS) if first else []
    if names in _IMAGE_COMMANDS:
        return [] if names in _ONE_OBJECT and not first else _images(invocation)
    if names == "inspect":
        return [*_instances(invocation), *_images(invocation), *_networks_and_volumes(invocation)]
    if names in _INSTANCE_COMMANDS or names in ("snapshot create", "snapshot ls"):
        return [] if names in _ONE_OBJECT and not first else _instances(invocation)
    if names in ("network connect", "network disconnect") and not first:
        return _instances(invocation) if len(given) == 1 else []
    if names in ("network create", "network ls", "volume create", "volume ls"):
        return []
    if names in ("pool create", "pool ls"):
        return []
    if names.startswith("pool "):
        return [pool.name for pool in invocation.engine.pools.list()]
    if names.startswith("network "):
        return [network.name for network in invocation.engine.networks.list()]
    if names.startswith("snapshot "):
        return [f"{s.source_name}/{s.tag}" for s in invocation.engine.snapshots.list()]
    if names.startswith("vm kernel "):
        return [kernel.release for kernel in invocation.engine.kernels.list()]
    if names.startswith("volume "):
        return [volume.name for volume in invocation.engine.volumes.list()]
    return []


def _instances(invocation: Invocation) -> list[str]:
    return [info.name for info in invocation.engine.list(all=True)]


def _images(invocation: Invocation) -> list[str]:
    from hutch.cli.object_shapes import familiar

    images = invocation.engine.images.list()
    return [familiar(name) for image in images for name in image.names]


def _networks_and_volumes(invocation: Invocation) -> list[str]:
    engine = invocation.engine
    return [o.name for o in engine.networks.list()] + [o.name for o in engine.volumes.list()]


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
