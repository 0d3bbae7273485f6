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
    lower = (assets.upper, *assets.lower) if read_only else assets.lower
    options: list[tuple[str, str]] = [("lowerdir+", path) for path in lower]
    if not read_only:
        options += [("upperdir", assets.upper), ("workdir", assets.work)]
    flags = ("userxattr",) if default_options().userxattr else ()
    context = linux.fsopen("overlay")
    try:
        if not linux.overlay_takes_layers(context):
            return _in_thread(lambda: _mount_apart(options, flags, attributes))
        with ExitStack() as stack:
            for key, path in options:
                linux.fsconfig_set_string(context, key, _short(path, stack))
            for flag in flags:
                linux.fsconfig_set_flag(context, flag)
            linux.fsconfig_create(context)
        return linux.fsmount(context, attributes)
    finally:
        os.close(context)


def _short(path: str, stack: ExitStack) -> str:
    """Name a directory by a descriptor: fsconfig(2) takes 255 bytes of a string, mount(2) a
    page of options without a comma or colon in a path, and a root may lie deeper."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return f"/proc/self/fd/{fd}"


def _mount_apart(options: list[tuple[str, str]], flags: tuple[str, ...], attributes: int) -> int:
    """Mount by mount(2), for overlay before Linux 6.8, and take the mount off its place.

    The calling thread gets a mount namespace of its own, so nobody else sees the place; the
    directories are opened in there, for overlay takes none of another namespace.
    """
    unshare(CLONE_NEWNS)
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    with ExitStack() as stack:
        layers = [_short(path, stack) for key, path in options if key == "lowerdir+"]
        others = [f"{key}={_short(path, stack)}" for key, path in options if key != "lowerdir+"]
        text = ",".join([f"lowerdir={':'.join(layers)}", *others, *flags])
        if len(text) >= _PAGE:
            raise Unsupported(
                f"an image of {len(layers)} layers cannot be mounted by this kernel",
                hint="run Linux 6.8 or later, or an image with fewer layers",
            )
        linux.mount("overlay", "/proc", "overlay", 0, text)
    fd = linux.open_tree(linux.AT_FDCWD, "/proc", linux.OPEN_TREE_CLONE)
    try:
        linux.mount_setattr(fd, "", attr_set=attributes)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _in_thread(work: Callable[[], int]) -> int:
    """Run `work` in a thread that nothing else runs in, before or after."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(work).result()
