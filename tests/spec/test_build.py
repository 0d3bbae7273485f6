"""What becomes of an image's configuration and a caller's options."""

from __future__ import annotations

from typing import Any, get_type_hints

import msgspec
import pytest

from hutch.errors import InvalidArgument
from hutch.spec import elsewhere
from hutch.spec.build import OPTIONS, ImageDefaults, build, check_name, update
from hutch.spec.defaults import ImageHealth
from hutch.spec.model import HealthCheck, InstanceSpec, RestartPolicy
from hutch.spec.process import DEFAULT_PATH, build_exec

SHELL = ImageDefaults(cmd=("sh",))
SERVER = ImageDefaults(
    env=("PATH=/bin", "A=image"),
    entrypoint=("/server",),
    cmd=("--help",),
    user="www-data",
    workdir="srv",
    volumes=("/data",),
    exposed_ports=("80/tcp", "53/udp"),
    labels={"made": "by image", "kept": "yes"},
    stop_signal="SIGQUIT",
    healthcheck=ImageHealth(test=("CMD-SHELL", "ask"), interval_s=5.0),
)


def make(image: ImageDefaults = SHELL, command: Any = None, **options: Any) -> InstanceSpec:
    return build("img", image, command, **options)


@pytest.mark.parametrize(
    ("entrypoint", "command", "argv"),
    [
        (None, None, ("/server", "--help")),
        (None, ["-x"], ("/server", "-x")),
        ("/other", None, ("/other",)),
        ("/other", ["-y"], ("/other", "-y")),
        (["/other", "-a"], ["-y"], ("/other", "-a", "-y")),
        ("", ["ls"], ("ls",)),
        ([], ["ls"], ("ls",)),
        (None, "echo 'a b'", ("/server", "echo", "a b")),
    ],
)
def test_entrypoint_and_command_combine_as_docker_does(
    entrypoint: Any, command: Any, argv: tuple[str, ...]
) -> None:
    assert make(SERVER, command, entrypoint=entrypoint).process.argv == argv


def test_an_emptied_entrypoint_without_a_command_is_refused() -> None:
    with pytest.raises(InvalidArgument) as caught:
        make(SERVER, entrypoint="")
    assert caught.value.field == "command"
    assert caught.value.hint


def test_environment_replaces_in_place_adds_and_removes() -> None:
    spec = make(SERVER, env=["A=mine", "B=2", "PATH"])
    assert spec.process.env == ("A=mine", "B=2")
    assert make(SERVER, env={"B": 2, "A": None}).process.env == ("PATH=/bin", "B=2")


def test_path_and_term_have_defaults() -> None:
    assert make().process.env == (DEFAULT_PATH,)
    assert make(tty=True).process.env == (DEFAULT_PATH, "TERM=xterm")
    assert make(env=["PATH=/x"]).process.env == ("PATH=/x",)


def test_an_image_gives_user_directory_volumes_ports_labels_and_signal() -> None:
    spec = make(SERVER, labels={"made": "here"})
    assert (spec.process.user, spec.process.cwd) == ("www-data", "/srv")
    assert [mount.target for mount in spec.mounts] == ["/data"]
    assert spec.exposed == ("80/tcp", "53/udp")
    assert spec.labels == {"made": "here", "kept": "yes"}
    assert spec.stop_signal == "SIGQUIT"
    assert spec.health == HealthCheck(command=("/bin/sh", "-c", "ask"), interval_s=5.0)


def test_a_mount_takes_the_place_of_the_image_volume() -> None:
    spec = make(SERVER, volumes=["mine:/data/"])
    assert [getattr(mount, "name", None) for mount in spec.mounts] == ["mine"]


def test_health_options_go_over_those_of_the_image() -> None:
    health = make(SERVER, health_retries=7, health_interval="1m").health
    assert health == HealthCheck(command=("/bin/sh", "-c", "ask"), interval_s=60.0, retries=7)
    begins = make(SERVER, health_start_period="1m", health_start_interval="2s").health
    assert begins is not None
    assert (begins.start_period_s, begins.first_interval_s) == (60.0, 2.0)
    assert make(SERVER, no_healthcheck=True).health is None
    none = ImageDefaults(cmd=("sh",), healthcheck=ImageHealth(test=("NONE",)))
    assert make(none).health is None
    shell = ImageDefaults(cmd=("sh",), shell=("/bin/ash", "-ec"))
    made = make(shell, health_cmd="true").health
    assert made is not None
    assert made.command == ("/bin/ash", "-ec", "true")


def test_publish_all_maps_what_is_exposed_and_not_yet_published() -> None:
    spec = make(SERVER, publish_all=True, publish=["8080:80"], expose=[81])
    ports = {(p.container_port, p.protocol, p.host_port) for p in spec.ports}
    assert ports == {(80, "tcp", 8080), (53, "udp", 0), (81, "tcp", 0)}


def test_host_network_drops_published_ports() -> None:
    assert make(network="host", publish=["80:80"]).ports == ()


def test_privileged_lifts_filter_masks_and_no_new_privileges() -> None:
    security = make(privileged=True).security
    assert security.seccomp == "unconfined"
    assert security.masked_paths == ()
    assert not security.no_new_privileges
    assert make(privileged=True, security_opt=["seccomp=default"]).security.seccomp == "default"
    assert make().security.no_new_privileges


def test_the_shortest_request_is_the_default_specification() -> None:
    spec = make()
    assert spec.network_mode == "bridge"
    assert [network.name for network in spec.networks] == ["bridge"]
    assert spec.restart == RestartPolicy()
    assert msgspec.json.decode(msgspec.json.encode(spec), type=InstanceSpec) == spec


