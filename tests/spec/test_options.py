"""Option strings and Python values for single fields."""

from __future__ import annotations

from typing import Any

import pytest

from hutch.errors import InvalidArgument
from hutch.spec.build import build, update
from hutch.spec.defaults import ImageDefaults
from hutch.spec.limits import lifted, parse_device, parse_ulimits, read_resources
from hutch.spec.model import (
    BindMount,
    DeviceNode,
    LogOptions,
    NetworkAttachment,
    PortMapping,
    RestartPolicy,
    Throttle,
    TmpfsMount,
    Ulimit,
    VolumeMount,
)
from hutch.spec.mounts import parse_mount, parse_tmpfs, parse_volume
from hutch.spec.networks import (
    change_rates,
    parse_exposed,
    parse_extra_hosts,
    parse_networks,
    parse_ports,
)
from hutch.spec.security import read_logs, read_restart, read_security
from hutch.spec.signals import parse_signal, signal_name


@pytest.mark.parametrize(
    ("text", "mount"),
    [
        ("/data", VolumeMount(target="/data")),
        ("data:/d", VolumeMount(name="data", target="/d")),
        ("data:/d:ro,nocopy", VolumeMount(name="data", target="/d", read_only=True, copy_up=False)),
        ("/a//b/../c:/d/", BindMount(source="/a/c", target="/d", create_source=True)),
        ("/:/host:ro", BindMount(source="/", target="/host", read_only=True, create_source=True)),
        (
            "/a:/b:rw,z,rshared",
            BindMount(source="/a", target="/b", propagation="rshared", create_source=True),
        ),
        (("data", "/d:ro"), VolumeMount(name="data", target="/d", read_only=True)),
        (
            ("/a", {"bind": "/b", "mode": "ro"}),
            BindMount(source="/a", target="/b", read_only=True, create_source=True),
        ),
    ],
)
def test_volumes_are_read(text: Any, mount: object) -> None:
    assert parse_volume(text) == mount


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "data:", ":/d", "data:d", "/d:ro", "a:/b:ro:x", "./a:/b", "~/a:/b", "a/b:/c",
        "/a:/", "data:/d:rshared", "/a:/b:nocopy", "/a:/b:wo", "/a:/b:ro,rw", "/a:/b\0",
    ],
)  # fmt: skip
def test_bad_volumes_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_volume(text)


