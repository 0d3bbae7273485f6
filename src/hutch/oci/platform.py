"""Platforms (`linux/amd64`, `linux/arm64/v8`): their normal form, and choosing from an index."""

from __future__ import annotations

import os

import msgspec

from hutch.errors import InvalidArgument, NotFound
from hutch.oci.types import INDEX_TYPES, Descriptor, Index

__all__ = ["WantedPlatform", "choose", "host_platform", "normalize", "parse_platform"]

_ARCHITECTURES = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "amd64": ("amd64", ""),
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "x86": ("386", ""),
    "aarch64": ("arm64", "v8"),
    "arm64": ("arm64", "v8"),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv5l": ("arm", "v5"),
    "armv6l": ("arm", "v6"),
    "armv7l": ("arm", "v7"),
    "armv8l": ("arm", "v8"),
    "arm": ("arm", "v7"),
    "ppc64el": ("ppc64le", ""),
    "loong64": ("loong64", ""),
    "loongarch64": ("loong64", ""),
    "mipsel": ("mipsle", ""),
    "mips64el": ("mips64le", ""),
}
_COMPATIBLE = {
    # Best first: what a CPU of the wanted platform runs beside its own.
    ("arm64", "v8"): [("arm64", "v8"), ("arm", "v8"), ("arm", "v7"), ("arm", "v6"), ("arm", "v5")],
    ("arm", "v8"): [("arm", "v8"), ("arm", "v7"), ("arm", "v6"), ("arm", "v5")],
    ("arm", "v7"): [("arm", "v7"), ("arm", "v6"), ("arm", "v5")],
    ("arm", "v6"): [("arm", "v6"), ("arm", "v5")],
}


class WantedPlatform(msgspec.Struct, frozen=True, kw_only=True):
    """A platform in its normal form; `variant` is "" where there is but one."""

    os: str = "linux"
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        base = f"{self.os}/{self.architecture}"
        return f"{base}/{self.variant}" if self.variant else base


def normalize(os_name: str, architecture: str, variant: str | None) -> WantedPlatform:
    """Return the normal form of a platform's parts: `aarch64` is `arm64/v8`."""
    name, implied = _ARCHITECTURES.get(architecture.lower(), (architecture.lower(), ""))
    chosen = (variant or "").lower()
    if chosen.isdigit():
        chosen = f"v{chosen}"
    if name == "amd64" and chosen == "v1":
        chosen = ""
    return WantedPlatform(
        os=os_name.lower() or "linux", architecture=name, variant=chosen or implied
    )


def parse_platform(text: str, *, field: str = "platform") -> WantedPlatform:
    """Return the platform that `os/arch[/variant]`, `arch` or `os` means."""
    parts = text.split("/")
    if not 1 <= len(parts) <= 3 or not all(
        (p and p.replace("-", "_").isidentifier()) or p.isalnum() for p in parts
    ):
        raise InvalidArgument(
            f"expected os/architecture[/variant], got {text!r}",
            field=field,
            hint="such as linux/amd64 or linux/arm64/v8",
        )
    if len(parts) == 1:
        if parts[0].lower() in ("linux", "windows", "darwin", "freebsd"):
            host = host_platform()
            return msgspec.structs.replace(host, os=parts[0].lower())
        return normalize("linux", parts[0], None)
    return normalize(parts[0], parts[1], parts[2] if len(parts) == 3 else None)


def host_platform() -> WantedPlatform:
    """Return the platform this host runs."""
    return normalize("linux", os.uname().machine, None)


def choose(index: Index, wanted: WantedPlatform, *, what: str = "index") -> Descriptor:
    """Return the index's entry for a platform; raise `NotFound` listing what there is.

    The exact variant wins, then the nearest that the CPU runs; among equals the first.
    Entries without a platform serve only an index that states none at all.
    """
    entries = [e for e in index.manifests if not _is_attestation(e)]
    stated = [
        (e, normalize(e.platform.os, e.platform.architecture, e.platform.variant))
        for e in entries
        if e.platform is not None and e.platform.architecture
    ]
    accepted = _COMPATIBLE.get(
        (wanted.architecture, wanted.variant), [(wanted.architecture, wanted.variant)]
    )
    for architecture, variant in [*accepted, (wanted.architecture, "")]:
        for entry, platform in stated:
            if (platform.os, platform.architecture) != (wanted.os, architecture):
                continue
            if platform.variant == variant:
                return entry
    if not stated and len(entries) == 1:
        return entries[0]
    there = ", ".join(dict.fromkeys(str(p) for _, p in stated)) or "no platform"
    raise NotFound(
        f"{what}: no image for {wanted}",
        hint=f"it has {there[:400]}; choose one with --platform",
    )


def _is_attestation(entry: Descriptor) -> bool:
    """Tell whether an entry is a build's attestation and no image (BuildKit's marks)."""
    platform = entry.platform
    unknown = platform is not None and platform.architecture == "unknown"
    kind = (entry.annotations or {}).get("vnd.docker.reference.type", "")
    # A nested index without a platform is legal but nobody writes it.
    return (
        unknown
        or kind == "attestation-manifest"
        or (entry.media_type in INDEX_TYPES and platform is None)
    )
