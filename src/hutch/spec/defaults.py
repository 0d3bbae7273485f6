"""What an image says about how it wants to be run, in the form `hutch.spec.build` reads.

The specification may not know the image store, so the engine copies these values over.
"""

# Annotations are not postponed: msgspec would compile each of them when it first decodes.
import msgspec

__all__ = ["ImageDefaults", "ImageHealth"]


class ImageHealth(msgspec.Struct, frozen=True, kw_only=True):
    """A HEALTHCHECK as images write it: `test` is `NONE`, `CMD …` or `CMD-SHELL text`.

    A zero time or count means that the image leaves it to the default. Times in seconds.
    """

    test: tuple[str, ...] = ()
    interval_s: float = 0.0
    timeout_s: float = 0.0
    retries: int = 0
    start_period_s: float = 0.0
    start_interval_s: float = 0.0


class ImageDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """The runtime part of an image's configuration."""

    env: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    user: str = ""
    workdir: str = ""
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    stop_signal: str = ""
    healthcheck: ImageHealth | None = None
    shell: tuple[str, ...] = ()
