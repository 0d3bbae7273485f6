"""Files of instances: `cp`, `diff`, `export`, `commit`."""

from __future__ import annotations

import sys

from hutch.cli.command import Command
from hutch.cli.keys import KEY_VALUE, key_source
from hutch.cli.options import UsageError
from hutch.cli.output import is_tty, print_json, show_result, visible, write_bytes
from hutch.cli.session import Invocation
from hutch.storage.output import open_output

__all__ = ["COMMANDS"]


def _split(argument: str) -> tuple[str, str]:
    """Return (instance, path); the instance is empty for a path of the host."""
    if argument == "-" or argument.startswith(("/", "./", "../")):
        return "", argument
    name, colon, path = argument.partition(":")
    if not colon or "/" in name:
        return "", argument
    return name, path or "/"


def _cp(invocation: Invocation) -> int:
    source, target = invocation.arguments
    (from_name, from_path), (to_name, to_path) = _split(source), _split(target)
    if bool(from_name) == bool(to_name):
        raise UsageError(
            "copying is between an instance and the host",
            hint="write one side as INSTANCE:PATH",
            exit_code=1,
        )
    if from_name:
        return _copy_out(invocation, from_name, from_path, to_path)
    return _copy_in(invocation, from_path, to_name, to_path)


def _copy_out(invocation: Invocation, name: str, path: str, target: str) -> int:
    instance = invocation.engine.get(name)
    if target == "-":
        if is_tty(1):
            raise UsageError("the archive will not be written to a terminal", exit_code=1)
        _, stream = instance.files.copy_out_tar(path, follow=invocation.flag("follow_link"))
        for chunk in stream:
            write_bytes(chunk)
        return 0
    instance.files.copy_out(path, target, follow=invocation.flag("follow_link"))
    return show_result(invocation, "", Name=name, Source=path, Target=target)


def _copy_in(invocation: Invocation, source: str, name: str, path: str) -> int:
    instance = invocation.engine.get(name)
    if source == "-":
        instance.copy_in(path, sys.stdin.buffer)
    else:
        instance.files.copy_in(source, path, follow=invocation.flag("follow_link"))
    return show_result(invocation, "", Name=name, Source=source, Target=path)


def _diff(invocation: Invocation) -> int:
    changes = invocation.engine.get(invocation.arguments[0]).diff()
    if invocation.json:
        print_json(changes)
        return 0
    for_people = is_tty(1)
    for change in changes:
        print(f"{change.kind} {visible(change.path) if for_people else change.path}")
    return 0


def _export(invocation: Invocation) -> int:
    target = invocation.options.get("output")
    if invocation.flag("disk"):
        return _export_disk(invocation, target)
    instance = invocation.engine.get(invocation.arguments[0])
    if target in (None, "-"):
        if is_tty(1):
            raise UsageError(
                "the archive will not be written to a terminal",
                hint="use -o FILE, or redirect stdout",
                exit_code=1,
            )
        for chunk in instance.export():
            write_bytes(chunk)
        return 0
    with open_output(target) as file:
        for chunk in instance.export():
            file.write(chunk)
    return show_result(invocation, "", Name=invocation.arguments[0], File=target)


def _export_disk(invocation: Invocation, target: str | None) -> int:
    from hutch.cli.progress import pull_progress
    from hutch.storage.diskimages import format_of

    if target in (None, "-"):
        raise UsageError("a disk goes to a file", hint="use -o FILE", exit_code=1)
    given = invocation.options.get("disk_key")
    if given is not None:
        key = key_source(given, option="--disk-key")
        invocation.engine.get(invocation.arguments[0]).unlock(key)
    with pull_progress(quiet=False) as progress:
        invocation.engine.machines.export_disk(
            invocation.arguments[0],
            target,
            format=invocation.options.get("format") or format_of(target),
            plain=invocation.flag("plain"),
            progress=progress,
        )
    return show_result(invocation, "", Name=invocation.arguments[0], File=target)


def _commit(invocation: Invocation) -> int:
    name, *reference = invocation.arguments
    values = invocation.options
    record = invocation.engine.get(name).commit(
        reference[0] if reference else None,
        author=values.get("author", ""),
        message=values.get("message", ""),
        changes=values.get("change", ()),
        pause=values.get("pause", True),
    )
    return show_result(invocation, record.id, Id=record.id, Names=list(record.names))


COMMANDS = {
    "cp": Command(
        handler=_cp,
        summary="Copy files between an instance, running or not, and the host.",
        arguments="INSTANCE:SOURCE TARGET|- , or SOURCE|- INSTANCE:TARGET",
        low=2,
        high=2,
        options=(
            ("archive", "a", "flag", "", "Accepted: owners are always kept where possible"),
            ("follow-link", "L", "flag", "", "Copy what SOURCE leads to where it is a link"),
            ("quiet", "q", "flag", "", "Accepted, without effect"),
        ),
        epilog="A directory is copied with all in it; SOURCE/. means only what is in it. "
        "`-` is a tar stream on stdin or stdout.",
        examples=(
            "hutch cp web:/var/log/app.log .",
            "hutch cp ./site web:/srv/",
            "hutch cp web:/etc - | tar -tv",
        ),
    ),
    "diff": Command(
        handler=_diff,
        summary="List what was added (A), changed (C) or deleted (D) against the image.",
        arguments="INSTANCE",
        low=1,
        high=1,
        examples=("hutch diff web",),
    ),
    "export": Command(
        handler=_export,
        summary="Write an instance's whole file system as a tar archive, or its disk.",
        arguments="INSTANCE",
        low=1,
        high=1,
        options=(
            ("disk", "", "flag", "", "Write the disk of a stopped machine that has one"),
            ("disk-key", "", "text", KEY_VALUE, "Its key: FILE, fd:N, env:NAME or prompt"),
            ("format", "", "text", "FORMAT", "Format of the disk (as the name of FILE ends)"),
            ("plain", "", "flag", "", "Write an encrypted disk unencrypted"),
            ("output", "o", "text", "FILE", "Write to a file instead of stdout"),
        ),
        epilog="A disk's format is --format, or what the name of FILE ends in: qcow2, raw, img, "
        "luks, vmdk, vhdx, vhd, vdi (raw where it has no ending). An encrypted disk stays so, by "
        "the same key, unless --plain is given.",
        examples=("hutch export -o web.tar web", "hutch export --disk -o db.qcow2 db"),
    ),
    "commit": Command(
        handler=_commit,
        summary="Make an image of an instance as it is now; print its identifier.",
        arguments="INSTANCE [NAME[:TAG]]",
        low=1,
        high=2,
        options=(
            ("author", "a", "text", "TEXT", "Who made it"),
            ("change", "c", "list", "INSTRUCTION", "CMD, ENV, ENTRYPOINT, USER, WORKDIR …"),
            ("message", "m", "text", "TEXT", "What was done"),
            ("pause", "p", "flag", "", "Freeze it meanwhile (true)"),
        ),
        examples=("hutch commit -m 'with tools' -c 'CMD [\"bash\"]' box mine:2",),
    ),
}
