"""What becomes of the last stage: an image with names, or its files in a directory or a tar."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from hutch.engine.builder.layering import commit_tar, extract_chunks
from hutch.engine.builder.options import parse_cache
from hutch.errors import InvalidArgument
from hutch.image.assemble import now_text, store_image
from hutch.image.commit import oci_media_type
from hutch.image.records import ImageRecord
from hutch.oci.types import Descriptor
from hutch.storage.overlay import Merged
from hutch.storage.pack import pack_merged

if TYPE_CHECKING:
    from hutch.engine.builder.build import Build
    from hutch.engine.builder.stage import StageState

__all__ = ["Output", "make_image", "parse_output", "write_output"]

_KINDS = ("image", "local", "tar", "oci", "docker", "registry", "cacheonly")
_KEYS = """type dest name push tar compression rewrite-timestamp unpack annotation store
oci-mediatypes force-compression platform-split""".split()
# Docker leaves these out where they are empty; so is the digest the same however it came.
_EMPTY: tuple[Any, ...] = (None, "", [], {})


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """Where the result goes. `dest` is a path, `-` for stdout."""

    kind: str = "image"
    dest: str = ""
    names: tuple[str, ...] = ()
    push: bool = False


def parse_output(text: str) -> Output:
    """Read `type=local,dest=DIR` and its like; a path alone is a directory, `-` a tar."""
    if text == "-":
        return Output(kind="tar", dest="-")
    if "=" not in text:
        return Output(kind="local", dest=text)
    given: dict[str, str] = {}
    names: list[str] = []
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals and names and "name" in given:
            names.append(key)  # name=a,b
            continue
        if key not in _KEYS and not key.startswith("annotation"):
            raise InvalidArgument(
                f"unknown key {key[:40]!r}", field="output", hint="known are type, dest, name, push"
            )
        given[key] = value
        if key == "name":
            names.append(value)
    kind = given.get("type", "image")
    if kind not in _KINDS:
        raise InvalidArgument(
            f"unknown type {kind[:40]!r}", field="output", hint=f"use one of {', '.join(_KINDS)}"
        )
    dest = given.get("dest", "")
    if kind == "local" and not dest:
        raise InvalidArgument("type=local needs dest=DIRECTORY", field="output")
    if kind in ("tar", "oci", "docker") and not dest:
        dest = "-" if kind != "docker" else ""
    push = kind == "registry" or given.get("push", "false").lower() in ("true", "1")
    return Output(
        kind="image" if kind == "registry" else kind, dest=dest, names=tuple(names), push=push
    )


def make_image(build: Build, state: StageState, names: Sequence[str]) -> ImageRecord:
    """Record the image that a stage is, under canonical names."""
    layers = list(state.layers)
    history = list(state.history)
    if build.options.squash and len(layers) > state.base_count:
        layers, history = _squash(build, state)
    config = {key: value for key, value in state.config.items() if value not in _EMPTY}
    if build.options.labels:
        config["Labels"] = {**(config.get("Labels") or {}), **build.options.labels}
    created_s = build.options.epoch_s
    if created_s is None:
        created_s = state.created_s or build.now_s
    document: dict[str, Any] = {
        "created": now_text(created_s),
        **state.document,
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": history,
    }
    if any(parse_cache(text, "cache_to")[0] == "inline" for text in build.options.cache_to):
        from hutch.engine.builder.remotecache import INLINE, inline_entries

        document[INLINE] = inline_entries(build, layers)
    if state.author:
        document["author"] = state.author
    build.context.layers.settle([layer.chain_id for layer in layers])
    record = store_image(
        build.context.images,
        build.context.content,
        document,
        [
            Descriptor(
                media_type=oci_media_type(layer.media_type), digest=layer.digest, size=layer.size
            )
            for layer in layers
        ],
        unpacked_sizes=[layer.unpacked_size for layer in layers],
        names=names,
        action="build",
    )
    build.lease.add(*record.digests)
    return record


def _squash(build: Build, state: StageState) -> tuple[list[Any], list[dict[str, Any]]]:
    """Make one layer of those upon the base image; the history keeps its lines."""
    from hutch.engine.builder.squashing import pack_squashed

    base, own = state.layers[: state.base_count], state.layers[state.base_count :]
    if len(own) == 1:
        return list(state.layers), list(state.history)
    paths = [build.context.layers.path(layer.chain_id) for layer in reversed(own)]
    chain_ids = [layer.chain_id for layer in base]
    made = commit_tar(build.context, pack_squashed(paths), chain_ids, build.lease)
    history = []
    count = 0
    for entry in state.history:
        if not entry.get("empty_layer"):
            count += 1
            if count > state.base_count:
                entry = {**entry, "empty_layer": True}
        history.append(entry)
    created = now_text(state.created_s or build.now_s)
    text = f"squashed {len(own)} layers"
    history.append({"created": created, "created_by": "hutch build --squash", "comment": text})
    return [*base, made], history


# ---- elsewhere ----------------------------------------------------------------------------


def write_output(
    build: Build, state: StageState, output: Output, stream: BinaryIO | None = None
) -> None:
    """Write the files of a stage to a directory or a tar; `stream` takes what goes to `-`."""
    with Merged(build.context.layers.lower(state.chain_ids)) as merged:
        chunks = pack_merged(merged)
        if output.kind == "local":
            try:
                os.makedirs(output.dest, exist_ok=True)
            except OSError as error:
                reason = (error.strerror or "").lower()
                raise InvalidArgument(f"{output.dest}: {reason}", field="output") from error
            owner = (os.geteuid(), os.getegid())
            extract_chunks(chunks, output.dest, owner=owner)
            return
        with open_stream(output.dest, stream) as file:
            for chunk in chunks:
                build.check()
                file.write(chunk)


@contextmanager
def open_stream(dest: str, stream: BinaryIO | None) -> Iterator[Any]:
    """Yield where an archive goes: a file that appears once it is whole, or a stream."""
    from hutch.storage.output import open_output

    if dest != "-":
        with open_output(dest) as file:
            yield file
        return
    target = stream if stream is not None else sys.stdout.buffer
    yield target
    target.flush()
