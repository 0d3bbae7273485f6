"""Tap devices: /dev/net/tun and its ioctls. See linux/if_tun.h and tuntap.rst."""

from __future__ import annotations

import fcntl
import os
import struct

__all__ = ["open_tap"]

TUNSETIFF = 0x400454CA
TUNSETPERSIST = 0x400454CB
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
_IFREQ = struct.Struct("16sH22x")


def open_tap(name: str, *, persist: bool = False) -> int:
    """Make a tap device in the calling thread's network namespace; return its descriptor.

    Frames carry a virtio-net header. A persistent device stays when the descriptor is
    closed: it goes with its namespace, which nobody has to wait for.
    """
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
        fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(name.encode(), flags))
        if persist:
            fcntl.ioctl(fd, TUNSETPERSIST, 1)
    except BaseException:
        os.close(fd)
        raise
    return fd