def test_none_means_not_given() -> None:
    nothing: dict[str, Any] = dict.fromkeys(OPTIONS)
    assert make(**nothing) == make()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"remove": True, "restart": "always"}, "remove"),
        ({"ip": "10.0.0.2"}, "ip"),
        ({"network": "none", "mac_address": "02:00:00:00:00:01"}, "mac_address"),
        ({"network": "container:x", "publish": ["80:80"]}, "publish"),
        ({"network": "container:x", "hostname": "a"}, "hostname"),
        ({"network": ["host", "back"]}, "network[0]"),
        ({"network": ["back", "back"]}, "network[1]"),
        ({"network_aliases": "db"}, "network_aliases"),
        ({"memory": "4m"}, "memory"),
        ({"memory": "64m", "memory_swap": "32m"}, "memory_swap"),
        ({"memory_swap": "32m"}, "memory_swap"),
        ({"memory": "64m", "memory_reservation": "128m"}, "memory_reservation"),
        ({"memory": "64m", "memory_min": "128m"}, "memory_min"),
        ({"memory_min": "1m"}, "memory_min"),
        ({"cpus": 1, "cpu_quota": 50_000}, "cpus"),
        ({"oom_kill_disable": True}, "oom_kill_disable"),
        ({"uts": "host", "hostname": "a"}, "hostname"),
        ({"volumes": ["/a:/x"], "tmpfs": "/x/"}, "tmpfs[0]"),
        ({"no_healthcheck": True, "health_cmd": "x"}, "no_healthcheck"),
        ({"log_opts": ["max-file=3"]}, "log_opts.max-file"),
        ({"network": "host", "sysctls": {"net.core.somaxconn": 9}}, "sysctls.net.core.somaxconn"),
        ({"sysctls": ["vm.swappiness=1"]}, "sysctls.vm.swappiness"),
        ({"workdir": "etc"}, "workdir"),
        ({"hostname": "-x"}, "hostname"),
        ({"stop_signal": "SIGNOPE"}, "stop_signal"),
        ({"cap_add": ["NET_ADMN"]}, "cap_add[0]"),
        ({"user": "a:b:c"}, "user"),
        ({"userns": "remap", "privileged": True}, "userns"),
        ({"isolation": "jail"}, "isolation"),
        ({"restart": "always:3"}, "restart"),
        ({"storage_opts": {"colour": "red"}}, "storage_opts"),
        ({"memmory": "1g"}, "memmory"),
        ({"env_file": "vars"}, "env_file"),
    ],
)
def test_a_bad_request_names_the_field(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        make(**options)
    assert caught.value.field == field
    assert str(caught.value).startswith(field)


def test_an_unknown_option_is_told_the_near_one() -> None:
    with pytest.raises(InvalidArgument) as caught:
        make(memmory="1g")
    assert caught.value.hint == "did you mean memory?"


@pytest.mark.parametrize(
    ("name", "word"),
    [("environment", "env?"), ("mem_limit", "memory?"), ("ports", "publish?"), ("detach", "start")],
)
def test_an_option_of_another_library_is_told_by_its_name_here(name: str, word: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        make(**dict[str, Any]({name: "1"}))
    assert caught.value.hint and word in caught.value.hint


def test_other_names_lead_to_options_there_are() -> None:
    assert set(elsewhere._CALLED_HERE.values()) <= OPTIONS
    assert not (set(elsewhere._CALLED_HERE) | set(elsewhere._ANOTHER_WAY)) & OPTIONS


def test_update_changes_limits_and_restart_only() -> None:
    before = make(memory="64m", cpus=1)
    after = update(before, memory="128m", cpu_quota=50_000, restart="on-failure:3")
    assert after.resources.memory == 128 << 20
    assert (after.resources.cpus, after.resources.cpu_quota_us) == (0.0, 50_000)
    assert after.restart == RestartPolicy(name="on-failure", max_retries=3)
    assert after.process == before.process
    with pytest.raises(InvalidArgument, match="hostname: cannot be changed"):
        update(before, hostname="x")  # type: ignore[call-arg]


def test_an_exec_inherits_what_it_does_not_say() -> None:
    base = make(SERVER).process
    process = build_exec(base, ["id"], env=["A=2"], tty=True)
    assert process.env == ("PATH=/bin", "A=2", "TERM=xterm")
    assert (process.user, process.cwd, process.tty) == ("www-data", "/srv", True)
    with pytest.raises(InvalidArgument, match="command"):
        build_exec(base, [])


@pytest.mark.parametrize("name", ["ab", "a.b-c_1", "/web"])
def test_good_names_pass(name: str) -> None:
    assert check_name(name) == name.removeprefix("/")


@pytest.mark.parametrize("name", ["", "-ab", "a b", "ä1", "a/b", "x" * 129])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        check_name(name)


def test_the_typed_options_are_those_that_build_knows() -> None:
    from hutch.spec.options import RunOptions

    assert set(RunOptions.__annotations__) == set(OPTIONS)
    assert get_type_hints(RunOptions)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("volumes", ["/tmp:/proc"]),
        ("volumes", ["data:/proc"]),
        ("tmpfs", ["/proc"]),
        ("mounts", ["type=bind,src=/tmp,dst=/proc/"]),
    ],
)
def test_proc_is_not_replaced(option: str, value: list[str]) -> None:
    with pytest.raises(
        InvalidArgument, match=rf"{option}\[0\].target: /proc is the instance's own"
    ):
        build("x", ImageDefaults(), ["true"], **{option: value})  # type: ignore[arg-type]


def test_the_hosts_own_proc_may_be_mounted() -> None:
    spec = build("x", ImageDefaults(), ["true"], volumes=["/proc:/proc:ro", "/dev:/dev"])
    assert [mount.target for mount in spec.mounts] == ["/proc", "/dev"]