@pytest.mark.parametrize(
    ("text", "mount"),
    [
        ("source=data,target=/d", VolumeMount(name="data", target="/d")),
        ("type=volume,dst=/d,volume-nocopy", VolumeMount(target="/d", copy_up=False)),
        (
            "type=bind,src=/a,dst=/b,readonly,bind-propagation=rslave",
            BindMount(source="/a", target="/b", read_only=True, propagation="rslave"),
        ),
        (
            "type=bind,src=/a,dst=/b,bind-recursive=disabled,ro=false",
            BindMount(source="/a", target="/b", recursive=False),
        ),
        (
            "type=tmpfs,target=/t,tmpfs-size=64m,tmpfs-mode=1770",
            TmpfsMount(
                target="/t", size=64 << 20, mode=0o1770, options=("nosuid", "nodev", "noexec")
            ),
        ),
        (
            'type=volume,source=n,target=/d,"volume-opt=o=a,b",volume-opt=type=nfs,volume-label=x=1',
            VolumeMount(
                name="n", target="/d", driver_options={"o": "a,b", "type": "nfs"}, labels={"x": "1"}
            ),
        ),
        (
            {"type": "volume", "source": "n", "target": "/d", "volume_subpath": "a/b"},
            VolumeMount(name="n", target="/d", subpath="a/b"),
        ),
    ],
)
def test_long_mounts_are_read(text: Any, mount: object) -> None:
    assert parse_mount(text) == mount


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("type=bind,target=/b", "mounts.source"),
        ("type=bind,source=/a", "mounts.target"),
        ("type=bind,source=a,target=/b", "mounts.source"),
        ("type=bind,source=/a,target=b", "mounts.target"),
        ("type=npipe,target=/b", "mounts.type"),
        ("type=bind,source=/a,target=/b,volume-nocopy", "mounts"),
        ("type=volume,source=v1,target=/b,volume-subpath=../x", "mounts.volume-subpath"),
        ("type=tmpfs,target=/b,tmpfs-mode=99", "mounts.tmpfs-mode"),
        ("target=/b,target=/c", "mounts"),
        ('target=/b,"x', "mounts"),
    ],
)
def test_bad_long_mounts_name_the_part(text: str, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_mount(text)
    assert caught.value.field == field


def test_tmpfs_options_override_the_careful_defaults() -> None:
    assert parse_tmpfs("/run") == TmpfsMount(target="/run", options=("nosuid", "nodev", "noexec"))
    assert parse_tmpfs("/run:exec,size=1m,mode=755,uid=5") == TmpfsMount(
        target="/run", size=1 << 20, mode=0o755, options=("nosuid", "nodev", "exec", "uid=5")
    )
    with pytest.raises(InvalidArgument):
        parse_tmpfs("/run:lowerdir=/etc")


def port(container: int, host: int = 0, ip: str = "", protocol: str = "tcp") -> PortMapping:
    return PortMapping(container_port=container, host_port=host, host_ip=ip, protocol=protocol)


@pytest.mark.parametrize(
    ("value", "ports"),
    [
        (80, (port(80),)),
        ("80", (port(80),)),
        ("8080:80", (port(80, 8080),)),
        ("8080:80/udp", (port(80, 8080, "", "udp"),)),
        ("127.0.0.1:8080:80", (port(80, 8080, "127.0.0.1"),)),
        ("127.0.0.1::80", (port(80, 0, "127.0.0.1"),)),
        ("[::1]:8080:80", (port(80, 8080, "::1"),)),
        ("[::1]::80", (port(80, 0, "::1"),)),
        ("80-81", (port(80), port(81))),
        ("9000-9001:80-81", (port(80, 9000), port(81, 9001))),
        (["80", "80"], (port(80),)),
        ({"80/tcp": 8080, "53/udp": None}, (port(80, 8080), port(53, 0, "", "udp"))),
        ({"80": ("::1", 8080), 81: [1, 2]}, (port(80, 8080, "::1"), port(81, 1), port(81, 2))),
    ],
)
def test_ports_are_read(value: Any, ports: tuple[PortMapping, ...]) -> None:
    assert parse_ports(value) == ports


@pytest.mark.parametrize(
    "value",
    [
        "", "x", "0", "65536", "80:", ":", "1-3:1-2", "3-1", "80/icmp", "300.1.1.1:80:80",
        "[::1]80:80", "[::1", "80:80:80:80", "-80", "80-", ["1:80", "1:81"],
        "9999999999999999999999", 1.5, True,
    ],
)  # fmt: skip
def test_bad_ports_are_refused(value: Any) -> None:
    with pytest.raises(InvalidArgument):
        parse_ports([value] if not isinstance(value, list) else value)


def test_exposed_ports_are_written_out() -> None:
    assert parse_exposed(["80-81", "53/udp", 80]) == ("80/tcp", "81/tcp", "53/udp")
    assert len(parse_exposed([f"{port}/udp" for port in range(10_000, 40_000)])) == 30_000


def test_networks_are_read_in_all_forms() -> None:
    assert parse_networks({}) == ("bridge", (NetworkAttachment(name="bridge"),))
    assert parse_networks({"network": "none"}) == ("none", ())
    assert parse_networks({"network": "container:web"}) == ("container:web", ())
    mode, networks = parse_networks(
        {"network": ["name=back,alias=db,ip=10.0.0.2,mac-address=02-00-00-00-00-01", "front"]}
    )
    assert mode == "back"
    assert networks[0] == NetworkAttachment(
        name="back", aliases=("db",), ipv4="10.0.0.2", mac="02-00-00-00-00-01"
    )
    assert networks[1].name == "front"
    _, networks = parse_networks({"network": "back", "network_aliases": ["a1"], "ip": "10.0.0.3"})
    assert networks == (NetworkAttachment(name="back", aliases=("a1",), ipv4="10.0.0.3"),)


def test_rates_of_a_network_are_read_in_all_forms() -> None:
    expected = NetworkAttachment(name="front", rx_rate=10_000_000, tx_rate=64_000)
    for value in (
        "name=front,rx-rate=10mbit,tx-rate=64k",
        {"name": "front", "rx_rate": 10_000_000, "tx_rate": "64kbit/s"},
        expected,
    ):
        assert parse_networks({"network": value}) == ("front", (expected,))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("name=front,rx-rate=fast", r"network\[0\].rx-rate: expected a rate"),
        ("name=front,tx-rate=7999", r"network\[0\].tx-rate: out of range"),
        ("name=front,tx-rate=2000gbit", r"network\[0\].tx-rate: out of range"),
        ("name=host,tx-rate=1mbit", r"network\[0\].tx-rate: is not possible on 'host'"),
        ("name=front,rx-rate=1mbit,rx-rate=2mbit", "repeated option 'rx-rate'"),
    ],
)
def test_bad_rates_are_refused(value: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        parse_networks({"network": value})


def test_a_change_of_rates_leaves_what_it_does_not_state() -> None:
    before = (
        NetworkAttachment(name="front", aliases=("web",), rx_rate=8000, tx_rate=9000),
        NetworkAttachment(name="back"),
    )
    after = change_rates(before, [{"name": "front", "rx_rate": 0}, "name=back,tx-rate=1gbit"])
    assert after == (
        NetworkAttachment(name="front", aliases=("web",), tx_rate=9000),
        NetworkAttachment(name="back", tx_rate=10**9),
    )
    for bad in ("name=other,rx-rate=1mbit", "rx-rate=1mbit", "front", "name=front,ip=10.0.0.2"):
        with pytest.raises(InvalidArgument):
            change_rates(before, bad)


def test_extra_hosts_take_both_separators_and_ipv6() -> None:
    assert parse_extra_hosts(["a:10.0.0.1", "b=::1", "c:[::2]", "d:host-gateway"]) == (
        "a:10.0.0.1",
        "b:::1",
        "c:::2",
        "d:host-gateway",
    )


@pytest.mark.parametrize("value", ["a", "a:", ":1.1.1.1", "a:b", "-:1.1.1.1"])
def test_bad_extra_hosts_are_refused(value: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_extra_hosts([value])


def test_ulimits_are_read() -> None:
    expected = (Ulimit(name="nofile", soft=5, hard=6), Ulimit(name="core", soft=-1, hard=-1))
    assert parse_ulimits(["nofile=5:6", "core=unlimited"]) == expected
    assert parse_ulimits({"nofile": (5, 6), "core": -1}) == expected
    for bad in ("nofile", "nofile=7:6", "speed=1", "nofile=x", "nofile=-1:5", "nofile=-2"):
        with pytest.raises(InvalidArgument):
            parse_ulimits([bad])


def test_devices_are_read() -> None:
    assert parse_device("/dev/fuse") == DeviceNode(source="/dev/fuse", target="/dev/fuse")
    assert parse_device("/dev/a:r").permissions == "r"
    assert parse_device("/dev/a:/dev/b:rw") == DeviceNode(
        source="/dev/a", target="/dev/b", permissions="rw"
    )
    for bad in ("fuse", "/dev/a:/dev/b:x", "/dev/a:/dev/b:rr", "nvidia.com/gpu=all", "/a:/b:r:w"):
        with pytest.raises(InvalidArgument):
            parse_device(bad)


def test_resources_take_text_and_numbers() -> None:
    given = {
        "memory": "1g", "memory_swap": -1, "cpus": "1.5", "pids_limit": -1, "cpuset_cpus": "0-1,3",
        "device_read_bps": ["/dev/sda:1mb"], "device_write_iops": {"/dev/sda": 5},
    }  # fmt: skip
    resources = read_resources(given)
    assert (resources.memory, resources.memory_swap, resources.cpus) == (1 << 30, -1, 1.5)
    assert (resources.pids, resources.cpuset_cpus) == (0, "0-1,3")
    assert resources.device_read_bps == (Throttle(path="/dev/sda", rate=1 << 20),)
    assert resources.device_write_iops == (Throttle(path="/dev/sda", rate=5),)


def test_a_rate_that_is_no_longer_named_is_lifted() -> None:
    before = read_resources({"device_read_bps": ["/dev/sda:1mb", "/dev/sdb:2mb"], "memory": "1g"})
    after = read_resources({"device_read_bps": ["/dev/sdb:0"], "memory": "2g"})
    told = lifted(before, after)
    assert told.device_read_bps == (
        Throttle(path="/dev/sdb", rate=0),
        Throttle(path="/dev/sda", rate=0),
    )
    assert told.memory == 2 << 30
    assert lifted(after, after) is after


@pytest.mark.parametrize(
    "given",
    [
        {"cpus": "nan"}, {"cpus": -1}, {"cpus": 0.001}, {"cpu_period": 10}, {"cpu_quota": 5},
        {"cpuset_cpus": "3-1"}, {"cpuset_cpus": "a"}, {"blkio_weight": 5}, {"memory": "x"},
        {"memory_swappiness": 101}, {"pids_limit": "many"}, {"memory": -5}, {"memory": True},
        {"device_read_bps": ["sda:1"]}, {"device_read_bps": ["/dev/sda"]}, {"cpu_shares": -1},
    ],
)  # fmt: skip
def test_bad_resources_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_resources(given)
    assert caught.value.field is not None
    assert caught.value.field.split("[")[0] in given


@pytest.mark.parametrize(("isolation", "least"), [("container", 6), ("vm", 96)])
def test_memory_has_a_least_amount_that_the_kind_says(isolation: str, least: int) -> None:
    for size in ("1M", f"{least - 1}M"):
        with pytest.raises(InvalidArgument) as caught:
            build("x", ImageDefaults(), ["true"], isolation=isolation, memory=size)
        assert caught.value.field == "memory"
        assert caught.value.message.startswith(f"memory: must be at least {least}M, got ")
    spec = build("x", ImageDefaults(), ["true"], isolation=isolation, memory=f"{least}M")
    with pytest.raises(InvalidArgument, match=f"at least {least}M"):
        update(spec, memory=f"{least - 1}M")


def test_restart_policies_are_read() -> None:
    assert read_restart("on-failure:3") == RestartPolicy(name="on-failure", max_retries=3)
    assert read_restart({"Name": "always"}) == RestartPolicy(name="always")
    assert read_restart(RestartPolicy(name="unless-stopped")).name == "unless-stopped"
    for bad in ("sometimes", "on-failure:-1", "on-failure:x", "no:1"):
        with pytest.raises(InvalidArgument):
            read_restart(bad)


def test_log_options_are_read() -> None:
    assert read_logs({"log_driver": "json-file"}) == LogOptions()
    given = {"log_opts": {"max-size": "1m", "max-file": 3, "mode": "non-blocking"}}
    assert read_logs(given) == LogOptions(max_bytes=1 << 20, max_files=3)
    assert read_logs({"log_driver": "none"}).driver == "none"
    with pytest.raises(InvalidArgument):
        read_logs({"log_driver": "syslog"})


def test_security_options_are_read() -> None:
    given = {
        "cap_add": ["cap_net_admin", "ALL"],
        "security_opt": ["no-new-privileges=false", "apparmor=mine", "systempaths=unconfined"],
    }
    security = read_security(given)
    assert security.cap_add == ("NET_ADMIN", "ALL")
    assert (security.no_new_privileges, security.apparmor) == (False, "mine")
    assert security.masked_paths == ()
    profile = read_security({"security_opt": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}}})
    assert profile.seccomp == '{"defaultAction":"SCMP_ACT_ALLOW"}'
    for bad in ("seccomp=/etc/profile.json", "colour=red", "label=type:x", "no-new-privileges=x"):
        with pytest.raises(InvalidArgument):
            read_security({"security_opt": [bad]})


@pytest.mark.parametrize(
    ("given", "number"),
    [("TERM", 15), ("sigterm", 15), ("9", 9), (1, 1), ("SIGRTMIN+3", 37), ("RTMAX-1", 63)],
)
def test_signals_have_names_and_numbers(given: str | int, number: int) -> None:
    assert parse_signal(given) == number
    assert parse_signal(signal_name(number)) == number


@pytest.mark.parametrize(
    "given", ["", "SIG", "0", "65", "TERMINATE", -1, True, "RTMIN-1", "RTMIN+"]
)
def test_bad_signals_are_refused(given: str | int) -> None:
    with pytest.raises(InvalidArgument):
        parse_signal(given)


def test_a_range_of_host_ports_for_one_port_is_a_choice() -> None:
    [port] = parse_ports("9000-9010:80")
    assert (port.host_port, port.host_port_end, port.container_port) == (9000, 9010, 80)


def test_host_port_0_is_any_free_one() -> None:
    assert parse_ports("0:80") == parse_ports("80")
    assert parse_ports("127.0.0.1:0:80") == parse_ports("127.0.0.1::80")
