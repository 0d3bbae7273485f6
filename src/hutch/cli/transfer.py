"""Images in and out: pull, push, save, load, import, bootstrap."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from hutch.cli.command import Command
from hutch.cli.object_shapes import familiar
from hutch.cli.options import UsageError
from hutch.cli.output import is_tty, print_json, show_result
from hutch.cli.progress import pull_progress
from hutch.cli.session import Invocation
from hutch.records import ProgressEvent

if TYPE_CHECKING:
    from io import BufferedReader

__all__ = ["COMMANDS"]


def _pull(invocation: Invocation) -> int:
    name = invocation.arguments[0]
    with pull_progress(quiet=invocation.flag("quiet")) as progress:
        result = invocation.engine.images.pull(
            name, platform=invocation.options.get("platform"), progress=progress
        )
    record = result.record
    shown = result.reference.familiar()
    if invocation.json:
        print_json({"Id": record.id, "Name": shown, "Digests": list(record.repo_digests)})
    else:
        print(shown)
    return 0


def _push(invocation: Invocation) -> int:
    if invocation.flag("all_tags"):
        return _push_all(invocation)
    with pull_progress(quiet=invocation.flag("quiet")) as progress:
        result = invocation.engine.images.push(invocation.arguments[0], progress=progress)
    if invocation.json:
        print_json(result)
    else:
        print(f"{invocation.arguments[0]}: digest: {result.digest}")
    return 0


def _push_all(invocation: Invocation) -> int:
    """Push every tag of a repository."""
    repository = invocation.arguments[0]
    names = [
        name
        for image in invocation.engine.images.list({"reference": [repository]})
        for name in map(familiar, image.names)
        if name.rpartition(":")[0] == repository
    ]
    if not names:
        raise UsageError(f"{repository}: no image has a tag in it", exit_code=1)
    done = []
    for name in sorted(names):
        with pull_progress(quiet=invocation.flag("quiet")) as progress:
            done.append(invocation.engine.images.push(name, progress=progress))
        if not invocation.json:
            print(f"{name}: digest: {done[-1].digest}", flush=True)
    if invocation.json:
        print_json(done)
    return 0


def _save(invocation: Invocation) -> int:
    target = invocation.options.get("output")
    form = invocation.options.get("archive_format", "docker")
    images = invocation.engine.images
    if target in (None, "-"):
        if is_tty(1):
            raise UsageError(
                "the archive will not be written to a terminal",
                hint="use -o FILE, or redirect stdout",
                exit_code=1,
            )
        images.save(invocation.arguments, sys.stdout.buffer, format=form)
        sys.stdout.buffer.flush()
        return 0
    images.save(invocation.arguments, target, format=form)
    return show_result(invocation, "", Names=invocation.arguments, File=target)


def _load(invocation: Invocation) -> int:
    source = invocation.options.get("input")
    given: BinaryIO | str = source if source and source != "-" else _stdin("load", "-i FILE")
    loaded: list[str] = []

    def take(event: ProgressEvent) -> None:
        if event.phase == "loaded":
            loaded.append(event.item)
        else:
            progress(event)

    with pull_progress(quiet=invocation.flag("quiet")) as progress:
        records = invocation.engine.images.load(given, progress=take)
    if invocation.json:
        print_json([{"Id": record.id, "Names": list(record.names)} for record in records])
        return 0
    for name in loaded:
        print(f"Loaded image ID: {name}" if name.startswith("sha256:") else f"Loaded image: {name}")
    return 0


def _stdin(command: str, cure: str) -> BinaryIO:
    if is_tty(0):
        raise UsageError(f"{command}: stdin is a terminal", hint=f"use {cure}", exit_code=1)
    # Unbuffered: BufferedReader fills its answer by several read(2), and a signal that comes
    # between two of them is not looked at while the next one waits for a slow writer.
    return cast("BinaryIO", cast("BufferedReader", sys.stdin.buffer).raw)


def _import(invocation: Invocation) -> int:
    source, *reference = invocation.arguments
    values = invocation.options
    record = invocation.engine.images.import_(
        _stdin("import", "a file name") if source == "-" else source,
        reference[0] if reference else None,
        changes=values.get("change", ()),
        message=values.get("message", ""),
        platform=values.get("platform"),
    )
    return show_result(invocation, record.id, Id=record.id, Names=list(record.names))


def _bootstrap(invocation: Invocation) -> int:
    values = invocation.options
    packages: list[str] = []
    for entry in [*values.get("package", ()), *values.get("include", ())]:
        packages += [name for name in entry.split(",") if name]
    extra: dict[str, Any] = {}
    if "variant" in values:
        extra["variant"] = values["variant"]
    with pull_progress(quiet=invocation.flag("quiet")) as progress:
        record = invocation.engine.images.bootstrap(
            invocation.arguments[0],
            packages=packages,
            mirror=values.get("mirror"),
            keyring=values.get("keyring"),
            reference=values.get("tag"),
            progress=progress,
            **extra,
        )
    if invocation.json:
        print_json({"Id": record.id, "Names": list(record.names)})
        return 0
    for name in record.names:
        print(familiar(name))
    return 0


_QUIET = ("quiet", "q", "flag", "", "Show no progress")
_TRUST = ("disable-content-trust", "", "flag", "", "Accepted: signatures are not checked (true)")
_PULL = Command(
    handler=_pull,
    summary="Fetch an image from a registry.",
    arguments="NAME[:TAG|@DIGEST]",
    low=1,
    high=1,
    options=(("platform", "", "text", "OS/ARCH", "Platform of the image"), _QUIET, _TRUST),
    examples=("hutch pull debian:bookworm", "hutch pull localhost:5000/tool@sha256:…"),
)
_PUSH = Command(
    handler=_push,
    summary="Send an image to the registry that its name says.",
    arguments="NAME[:TAG]",
    low=1,
    high=1,
    options=(("all-tags", "a", "flag", "", "Every tag of the repository"), _QUIET, _TRUST),
    examples=("hutch push localhost:5000/tool:1", "hutch push -a localhost:5000/tool"),
)
_SAVE = Command(
    handler=_save,
    summary="Write images to a tar archive that Docker and OCI tools read.",
    arguments="IMAGE [IMAGE...]",
    low=1,
    high=-1,
    options=(
        ("output", "o", "text", "FILE", "Write to a file instead of stdout"),
        ("archive-format", "", "text", "FORMAT", "docker, oci-archive or oci-dir"),
    ),
    examples=("hutch save -o busybox.tar busybox", "hutch save busybox | gzip > busybox.tar.gz"),
)
_LOAD = Command(
    handler=_load,
    summary="Read images from a tar archive (OCI or Docker; plain, gzip or zstd).",
    options=(("input", "i", "text", "FILE", "Read a file instead of stdin"), _QUIET),
    examples=("hutch load -i busybox.tar", "hutch load < busybox.tar.gz"),
)
_IMPORT = Command(
    handler=_import,
    summary="Make an image of one layer of a root file system in a tar archive.",
    arguments="FILE|- [NAME[:TAG]]",
    low=1,
    high=2,
    options=(
        ("change", "c", "list", "INSTRUCTION", "CMD, ENV, ENTRYPOINT, USER, WORKDIR …"),
        ("message", "m", "text", "TEXT", "Comment of the layer"),
        ("platform", "", "text", "OS/ARCH", "Platform of the image"),
    ),
    examples=(
        "hutch import -c 'CMD [\"sh\"]' rootfs.tar mine:1",
        "hutch export web | hutch import - web",
    ),
)

COMMANDS = {
    "pull": _PULL,
    "image pull": _PULL,
    "push": _PUSH,
    "image push": _PUSH,
    "save": _SAVE,
    "image save": _SAVE,
    "load": _LOAD,
    "image load": _LOAD,
    "import": _IMPORT,
    "image import": _IMPORT,
    "image bootstrap": Command(
        handler=_bootstrap,
        summary="Make an image of a distribution's own packages; no registry is needed.",
        arguments="DISTRIBUTION[:SUITE]|busybox",
        low=1,
        high=1,
        options=(
            ("include", "", "list", "PACKAGE,…", "The same as --package"),
            ("keyring", "", "text", "FILE", "Keys of the archive, instead of the host's"),
            ("mirror", "", "text", "URL", "Take packages from here instead of apt's sources"),
            ("package", "p", "list", "PACKAGE,…", "Install these as well"),
            _QUIET,
            ("tag", "t", "text", "NAME[:TAG]", "Name of the image"),
            ("variant", "", "text", "NAME", "minbase, apt, buildd, standard …"),
        ),
        examples=(
            "hutch image bootstrap busybox",
            "hutch image bootstrap debian:bookworm -p python3,git -t dev",
        ),
    ),
}
