"""A stopped instance's root as its processes saw it: the overlay, mounted for a moment."""

from __future__ import annotations

import os
from contextlib import ExitStack

from hutch.errors import Unsupported
from hutch.linux import mount as linux
from hutch.linux.namespaces import CLONE_NEWNS, unshare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hutch.storage.snapshots import OverlayAssets

__all__ = ["open_merged"]

_PAGE = 4096


def open_merged(assets: OverlayAssets, *, read_only: bool = True) -> int:
    """Mount a stopped instance's overlay, attached nowhere, and return its descriptor.

    The mount ends when the descriptor (the caller's) and all opened through it are closed.
    """
    from hutch.storage.unpack import default_options

    attributes = linux.MOUNT_ATTR_RDONLY if read_only else 0
    attributes |= linux.MOUNT_ATTR_NODEV | linux.MOUNT_ATTR_NOSUID
    with ExitStack() as stack:

        def short(path: str) -> str:
            # fsconfig(2) takes 255 bytes of a string, mount(2) a page of options, and a
            # root may lie deeper. A descriptor has no comma or colon in it either.
            fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return f"/proc/self/fd/{fd}"

        lower = [short(p) for p in ((assets.upper, *assets.lower) if read_only else assets.lower)]
        options: list[tuple[str, str | None]] = []
        if not read_only:
            options += [("upperdir", short(assets.upper)), ("workdir", short(assets.work))]
        if default_options().userxattr:
            options.append(("userxattr", None))
        context = linux.fsopen("overlay")
        stack.callback(os.close, context)
        if not linux.overlay_takes_layers(context):
            return _mount_apart(lower, options, attributes)
        for layer in lower:
            linux.fsconfig_set_string(context, "lowerdir+", layer)
        for key, value in options:
            if value is None:
                linux.fsconfig_set_flag(context, key)
            else:
                linux.fsconfig_set_string(context, key, value)
        linux.fsconfig_create(context)
        return linux.fsmount(context, attributes)


def _mount_apart(lower: list[str], options: list[tuple[str, str | None]], attributes: int) -> int:
    """Mount by mount(2), for overlay before Linux 6.8, and take the mount off its place.

    A thread of its own has a mount namespace of its own while it lives, so nobody else
    sees the place; see unshare(2), CLONE_NEWNS.
    """
    parts = ["lowerdir=" + ":".join(lower)]
    parts += [key if value is None else f"{key}={value}" for key, value in options]
    text = ",".join(parts)
    if len(text) >= _PAGE:
        raise Unsupported(
            f"an image of {len(lower)} layers cannot be mounted by this kernel",
            hint="run Linux 6.8 or later, or an image with fewer layers",
        )

    def mount() -> int:
        unshare(CLONE_NEWNS)
        linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
        linux.mount("overlay", "/proc", "overlay", 0, text)
        fd = linux.open_tree(linux.AT_FDCWD, "/proc", linux.OPEN_TREE_CLONE)
        try:
            linux.mount_setattr(fd, "", attr_set=attributes)
        except BaseException:
            os.close(fd)
            raise
        return fd

    return _in_thread(mount)


def _in_thread(work: Callable[[], int]) -> int:
    """Run `work` in a thread that nothing else runs in, before or after."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(work).result()
