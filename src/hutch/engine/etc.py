"""The three files of /etc that an instance gets from us: hosts, hostname, resolv.conf."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hutch.drivers.base import Guests
from hutch.engine.context import Context
from hutch.engine.lookup import load
from hutch.engine.records import InstanceRecord
from hutch.errors import HutchError
from hutch.lifecycle import State
from hutch.linux.files import FALLOC_FL_KEEP_SIZE, fallocate

if TYPE_CHECKING:
    from hutch.network import Endpoint

__all__ = ["instance_files", "rewrite_files", "rewrite_linked", "write_files", "write_in_place"]

_LIVE = (State.RUNNING, State.PAUSED)


def instance_files(
    context: Context, record: InstanceRecord, endpoints: Sequence[Endpoint]
) -> dict[str, bytes]:
    """Return the contents by file name."""
    from hutch.engine.links import link_hosts
    from hutch.network.resolv import (
        hostname_file,
        hosts_file,
        read_host_resolv_conf,
        resolv_conf,
    )

    spec = record.spec
    host_network = spec.network_mode == "host"
    return {
        "hosts": hosts_file(
            spec.hostname,
            endpoints,
            domainname=spec.domainname,
            extra_hosts=spec.extra_hosts,
            links=link_hosts(context, record, endpoints),
        ),
        "hostname": hostname_file(spec.hostname),
        "resolv.conf": resolv_conf(
            read_host_resolv_conf(),
            endpoints,
            dns=spec.dns or _user_mode_servers(endpoints),
            search=spec.dns_search,
            options=spec.dns_options,
            host_network=host_network,
        ),
    }


def _user_mode_servers(endpoints: Sequence[Endpoint]) -> tuple[str, ...]:
    """Return the name server of user-mode networking, for an endpoint that is of that."""
    from hutch.network import user

    is_user = any(not endpoint.bridge for endpoint in endpoints)
    return (user.NAMESERVER,) if is_user else ()


def write_files(
    context: Context, record: InstanceRecord, endpoints: Sequence[Endpoint]
) -> list[str]:
    """Write the files into the instance's directory, in place, and return their names.

    In place: a running instance has these very files mounted.
    """
    directory = context.directory(record.id)
    contents = instance_files(context, record, endpoints)
    for name, content in contents.items():
        write_in_place(f"{directory}/{name}", content)
    return list(contents)


def write_in_place(path: str, content: bytes) -> None:
    """Give a file a content without making it another file; nobody reads it empty meanwhile.

    Raise `OSError` where there is no room for it: then the file has what it had.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        before = os.pread(fd, len(content) + 1, 0)
        if before == content:
            return
        if before and content:
            _find_room(fd, len(content))
        done = 0
        while done < len(content):
            done += os.pwrite(fd, content[done:], done)
        os.ftruncate(fd, len(content))
    finally:
        os.close(fd)


def _find_room(fd: int, size: int) -> None:
    """Have room for so much of an open file, where its file system can promise that."""
    try:
        fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, size)
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def rewrite_files(context: Context, record: InstanceRecord) -> None:
    """Bring the files up to date in a running instance."""
    if record.state not in _LIVE:
        return
    names = write_files(context, record, context.networks.endpoints(record.id))
    driver = context.driver(record.spec.isolation)
    if not isinstance(driver, Guests):
        return
    # It has copies, but for the targets of mounts of its own.
    taken = {mount.target for mount in record.mounts}
    tree = driver.tree(record.id)
    for name in names:
        if f"/etc/{name}" not in taken:
            content = (context.directory(record.id) / name).read_bytes()
            tree.write(f"/etc/{name}", content, mode=None, owner=None, append=False, parents=False)


def rewrite_linked(context: Context, identifier: str) -> None:
    """Have those that link to an instance know of its new address."""
    from hutch.engine.links import linked_from

    for other in linked_from(context, identifier):
        try:
            rewrite_files(context, load(context, other))
        except (HutchError, OSError):
            continue  # it is gone, or cannot answer now: its next start writes them
