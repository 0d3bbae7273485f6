"""What the store keeps of an image: everything a start needs, with nothing left to decode.

Tables: `images` (key: image id) holds `ImageRecord`, `image_names` (key: canonical
reference, by tag or by digest) holds `ImageName`.
"""

# Annotations are not postponed: msgspec would compile each of them when it first decodes.
import msgspec

__all__ = [
    "IMAGES",
    "IMAGE_NAMES",
    "HealthcheckConfig",
    "HistoryRecord",
    "ImageName",
    "ImageRecord",
    "LayerRecord",
    "RuntimeConfig",
]

IMAGES = "images"
IMAGE_NAMES = "image_names"


class HealthcheckConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An image's HEALTHCHECK. Times in seconds, 0 meaning the default; `test` begins with
    NONE, CMD or CMD-SHELL."""

    test: tuple[str, ...] = ()
    interval_s: float = 0
    timeout_s: float = 0
    start_period_s: float = 0
    start_interval_s: float = 0
    retries: int = 0


class RuntimeConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an image says about running it, checked and normalised.

    `exposed_ports` are `80/tcp`; `volumes` are absolute paths; both sorted.
    """

    env: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    user: str = ""
    workdir: str = ""
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    stop_signal: str = ""
    healthcheck: HealthcheckConfig | None = None
    shell: tuple[str, ...] = ()
    on_build: tuple[str, ...] = ()


class LayerRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One layer: its blob as the manifest has it, and what it is when unpacked.

    `size` is that of the blob, `unpacked_size` that of the files (0: not known).
    """

    digest: str
    size: int
    media_type: str
    diff_id: str
    chain_id: str
    unpacked_size: int = 0


class HistoryRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step of how the image came to be; `layer` indexes the layers, -1 for none."""

    created: str = ""
    created_by: str = ""
    author: str = ""
    comment: str = ""
    layer: int = -1


class ImageName(msgspec.Struct, frozen=True, kw_only=True):
    """What a canonical reference stands for: an image id."""

    id: str


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An image in the store. `id` is the digest of its configuration.

    `names` are canonical `repository:tag`, `repo_digests` canonical `repository@digest`
    (of the manifest, and of the index it was chosen from). `layers` go from the lowest to
    the highest. `created` is RFC 3339 as the image states it (may be empty); `added_at`
    and `tagged_at` are seconds since the epoch on this host.
    """

    id: str
    names: tuple[str, ...] = ()
    repo_digests: tuple[str, ...] = ()
    manifest_digest: str
    manifest_media_type: str
    manifest_size: int
    config_size: int
    layers: tuple[LayerRecord, ...]
    os: str = "linux"
    architecture: str = ""
    variant: str = ""
    created: str = ""
    author: str = ""
    comment: str = ""
    added_at: float = 0
    tagged_at: float = 0
    config: RuntimeConfig = RuntimeConfig()
    history: tuple[HistoryRecord, ...] = ()

    @property
    def config_digest(self) -> str:
        """The digest of the configuration blob: the image's id."""
        return self.id

    @property
    def chain_ids(self) -> tuple[str, ...]:
        """The chain identifiers of the layers, lowest first."""
        return tuple(layer.chain_id for layer in self.layers)

    @property
    def compressed_size(self) -> int:
        """Bytes of the layers' blobs."""
        return sum(layer.size for layer in self.layers)

    @property
    def size(self) -> int:
        """Bytes of the unpacked layers, as `docker images` shows."""
        return sum(layer.unpacked_size for layer in self.layers)

    @property
    def platform(self) -> str:
        """`linux/amd64`, `linux/arm64/v8`."""
        base = f"{self.os}/{self.architecture}"
        return f"{base}/{self.variant}" if self.variant else base

    @property
    def digests(self) -> tuple[str, ...]:
        """Every blob the image needs in the content store."""
        return (self.manifest_digest, self.id, *(layer.digest for layer in self.layers))
