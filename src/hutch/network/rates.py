"""What an endpoint may receive and send, held on the host's side of its pair of interfaces.

What the instance receives leaves the host's interface: a token bucket is that interface's
queue. What it sends comes in there, where nothing can queue, so it is sent through the queue
of a device of its own (ifb) first. Neither is within the instance's reach, whatever
capabilities it has, and both kinds of instances have the same.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from hutch.errors import HutchError, Unsupported
from hutch.linux import rtnetlink, tc
from hutch.linux.rtnetlink import LinkInfo, RouteSocket
from hutch.network.model import Endpoint

__all__ = ["bucket_of", "forget", "limit", "queue_name", "strays"]

_PREFIX = "hi"
_LEAST_BURST = 16 << 10
_LEAST_QUEUE = 8 << 10
_FRAME = 22  # what Ethernet adds to the MTU, with two tags
_MTU = 1500
_NOTHING_THERE = (errno.ENOENT, errno.EINVAL, errno.ENODEV)


def queue_name(endpoint: Endpoint) -> str:
    """Return the name of the device that what the endpoint sends passes through."""
    return _PREFIX + endpoint.host_interface.removeprefix("hv")


def bucket_of(rate: int, mtu: int) -> tc.TokenBucket:
    """Return the bucket for a rate in bits per second: 10 ms of it at once (a timer's work
    under load), 100 ms of it queued, and room for a packet at any rate."""
    bytes_per_s = rate // 8
    burst = max(bytes_per_s // 100, _LEAST_BURST, (mtu or _MTU) + _FRAME)
    return tc.TokenBucket(
        rate=bytes_per_s, burst=burst, limit=burst + max(bytes_per_s // 10, _LEAST_QUEUE)
    )


def limit(route: RouteSocket, endpoint: Endpoint, note: str = "") -> None:
    """Bring the host's side in line with the endpoint's rates; nothing where it is gone.

    `note` becomes the alias of what is made. Raises `Unsupported` where the kernel lacks
    a part; the endpoint has no limit then.
    """
    link = route.link(endpoint.host_interface)
    if link is None:
        return
    try:
        _limit_received(route, endpoint, link)
        _limit_sent(route, endpoint, link, note)
    except OSError as error:
        for message in (tc.delete_queue(link.index), tc.delete_ingress(link.index)):
            route.request(message, ignore=_NOTHING_THERE)
        forget(route, [endpoint])
        raise _translate(error, endpoint) from error


def _limit_received(route: RouteSocket, endpoint: Endpoint, link: LinkInfo) -> None:
    if endpoint.rx_rate:
        bucket = bucket_of(endpoint.rx_rate, endpoint.mtu)
        route.request(tc.set_token_bucket(link.index, bucket))
    else:
        route.request(tc.delete_queue(link.index), ignore=_NOTHING_THERE)


def _limit_sent(route: RouteSocket, endpoint: Endpoint, link: LinkInfo, note: str) -> None:
    name = queue_name(endpoint)
    queue = route.link(name)
    if not endpoint.tx_rate:
        route.request(tc.delete_ingress(link.index), ignore=_NOTHING_THERE)
        if queue is not None:
            route.request(rtnetlink.delete_link(queue.index), ignore=(errno.ENODEV,))
        return
    bucket = bucket_of(endpoint.tx_rate, endpoint.mtu)
    if queue is not None:
        route.request(tc.set_token_bucket(queue.index, bucket))
        return
    route.request(rtnetlink.add_ifb(name))
    queue = route.link(name)
    if queue is None:
        raise OSError(errno.ENODEV, f"{name} vanished while it was set up")
    # A filter that somebody's removal of an earlier queue has left leads nowhere.
    route.request(tc.delete_ingress(link.index), ignore=_NOTHING_THERE)
    route.request(
        rtnetlink.set_link(queue.index, alias=note),
        tc.set_token_bucket(queue.index, bucket),
        tc.add_ingress(link.index),
        tc.redirect_incoming(link.index, queue.index),
    )


def forget(route: RouteSocket, endpoints: Iterable[Endpoint]) -> None:
    """Remove the devices of endpoints; the rest goes with their interfaces."""
    for endpoint in endpoints:
        queue = route.link(queue_name(endpoint))
        if queue is not None:
            route.request(rtnetlink.delete_link(queue.index), ignore=(errno.ENODEV,))


def strays(links: Iterable[LinkInfo], note: str, known_interfaces: set[str]) -> list[LinkInfo]:
    """Return the devices of the root with this note that belong to no known interface."""
    return [
        link
        for link in links
        if link.kind == "ifb"
        and note
        and link.alias == note
        and link.name.startswith(_PREFIX)
        and f"hv{link.name.removeprefix(_PREFIX)}" not in known_interfaces
    ]


def _translate(error: OSError, endpoint: Endpoint) -> HutchError:
    from hutch.network import bridge

    subject = f"rates of {endpoint.interface} in network {endpoint.network}"
    if error.errno in (errno.ENOENT, errno.EOPNOTSUPP):
        return Unsupported(
            f"{subject}: {error.strerror}",
            hint="the kernel needs sch_tbf, and for tx-rate ifb, sch_ingress, cls_u32, act_mirred",
        )
    return bridge.route_errors(error, subject)
