"""`build`, `builder prune`, `builder du`."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from hutch.cli.build_progress import MODES, shown_build
from hutch.cli.command import FORMAT, NO_TRUNC, Command
from hutch.cli.options import Option, UsageError
from hutch.cli.output import ago, is_tty, print_json, show_rows
from hutch.cli.prompt import confirm
from hutch.cli.session import Invocation, warn
from hutch.units import format_bytes, parse_bytes, parse_duration

if TYPE_CHECKING:
    from hutch.engine.builder.facade import BuildResult

__all__ = ["COMMANDS"]

_TEXTS = ("target", "platform", "network", "isolation")
_FLAGS = ("pull", "no_cache", "squash")
_LISTS = ("cache_from", "cache_to", "no_cache_filter", "add_host", "ssh", "security_opt")
_LIMITS = (
    "cpu_period", "cpu_quota", "cpu_shares", "cpuset_cpus", "cpuset_mems", "memory",
    "memory_swap", "shm_size",
)  # fmt: skip
_RENAMED = {
    "tag": "tags", "build_arg": "build_args", "label": "labels", "secret": "secrets",
    "ulimit": "ulimits", "build_context": "contexts",
}  # fmt: skip
_CHECKED = "name the directory, or give a Dockerfile on stdin"


def _build(invocation: Invocation) -> int:
    options = invocation.options
    for name in ("provenance", "sbom"):
        value = options.get(name, "false").lower()
        if value not in ("false", "0"):
            warn(f"--{name}={value}: attestations are not made")
    mode = _mode(invocation)
    given, source = _inputs(invocation)
    outputs = list(options.get("output", ()))
    if invocation.flag("push"):
        outputs.append("type=registry")
    stream = sys.stdout.buffer
    if any(text == "-" or "dest=-" in text for text in outputs) and is_tty(1):
        raise UsageError(
            "the archive will not be written to a terminal",
            hint="name a file with dest=, or redirect stdout",
            exit_code=1,
        )
    call = _call(options)
    if call == "check" or invocation.flag("check"):
        return _check(invocation, source, given)
    result: BuildResult | None = None
    with shown_build(mode) as progress:
        result = invocation.engine.build(
            source,
            outputs=outputs,
            stream=stream,
            progress=progress,
            **given,
            **_arguments(options),
        )
    return _tell(invocation, mode, result)


def _mode(invocation: Invocation) -> str:
    if invocation.flag("quiet"):
        return "quiet"
    mode = invocation.options.get("progress") or os.environ.get("BUILDKIT_PROGRESS") or "auto"
    if mode not in MODES:
        raise UsageError(f"--progress: expected one of {', '.join(MODES)}, got {mode!r}")
    return str(mode)


def _inputs(invocation: Invocation) -> tuple[dict[str, Any], Any]:
    """Return what says which Dockerfile, and the context; `-` is stdin, for one of both."""
    given: dict[str, Any] = {}
    source: Any = invocation.arguments[0]
    dockerfile = invocation.options.get("file")
    if dockerfile == "-":
        if source == "-":
            raise UsageError("stdin cannot be both the context and the Dockerfile", exit_code=1)
        given["dockerfile_data"] = sys.stdin.buffer.read(8 << 20)
    elif dockerfile:
        given["dockerfile"] = dockerfile
    if source == "-":
        if is_tty(0):
            raise UsageError(
                "the context is read from stdin, which is a terminal",
                hint="redirect a Dockerfile or a tar archive: hutch build - < Dockerfile",
                exit_code=1,
            )
        source = sys.stdin.buffer
    return given, source


def _arguments(options: dict[str, Any]) -> dict[str, Any]:
    found = {
        name: options[name] for name in (*_TEXTS, *_FLAGS, *_LISTS, *_LIMITS) if name in options
    }
    found.update({new: options[old] for old, new in _RENAMED.items() if old in options})
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    named = [text for text in options.get("build_arg", ()) if text.startswith("SOURCE_DATE_EPOCH")]
    if epoch and not named:
        if not (epoch.isascii() and epoch.isdigit() and len(epoch) < 12):
            raise UsageError(f"SOURCE_DATE_EPOCH: expected seconds since 1970, got {epoch!r}")
        found["source_date_epoch"] = int(epoch)
    return found


def _call(options: dict[str, Any]) -> str:
    call = options.get("call", "build")
    if call not in ("build", "check"):
        raise UsageError(f"--call: expected build or check, got {call!r}")
    return str(call)


def _check(invocation: Invocation, source: Any, given: dict[str, Any]) -> int:
    """Parse the Dockerfile and tell what is amiss, building nothing."""
    from hutch.dockerfile.lines import MAX_BYTES
    from hutch.dockerfile.lint import check_dockerfile
    from hutch.dockerfile.parse import parse_dockerfile
    from hutch.engine.builder.archives import looks_like_tar
    from hutch.engine.builder.sources import read_dockerfile

    name, data = given.get("dockerfile") or "Dockerfile", given.get("dockerfile_data")
    if data is None and not isinstance(source, str):
        data = source.read(MAX_BYTES + 1)
        if looks_like_tar(data[:512]):
            raise UsageError("--check: an archive is not looked into", hint=_CHECKED, exit_code=1)
    elif data is None:
        if not os.path.isdir(source):
            raise UsageError(f"--check: {source}: is no directory", hint=_CHECKED, exit_code=1)
        name, data = read_dockerfile(source, given.get("dockerfile"))
    dockerfile = parse_dockerfile(data, name)
    found = check_dockerfile(dockerfile)
    if invocation.json:
        warnings = [{"Line": one.line, "Rule": one.rule, "Message": one.message} for one in found]
        print_json({"Dockerfile": name, "Warnings": warnings})
        return 1 if found else 0
    for one in found:
        print(f"{name}:{one.line}: {one.rule}: {one.message}")
    print(f"{len(found)} warnings" if found else "no warnings")
    return 1 if found else 0


def _tell(invocation: Invocation, mode: str, result: BuildResult) -> int:
    options = invocation.options
    if result.id and options.get("iidfile"):
        _write(options["iidfile"], result.id)
    if options.get("metadata_file"):
        import msgspec

        image = result.image
        about: dict[str, Any] = {}
        if image is not None:
            about = {
                "containerimage.config.digest": image.id,
                "containerimage.digest": image.manifest_digest,
                "image.name": ",".join(image.names),
            }
        _write(options["metadata_file"], msgspec.json.encode(about).decode())
    if result.id and invocation.json:
        print_json({"Id": result.id, "Names": list(result.image.names) if result.image else []})
    elif result.id and mode == "quiet":
        print(result.id)
    return 0


def _write(path: str, text: str) -> None:
    from hutch.storage.output import open_output

    with open_output(path) as file:
        file.write(text.encode())


# ---- the cache ----------------------------------------------------------------------------


def _du(invocation: Invocation) -> int:
    items = invocation.engine.build_cache()
    full = invocation.flag("no_trunc") or invocation.flag("verbose")
    rows = [
        {
            "ID": item.id,
            "Type": item.kind,
            "Description": item.description if full else _short(item.description),
            "Size": format_bytes(item.size),
            "LastUsed": ago(int(item.used_at * 1e9)),
            "Uses": str(item.uses),
            "Shared": str(item.shared).lower(),
            "InUse": str(item.in_use).lower(),
        }
        for item in items
    ]
    columns = (
        ("ID", "ID"),
        ("TYPE", "Type"),
        ("SIZE", "Size"),
        ("LAST USED", "LastUsed"),
        ("SHARED", "Shared"),
        ("DESCRIPTION", "Description"),
    )
    code = show_rows(invocation, rows, columns, identifier="ID")
    if not invocation.json and not invocation.options.get("format"):
        print(f"Total: {format_bytes(sum(item.size for item in items))}")
    return code


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 60 else f"{flat[:59]}…"


def _prune(invocation: Invocation) -> int:
    every = invocation.flag("all")
    what = "the whole build cache" if every else "the build cache that no image has"
    if not confirm(invocation, f"This removes {what}."):
        return 1
    filters = invocation.filters()
    older = 0.0
    for name in ("until", "unused-for"):
        for text in filters.pop(name, ()):
            older = max(older, _age(text))
    keep = invocation.options.get("keep_storage") or invocation.options.get("max_used_space")
    report = invocation.engine.prune_build_cache(
        all_entries=every,
        older_than_s=older,
        keep_bytes=parse_bytes(keep, field="keep-storage") if keep else 0,
        filters=filters,
    )
    if invocation.json:
        print_json(report)
        return 0
    for name in (*report.records, *report.mounts):
        print(name[:25])
    print(f"Total reclaimed space: {format_bytes(report.reclaimed)}")
    return 0


def _age(text: str) -> float:
    """Return seconds from a duration, or from a moment until now."""
    from datetime import datetime

    try:
        return max(time.time() - datetime.fromisoformat(text).timestamp(), 0.0)
    except ValueError:
        return parse_duration(text, field="filter")


_OPTIONS: tuple[Option, ...] = (
    ("add-host", "", "list", "HOST:IP", "A line for /etc/hosts of the commands"),
    ("build-arg", "", "list", "NAME[=VALUE]", "Set an ARG; without a value, from the environment"),
    ("build-context", "", "list", "NAME=PATH", "A further context for FROM, COPY --from, mounts"),
    ("builder", "", "text", "NAME", "Accepted, without effect"),
    ("cache-from", "", "list", "SOURCE", "Look for steps there: type=registry,ref=NAME, or NAME"),
    ("cache-to", "", "list", "TARGET", "Keep steps there: type=registry,ref=NAME, or type=inline"),
    ("call", "", "text", "METHOD", "`build`, or `check` to look at the Dockerfile only"),
    ("check", "", "flag", "", "Look at the Dockerfile only, and build nothing"),
    ("compress", "", "flag", "", "Accepted, without effect"),
    ("cpu-period", "", "int", "MICROSECONDS", "Period of --cpu-quota"),
    ("cpu-quota", "", "int", "MICROSECONDS", "Time on processors in each period"),
    ("cpu-shares", "c", "int", "N", "Share of processors against others"),
    ("cpuset-cpus", "", "text", "LIST", "Processors that commands may use"),
    ("cpuset-mems", "", "text", "LIST", "Memory nodes that commands may use"),
    ("file", "f", "text", "PATH", "The Dockerfile; `-` reads it from stdin"),
    ("force-rm", "", "flag", "", "Accepted, without effect: nothing is left in any case"),
    ("iidfile", "", "text", "FILE", "Write the image's id there"),
    ("isolation", "", "text", "KIND", "Run commands in a `container` or in a `vm`"),
    ("label", "", "list", "NAME=VALUE", "A label for the image"),
    ("load", "", "flag", "", "Accepted, without effect: the image is here in any case"),
    ("memory", "m", "text", "BYTES", "Limit of memory of a command"),
    ("memory-swap", "", "text", "BYTES", "Limit of memory and swap, -1 for none"),
    ("metadata-file", "", "text", "FILE", "Write the image's digests there as JSON"),
    ("network", "", "text", "MODE", "Network of commands: default, none, host, or a name"),
    ("no-cache", "", "flag", "", "Do every step anew"),
    ("no-cache-filter", "", "list", "STAGE", "Do the steps of this stage anew"),
    ("output", "o", "list", "DEST", "Where the result goes: type=local|tar|oci|docker,dest=PATH"),
    ("platform", "", "text", "PLATFORM", "Must be this host's"),
    ("progress", "", "text", "MODE", "auto, plain, tty, quiet or json"),
    ("provenance", "", "text", "VALUE", "Accepted where it is false"),
    ("pull", "", "flag", "", "Fetch base images even if they are here"),
    ("push", "", "flag", "", "Push the image to its names"),
    ("quiet", "q", "flag", "", "Show nothing but the image's id"),
    ("rm", "", "flag", "", "Accepted, without effect: nothing is left in any case"),
    ("sbom", "", "text", "VALUE", "Accepted where it is false"),
    ("secret", "", "list", "SECRET", "id=NAME,src=FILE or id=NAME,env=VARIABLE"),
    ("security-opt", "", "list", "OPTION", "As of `hutch run`"),
    ("shm-size", "", "text", "BYTES", "Size of /dev/shm"),
    ("squash", "", "flag", "", "Make one layer of those upon the base image"),
    ("ssh", "", "list", "NAME[=SOCKET]", "An SSH agent for RUN --mount=type=ssh"),
    ("tag", "t", "list", "NAME[:TAG]", "A name for the image; may be given again"),
    ("target", "", "text", "STAGE", "Build this stage and what it needs"),
    ("ulimit", "", "list", "NAME=SOFT[:HARD]", "A limit of the commands' processes"),
)
_COMMAND = Command(
    handler=_build,
    summary="Build an image from a Dockerfile.",
    arguments="PATH | URL | -",
    low=1,
    high=1,
    options=_OPTIONS,
    examples=(
        "hutch build -t app .",
        "hutch build -t app -f docker/Dockerfile --build-arg VERSION=2 --target test .",
        "hutch build --secret id=token,src=token.txt --progress plain .",
        "hutch build -o out --target files .",
        "hutch build - < Dockerfile",
    ),
)


COMMANDS = {
    "build": _COMMAND,
    "image build": _COMMAND,
    "builder build": _COMMAND,
    "builder du": Command(
        handler=_du,
        summary="Show the build cache.",
        options=(
            FORMAT,
            NO_TRUNC,
            ("verbose", "", "flag", "", "Do not shorten"),
        ),
        examples=("hutch builder du",),
    ),
    "builder prune": Command(
        handler=_prune,
        summary="Remove build cache.",
        options=(
            ("all", "a", "flag", "", "What images have too: their builds begin anew"),
            ("filter", "", "list", "KEY=VALUE", "until=24h, type=…, id=…, description=…"),
            ("force", "f", "flag", "", "Do not ask"),
            ("keep-storage", "", "text", "BYTES", "Keep so much of what was used last"),
            ("max-used-space", "", "text", "BYTES", "The same"),
        ),
        examples=("hutch builder prune -f", "hutch builder prune -af --filter until=48h"),
    ),
}
