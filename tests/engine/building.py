"""Build small images, and look at what came out."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hutch.engine import Engine
from hutch.engine.builder.events import BuildEvent

__all__ = ["Builder", "context", "kinds"]


def context(files: Mapping[str, str | bytes | None]) -> bytes:
    """Return a context as a tar: names with contents, None for directories, and `-> target`
    for symbolic links."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.mtime = 1_000_000_000
            entry.mode = 0o644
            if content is None:
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(entry)
            elif isinstance(content, str) and content.startswith("-> "):
                entry.type, entry.linkname = tarfile.SYMTYPE, content[3:]
                archive.addfile(entry)
            else:
                data = content.encode() if isinstance(content, str) else content
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


class Builder:
    """Builds on one engine; `events` are those of the last build."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: list[BuildEvent] = []

    def __call__(
        self, dockerfile: str, files: Mapping[str, str | bytes | None] | None = None, **options: Any
    ) -> str:
        """Build from a context of these files and return the image's id."""
        given = context({**(files or {}), "Dockerfile": dockerfile})
        return self.build(given, **options)

    def build(self, source: Any, **options: Any) -> str:
        """Build from a context and return the image's id."""
        self.events = []
        return self.engine.build(source, progress=self.events.append, **options).id

    def tree(
        self, dockerfile: str, files: Mapping[str, str | bytes | None] | None = None, **options: Any
    ) -> dict[str, tarfile.TarInfo]:
        """Build, and return what the image has by path."""
        return {
            name: entry for name, (entry, _) in self.files(dockerfile, files, **options).items()
        }

    def files(
        self, dockerfile: str, files: Mapping[str, str | bytes | None] | None = None, **options: Any
    ) -> dict[str, tuple[tarfile.TarInfo, bytes]]:
        """Build, and return entries and contents by path."""
        out = io.BytesIO()
        self(dockerfile, files, outputs=["-"], stream=out, **options)
        out.seek(0)
        found = {}
        with tarfile.open(fileobj=out) as archive:
            for entry in archive:
                data = archive.extractfile(entry) if entry.isreg() or entry.islnk() else None
                name = entry.name.removeprefix("./").rstrip("/")
                found[name] = (entry, data.read() if data is not None else b"")
        found.pop(".", None)
        return found

    def output(self) -> str:
        """Return what the commands of the last build wrote."""
        return b"".join(e.data for e in self.events if e.kind == "output").decode()

    def layers(self, image: str) -> list[Path]:
        """Return the unpacked layers of an image, lowest first."""
        record = self.engine.images.get(image)
        return [Path(self.engine._context.layers.path(c)) for c in record.chain_ids]


def kinds(builder: Builder, keyword: str) -> list[str]:
    """Return how the steps of an instruction ended: `done`, `cached` or `error`."""
    steps = {e.step for e in builder.events if e.kind == "start" and e.text.startswith(keyword)}
    ends = ("done", "cached", "error")
    return [e.kind for e in builder.events if e.step in steps and e.kind in ends]
