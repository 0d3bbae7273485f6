"""Where hutch answers otherwise than the dockerd of Debian's sid (28), and why, beside what differs
from 20.10: for `make compare-docker ARGS=--newer`."""

from __future__ import annotations

from scripts.docker_answers import Difference
from scripts.docker_differences import named

__all__ = ["NEWER"]

NEWER: tuple[Difference, ...] = (
    *named(
        "the system is the host's, which that dockerd does not see; there is neither containerd "
        "nor a firewall but hutch's own",
        ("info", r"\.body\.(Containerd|FirewallBackend|InitCommit\..*|OSVersion|OperatingSystem)"),
    ),
    *named(
        "`ps` is hutch's own: that dockerd has none where it runs",
        ("rich top", r"\.(status|body\.(Processes|Titles|message))"),
        ("top", r"\.(code|errors|output)"),
        ("events of containers", r"\.top"),
    ),
    *named(
        "containers of an image are counted where they are asked for",
        (r"images filtered \d+", r"\.body\[\]\.Containers"),
    ),
    *named(
        "an image's second name has to have a name",
        ("image tagged without", r"\.(body|type)"),
    ),
    *named(
        "lists without members are lists",
        (r"network (host|none)", r"\.body\.IPAM\.Config"),
        (r"networks filtered 1", r"\.body\[\]\.IPAM\.Config"),
    ),
    *named(
        "statistics of one moment name their container too",
        ("rich stats", r"\.body\.(id|name)"),
    ),
    *named(
        "an endpoint of a container that does not run knows its network's gateway",
        ("rich inspected, joined", r".*\.Networks\.compare-net\.Gateway"),
    ),
    *named(
        "errors say in hutch's own words which field is wrong and what helps",
        (r"made: (pause|resize.*)", r"\.body\.message"),
    ),
)
