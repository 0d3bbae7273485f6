"""Import a root file system as an image of one layer."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from hutch.image.assemble import now_text, open_archive, store_image, store_layer
from hutch.image.catalog import Images
from hutch.image.instructions import apply_changes
from hutch.image.records import HealthcheckConfig, ImageRecord, RuntimeConfig
from hutch.oci.platform import host_platform, parse_platform
from hutch.oci.reference import parse
from hutch.records import Progress, ProgressEvent, silent
from hutch.storage.compression import Readable
from hutch.storage.content import ContentStore
from hutch.storage.layers import Layers
from hutch.storage.leases import Leases

__all__ = ["config_object", "import_image"]


def import_image(
    source: Readable | str | os.PathLike[str],
    *,
    images: Images,
    content: ContentStore,
    layers: Layers,
    leases: Leases,
    reference: str | None = None,
    config: RuntimeConfig | None = None,
    changes: Iterable[str] = (),
    message: str = "",
    author: str = "",
    platform: str | None = None,
    created_s: float | None = None,
    progress: Progress = silent,
    action: str = "import",
) -> ImageRecord:
    """Import a tar (plain, gzip, zstd, bzip2 or xz; a stream or a path) and return the image.

    `config` is the configuration to start from and `changes` are instructions upon it
    (`CMD ["sh"]`). With `created_s` the same tar gives the same image. Nothing is
    recorded on failure.
    """
    names = [parse(reference, field="reference").canonical()] if reference else []
    wanted = parse_platform(platform) if platform else host_platform()
    settings = apply_changes(config_object(config) if config else {}, changes)
    item = reference or "import"

    def report(count: int) -> None:
        progress(ProgressEvent(item=item, phase="importing", done=count))

    with ExitStack() as stack:
        if isinstance(source, (str, os.PathLike)):
            stream: Readable = stack.enter_context(open_archive(source))
        else:
            stream = source
        lease = stack.enter_context(leases.hold(purpose=f"import {item}"))
        made = store_layer(content, layers, stream, report=report)
        lease.add(made.descriptor.digest, made.layer.chain_id)
        created = now_text(created_s)
        document: dict[str, Any] = {
            "created": created,
            "author": author,
            "architecture": wanted.architecture,
            "os": wanted.os,
            "config": settings,
            "rootfs": {"type": "layers", "diff_ids": [made.layer.diff_id]},
            "history": [{"created": created, "created_by": "hutch import", "comment": message}],
        }
        if wanted.variant:
            document["variant"] = wanted.variant
        record = store_image(
            images,
            content,
            document,
            [made.descriptor],
            unpacked_sizes=[made.layer.size],
            names=names,
            action=action,
        )
    progress(ProgressEvent(item=item, phase="done", done=made.descriptor.size))
    return record


def config_object(config: RuntimeConfig) -> dict[str, Any]:
    """Return a configuration as the JSON of images spells it; empty fields left out."""
    found: dict[str, Any] = {
        "Env": list(config.env),
        "Cmd": list(config.cmd),
        "Entrypoint": list(config.entrypoint),
        "User": config.user,
        "WorkingDir": config.workdir,
        "Volumes": {path: {} for path in config.volumes},
        "ExposedPorts": {port: {} for port in config.exposed_ports},
        "Labels": dict(config.labels),
        "StopSignal": config.stop_signal,
        "Healthcheck": _health(config.healthcheck) if config.healthcheck else None,
        "Shell": list(config.shell),
        "OnBuild": list(config.on_build),
    }
    return {key: value for key, value in found.items() if value}


def _health(check: HealthcheckConfig) -> dict[str, Any]:
    found: dict[str, Any] = {
        "Test": list(check.test),
        "Interval": int(check.interval_s * 1e9),
        "Timeout": int(check.timeout_s * 1e9),
        "StartPeriod": int(check.start_period_s * 1e9),
        "StartInterval": int(check.start_interval_s * 1e9),
        "Retries": check.retries,
    }
    return {key: value for key, value in found.items() if value}
