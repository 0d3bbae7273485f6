"""What `daemon.json` may say, and how it goes with the command line."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from hutch.api.docker.creating import options_of
from hutch.api.docker.wire import BindingBody, ContainerBody, HostBody
from hutch.daemon.config import DaemonConfig, load_config, merge
from hutch.daemon.listen import Tls, open_listeners
from hutch.errors import Busy, InvalidArgument, NotFound
from hutch.image.registry_config import RegistryConfig
from hutch.network.choices import AddressPool


def test_dockers_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "daemon.json"
    path.write_text(
        '{"hosts": ["unix:///x"], "log-driver": "none", "default-shm-size": "1m",'
        ' "default-ulimits": {"nofile": {"Name": "nofile", "Soft": 10, "Hard": 20}},'
        ' "labels": ["a=b"], "live-restore": false, "dns": ["10.0.0.1"]}'
    )
    config = load_config(str(path), must_exist=True)
    assert config.hosts == ("unix:///x",)
    options = config.front_options()
    assert options.default_ulimits == ("nofile=10:20",)
    assert options.default_shm_size == 1 << 20
    assert (options.log_driver, options.labels) == ("none", ("a=b",))
    assert options.dns == ("10.0.0.1",)
    assert options.live_restore is False


@pytest.mark.parametrize(
    "text",
    [
        '{"nonsense": 1}',
        '{"idle": []}',
        '{"bip": 5}',
        "[]",
        "{",
        '{"hosts": "unix:///x"}',
        '{"debug": 1}',
    ],
)
def test_what_is_not_known_or_wrong_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "daemon.json"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=r"daemon\.json"):
        load_config(str(path), must_exist=True)


def _written(tmp_path: Path, **keys: Any) -> DaemonConfig:
    path = tmp_path / "daemon.json"
    path.write_text(json.dumps({name.replace("_", "-"): value for name, value in keys.items()}))
    return load_config(str(path), must_exist=True)


def test_a_file_as_hosts_have_it_is_taken(tmp_path: Path) -> None:
    config = _written(
        tmp_path,
        storage_driver="overlay2",
        exec_opts=["native.cgroupdriver=systemd"],
        features={"buildkit": True},
        runtimes={"nvidia": {"path": "nvidia-container-runtime", "runtimeArgs": []}},
        iptables=True,
        icc=True,
        userland_proxy=False,
        builder={"gc": {"enabled": True, "defaultKeepStorage": "20GB"}},
        log_driver="json-file",
        log_opts={"max-size": "10m", "max-file": "3"},
        max_concurrent_downloads=10,
        insecure_registries=["registry.lan:5000", "10.0.0.0/8"],
        registry_mirrors=["https://mirror.lan/"],
        live_restore=True,
        bip="172.26.0.1/24",
        fixed_cidr="172.26.0.128/25",
        default_address_pools=[{"base": "10.10.0.0/16", "size": 24}],
        mtu=1450,
        ip="127.0.0.1",
        proxies={"http-proxy": "http://proxy.lan:3128", "no-proxy": "lan"},
    )
    config.check()
    assert config.idle == (*("builder", "exec-opts", "features", "runtimes", "userland-proxy"),)
    choices = config.network_choices()
    assert (choices.subnets, choices.gateways) == (("172.26.0.0/24",), ("172.26.0.1",))
    assert choices.ip_ranges == ("172.26.0.128/25",)
    assert choices.pools == (AddressPool(base="10.10.0.0/16", size=24),)
    assert choices.mtu == 1450
    registry = config.registry(RegistryConfig(insecure=("a.lan",), mirrors={"b.lan": ("c.lan",)}))
    assert registry.insecure == ("a.lan", "registry.lan:5000", "10.0.0.0/8")
    assert registry.mirrors == {"b.lan": ("c.lan",), "docker.io": ("https://mirror.lan/",)}
    assert registry.parallel == 10
    assert config.environment()["http_proxy"] == "http://proxy.lan:3128"
    assert config.environment()["NO_PROXY"] == "lan"
    assert config.front_options().host_ip == "127.0.0.1"


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("bip", "172.26.0.1", "bip"),
        ("bip", "nonsense/16", "bip"),
        ("fixed-cidr", "172.26.0.1/16", "fixed-cidr"),
        ("default-address-pools", [{"base": "10.0.0.0/16", "size": 8}], "pools[0].size"),
        ("default-address-pools", [{"base": "10.0.0.1/16", "size": 24}], "pools[0].base"),
        ("default-address-pools", [{"base": "10.0.0.0/16"}], "size"),
        ("mtu", 10, "mtu"),
        ("registry-mirrors", ["mirror.lan"], "registry-mirrors[0]"),
        ("max-concurrent-downloads", -1, "max-concurrent-downloads"),
        ("proxies", {"ftp-proxy": "x"}, "proxies"),
        ("default-cgroupns-mode", "other", "default-cgroupns-mode"),
        ("default-ipc-mode", "host", "default-ipc-mode"),
        ("seccomp-profile", "/nonexistent/profile.json", "seccomp-profile"),
        ("default-network-opts", {"overlay": {}}, "default-network-opts"),
        ("ip", "nonsense", "ip"),
        ("icc", False, "icc"),
        ("iptables", 1, "iptables"),
        ("userns-remap", "default", "userns-remap"),
        ("storage-driver", "btrfs", "storage-driver"),
        ("authorization-plugins", ["x"], "authorization-plugins"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(
    tmp_path: Path, key: str, value: object, field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        _written(tmp_path, **{key: value}).check()
    assert field in f"{caught.value.field} {caught.value.message}"


def test_defaults_of_containers_are_taken_where_nothing_else_is_said(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
    options = _written(
        tmp_path,
        ip="127.0.0.1",
        default_cgroupns_mode="host",
        default_ipc_mode="shareable",
        no_new_privileges=True,
        host_gateway_ips=["fd00::1", "10.1.2.3"],
        seccomp_profile=str(tmp_path / "profile.json"),
    ).front_options()
    host = HostBody(
        port_bindings={"80/tcp": [BindingBody()], "81/tcp": [BindingBody(host_ip="127.0.0.2")]},
        extra_hosts=["outside:host-gateway", "other:10.0.0.9"],
    )
    made = options_of(ContainerBody(image="x", host_config=host), options)
    assert made["publish"] == ["127.0.0.1::80/tcp", "127.0.0.2::81/tcp"]
    assert made["add_host"] == ["outside:10.1.2.3", "other:10.0.0.9"]
    assert (made["cgroupns"], made["ipc"], made["no_new_privileges"]) == ("host", "shareable", True)
    assert made["security_opt"] == ['seccomp={"defaultAction": "SCMP_ACT_ALLOW"}']
    asked = HostBody(security_opt=["seccomp=unconfined"], cgroupns_mode="private", ipc_mode="host")
    made = options_of(ContainerBody(image="x", host_config=asked), options)
    assert (made["cgroupns"], made["ipc"]) == ("private", "host")
    assert made["security_opt"] == ["seccomp=unconfined"]


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.json")
    assert load_config(missing, must_exist=False).hosts == ()
    with pytest.raises(NotFound):
        load_config(missing, must_exist=True)


def test_hosts_are_said_in_one_place(tmp_path: Path) -> None:
    path = tmp_path / "daemon.json"
    path.write_text('{"hosts": ["unix:///x"]}')
    config = load_config(str(path), must_exist=True)
    assert merge(config, hosts=(), debug=True).debug
    with pytest.raises(InvalidArgument, match="hosts"):
        merge(config, hosts=("unix:///y",))


@pytest.mark.parametrize(
    "host", ["tcp://127.0.0.1:0", "tcp://127.0.0.1:x", "nothing", "ftp://x", "tcp://h:99999"]
)
def test_what_is_not_safe_or_no_address_is_refused(host: str) -> None:
    with pytest.raises(InvalidArgument, match=r"hosts|tcp"):
        open_listeners(host, group="", tls=None, insecure=host.endswith("9"))


def test_tls_without_client_certificates_has_to_be_forced() -> None:
    with pytest.raises(InvalidArgument) as caught:
        open_listeners("tcp://127.0.0.1:0", group="", tls=Tls(), insecure=False)
    assert "--tlsverify" in (caught.value.hint or "")


def test_a_socket_that_answers_is_not_taken_away(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    (first,) = open_listeners(f"unix://{path}", group="", tls=None, insecure=False)
    with pytest.raises(Busy):
        open_listeners(f"unix://{path}", group="", tls=None, insecure=False)
    first.socket.close()  # as a daemon that was killed leaves it
    (second,) = open_listeners(f"unix://{path}", group="", tls=None, insecure=False)
    second.close()
    assert not (tmp_path / "s").exists()


def test_a_socket_has_no_name_before_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "s")
    rename = os.rename
    named: list[str] = []

    def seen(source: str, target: str) -> None:
        assert os.listdir(tmp_path) == [os.path.basename(source)]
        assert os.stat(source).st_mode & 0o777 == 0o660
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(source)
        named.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", seen)
    (listener,) = open_listeners(f"unix://{path}", group="", tls=None, insecure=False)
    listener.close()
    assert named == [path]


def test_what_is_no_socket_stays(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(InvalidArgument):
        open_listeners(f"unix://{tmp_path}/s", group="", tls=None, insecure=False)
    assert (tmp_path / "s").read_text() == "precious"


def test_a_group_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no-such-group"):
        open_listeners(f"unix://{tmp_path}/s", group="no-such-group", tls=None, insecure=False)
