"""`images`, `tag`, `rmi`, `history`, `image prune`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from hutch.cli.command import FILTER, FORMAT, NO_TRUNC, QUIET, Command
from hutch.cli.object_shapes import familiar, image_size
from hutch.cli.output import ago, local_time, print_json, show_rows
from hutch.cli.prompt import confirm
from hutch.cli.session import Invocation, Told
from hutch.ids import short_id
from hutch.units import format_bytes

if TYPE_CHECKING:
    from hutch.image.records import HistoryRecord, ImageRecord

__all__ = ["COMMANDS"]

_COLUMNS = (
    ("REPOSITORY", "Repository"),
    ("TAG", "Tag"),
    ("IMAGE ID", "ID"),
    ("CREATED", "CreatedSince"),
    ("SIZE", "Size"),
)
_HISTORY_COLUMNS = (
    ("IMAGE", "ID"),
    ("CREATED", "CreatedSince"),
    ("CREATED BY", "CreatedBy"),
    ("SIZE", "Size"),
    ("COMMENT", "Comment"),
)


def _created_ns(text: str) -> int:
    """Return nanoseconds since the epoch from RFC 3339, 0 where there is none."""
    from datetime import datetime

    try:
        return int(datetime.fromisoformat(text[:19] + "+00:00").timestamp() * 1e9)
    except ValueError:
        return 0


def _ls(invocation: Invocation) -> int:
    filters = invocation.filters()
    if invocation.arguments:
        filters.setdefault("reference", []).append(invocation.arguments[0])
    rows = []
    for record in invocation.engine.images.list(filters):
        rows += _image_rows(record, invocation)
    columns: tuple[tuple[str, str], ...] = _COLUMNS
    if invocation.flag("digests"):
        columns = (*_COLUMNS[:2], ("DIGEST", "Digest"), *_COLUMNS[2:])
    if invocation.flag("quiet"):
        rows = list({row["ID"]: row for row in rows}.values())
    return show_rows(invocation, rows, columns, identifier="ID")


def _image_rows(record: ImageRecord, invocation: Invocation) -> list[dict[str, Any]]:
    created = _created_ns(record.created)
    full = invocation.flag("no_trunc")
    names = [familiar(name) for name in record.names] or ["<none>:<none>"]
    digest = next((d.partition("@")[2] for d in record.repo_digests), "<none>")
    return [
        {
            "Repository": name.rpartition(":")[0],
            "Tag": name.rpartition(":")[2],
            "ID": record.id if full or invocation.json else short_id(record.id),
            "Digest": digest,
            "CreatedSince": ago(created) if created else "N/A",
            "CreatedAt": local_time(created) if created else "N/A",
            "Size": format_bytes(image_size(record)),
            "Containers": "N/A",
        }
        for name in names
    ]


def _tag(invocation: Invocation) -> int:
    images = invocation.engine.images
    source, target = invocation.arguments
    images.tag(source, target)
    if invocation.json:
        record = images.get(target)
        print_json({"Id": record.id, "Names": list(record.names)})
    return 0


def _rmi(invocation: Invocation) -> int:
    from hutch.errors import NotFound

    force = invocation.flag("force")

    def remove(name: str) -> Told | str:
        try:
            removed = invocation.engine.images.remove(name, force=force)
        except NotFound:
            if force:
                return ""
            raise
        lines = [f"Untagged: {reference}" for reference in removed.untagged]
        lines += [f"Deleted: {identifier}" for identifier in removed.deleted]
        fields: dict[str, object] = {
            "Untagged": list(removed.untagged),
            "Deleted": list(removed.deleted),
        }
        return "\n".join(lines), fields

    return invocation.each(invocation.arguments, remove)


def _history(invocation: Invocation) -> int:
    record = invocation.engine.images.get(invocation.arguments[0])
    full = invocation.flag("no_trunc")
    steps = list(reversed(record.history))
    rows = [_step_row(step, record, top=i == 0, full=full) for i, step in enumerate(steps)]
    return show_rows(invocation, rows, _HISTORY_COLUMNS, identifier="ID")


def _step_row(step: HistoryRecord, record: ImageRecord, *, top: bool, full: bool) -> dict[str, Any]:
    size = 0
    if 0 <= step.layer < len(record.layers):
        layer = record.layers[step.layer]
        size = layer.unpacked_size or layer.size
    text = " ".join(step.created_by.split())
    if not full and len(text) > 45:
        text = text[:44] + "…"
    created = _created_ns(step.created)
    return {
        "ID": (record.id if full else short_id(record.id)) if top else "<missing>",
        "CreatedSince": ago(created, time.time_ns) if created else "N/A",
        "CreatedAt": step.created,
        "CreatedBy": text,
        "Size": format_bytes(size),
        "Comment": step.comment,
    }


def _prune(invocation: Invocation) -> int:
    every = invocation.flag("all")
    what = "all images that no instance uses" if every else "all images without a name"
    if not confirm(invocation, f"This removes {what}."):
        return 1
    report = invocation.engine.images.prune(all_images=every, filters=invocation.filters() or None)
    if invocation.json:
        print_json(report)
        return 0
    for name in report.untagged:
        print(f"untagged: {name}")
    for identifier in report.deleted:
        print(f"deleted: {identifier}")
    print(f"Total reclaimed space: {format_bytes(report.reclaimed)}")
    return 0


_LIST = Command(
    handler=_ls,
    summary="List images.",
    arguments="[REPOSITORY[:TAG]]",
    high=1,
    options=(
        ("all", "a", "flag", "", "Accepted, without effect"),
        ("digests", "", "flag", "", "Show digests"),
        FILTER,
        FORMAT,
        NO_TRUNC,
        QUIET,
    ),
    examples=("hutch images", "hutch images -q --filter dangling=true", "hutch images debian"),
)
_TAG = Command(
    handler=_tag,
    summary="Give an image another name.",
    arguments="IMAGE NAME[:TAG]",
    low=2,
    high=2,
    examples=("hutch tag busybox localhost:5000/busybox:1",),
)
_REMOVE = Command(
    handler=_rmi,
    summary="Remove names of images, and images with their last name.",
    arguments="IMAGE [IMAGE...]",
    low=1,
    high=-1,
    options=(
        ("force", "f", "flag", "", "Even if stopped instances use it"),
        ("no-prune", "", "flag", "", "Accepted, without effect"),
    ),
    examples=("hutch rmi busybox",),
)
_HISTORY = Command(
    handler=_history,
    summary="Show how an image was made, newest step first.",
    arguments="IMAGE",
    low=1,
    high=1,
    options=(
        FORMAT,
        ("human", "H", "flag", "", "Accepted, without effect"),
        NO_TRUNC,
        QUIET,
    ),
    examples=("hutch history --no-trunc debian:bookworm",),
)

COMMANDS = {
    "images": _LIST,
    "image ls": _LIST,
    "tag": _TAG,
    "image tag": _TAG,
    "rmi": _REMOVE,
    "image rm": _REMOVE,
    "history": _HISTORY,
    "image history": _HISTORY,
    "image prune": Command(
        handler=_prune,
        summary="Remove images that have no name, or all that no instance uses.",
        options=(
            ("all", "a", "flag", "", "All that no instance uses"),
            ("filter", "", "list", "KEY=VALUE", "until=… or label=…"),
            ("force", "f", "flag", "", "Do not ask"),
        ),
        examples=("hutch image prune -f", "hutch image prune -af"),
    ),
}
