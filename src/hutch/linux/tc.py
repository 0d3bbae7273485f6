"""Traffic control over NETLINK_ROUTE: a token bucket on a device, and a device whose incoming
packets pass another device's queue first. See tc(8), tc-tbf(8) and linux/pkt_sched.h.

The builders are pure, like those of `hutch.linux.rtnetlink`.
"""

from __future__ import annotations

import struct

import msgspec

from hutch.linux.netlink import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    NetlinkSocket,
    attribute,
    attributes,
    message,
    nested,
)

__all__ = [
    "TokenBucket",
    "add_ingress",
    "delete_ingress",
    "delete_queue",
    "redirect_incoming",
    "set_token_bucket",
    "token_bucket",
]

RTM_NEWQDISC = 36
RTM_DELQDISC = 37
RTM_GETQDISC = 38
RTM_NEWTFILTER = 44

TC_H_ROOT = 0xFFFFFFFF
TC_H_INGRESS = 0xFFFFFFF1
_INGRESS_HANDLE = 0xFFFF0000
_BUCKET_HANDLE = 0x1 << 16

TCA_KIND = 1
TCA_OPTIONS = 2
TCA_TBF_PARMS = 1
TCA_TBF_RATE64 = 4
TCA_TBF_BURST = 6
TC_LINKLAYER_ETHERNET = 1

TCA_U32_SEL = 5
TCA_U32_ACT = 7
TC_U32_TERMINAL = 1
TCA_ACT_KIND = 1
TCA_ACT_OPTIONS = 2
TCA_MIRRED_PARMS = 2
TCA_EGRESS_REDIR = 1
TC_ACT_STOLEN = 4
_ETH_P_ALL = 0x0300  # in network order
_PRIORITY = 1

_TCMSG = struct.Struct("=BxHiIII")
_RATE = struct.Struct("=BBHhHI")
_TBF = struct.Struct("=12s12sIII")
# The head of sixteen bytes, then one key, which fits every packet.
_SELECTOR = struct.Struct("=BBBxHHhhI IIii")
_MIRRED = struct.Struct("=IIiiiiI")


class TokenBucket(msgspec.Struct, frozen=True, kw_only=True):
    """A queue that lets `rate` bytes a second pass, `burst` bytes of them at once, and holds
    no more than `limit` bytes: what comes beyond is dropped."""

    rate: int
    burst: int
    limit: int


def set_token_bucket(index: int, bucket: TokenBucket) -> bytes:
    """Make a token bucket a device's only queue, or change the one that it has."""
    # The kernel takes the rate from the second attribute where it needs more than 32 bits.
    plain = min(bucket.rate, 0xFFFFFFFF)
    rate = _RATE.pack(0, TC_LINKLAYER_ETHERNET, 0, 0, 0, plain)
    options = [attribute(TCA_TBF_PARMS, _TBF.pack(rate, bytes(12), bucket.limit, 0, 0))]
    options.append(attribute(TCA_TBF_BURST, struct.pack("=I", bucket.burst)))
    if bucket.rate > plain:
        options.append(attribute(TCA_TBF_RATE64, struct.pack("=Q", bucket.rate)))
    body = _TCMSG.pack(0, 0, index, _BUCKET_HANDLE, TC_H_ROOT, 0)
    body += attribute(TCA_KIND, b"tbf\0") + nested(TCA_OPTIONS, *options)
    return message(RTM_NEWQDISC, body, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE)


def delete_queue(index: int) -> bytes:
    """Give a device its default queue back (ENOENT: it has that)."""
    return message(RTM_DELQDISC, _TCMSG.pack(0, 0, index, 0, TC_H_ROOT, 0))


def add_ingress(index: int) -> bytes:
    """Give a device a place for filters on what comes in by it."""
    body = _TCMSG.pack(0, 0, index, _INGRESS_HANDLE, TC_H_INGRESS, 0)
    body += attribute(TCA_KIND, b"ingress\0")
    return message(RTM_NEWQDISC, body, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL)


def delete_ingress(index: int) -> bytes:
    """Take that place away, with its filters (ENOENT, EINVAL: there is none)."""
    return message(RTM_DELQDISC, _TCMSG.pack(0, 0, index, 0, TC_H_INGRESS, 0))


def redirect_incoming(index: int, target: int) -> bytes:
    """Send all that comes in by a device through the queue of device `target` (an ifb, which
    puts it back where it came from). The device needs `add_ingress`."""
    mirred = _MIRRED.pack(0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, target)
    action = nested(
        1,
        attribute(TCA_ACT_KIND, b"mirred\0"),
        nested(TCA_ACT_OPTIONS, attribute(TCA_MIRRED_PARMS, mirred)),
    )
    everything = _SELECTOR.pack(TC_U32_TERMINAL, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    body = _TCMSG.pack(0, 0, index, 0, _INGRESS_HANDLE, _PRIORITY << 16 | _ETH_P_ALL)
    body += attribute(TCA_KIND, b"u32\0")
    body += nested(TCA_OPTIONS, attribute(TCA_U32_SEL, everything), nested(TCA_U32_ACT, action))
    return message(RTM_NEWTFILTER, body, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL)


def token_bucket(route: NetlinkSocket, index: int) -> TokenBucket | None:
    """Return the token bucket that a device has as its queue, None where it has another."""
    for body in route.dump(RTM_GETQDISC, _TCMSG.pack(0, 0, index, 0, 0, 0)):
        _, _, owner, _, parent, _ = _TCMSG.unpack_from(body)
        found = attributes(body[_TCMSG.size :])
        if (owner, parent, found.get(TCA_KIND)) != (index, TC_H_ROOT, b"tbf\0"):
            continue
        options = attributes(found[TCA_OPTIONS])
        rate, _, limit, ticks, _ = _TBF.unpack_from(options[TCA_TBF_PARMS])
        (speed,) = struct.unpack_from("=I", rate, 8)
        if TCA_TBF_RATE64 in options:
            (speed,) = struct.unpack("=Q", options[TCA_TBF_RATE64])
        # A tick of the kernel's packet scheduler is 64 ns (PSCHED_SHIFT).
        burst = round(speed * ticks * 64 / 1e9)
        return TokenBucket(rate=speed, burst=burst, limit=limit)
    return None
