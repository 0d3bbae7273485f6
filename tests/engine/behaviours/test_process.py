"""What the program of an instance is given and held to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hutch.engine import Engine, Instance
from tests.engine.behaviours.conftest import Maker

# One program tells all about itself; a test looks at one line.
_FACTS = """
echo uid=$(id -u) gid=$(id -g) groups=$(id -G | tr ' ' ,)
echo pwd=$(pwd)
echo colour=$COLOUR empty=$EMPTY home=$HOME
echo hostname=$(hostname) file=$(cat /etc/hostname)
echo hosts=$(grep -c '10.9.8.7[[:space:]]*peer' /etc/hosts)
echo self=$(grep -cw kept-host /etc/hosts)
echo resolv=$(grep -c '^nameserver 10.1.2.3' /etc/resolv.conf)
echo root=$(touch /denied 2>&1 | grep -c Read-only)
echo tmpfs=$(touch /scratch/x && grep -c ' /scratch tmpfs rw,.*size=1024k' /proc/mounts)
echo nofile=$(ulimit -n) core=$(ulimit -c)
echo sysctl=$(cat /proc/sys/kernel/shm_rmid_forced)
echo shm=$(df -k /dev/shm | tail -1 | awk '{print $2}')
echo nnp=$(awk '/NoNewPrivs/{print $2}' /proc/self/status)
echo seccomp=$(awk '/^Seccomp:/{print $2}' /proc/self/status)
echo bounding=$(awk '/CapBnd/{print $2}' /proc/self/status)
echo effective=$(awk '/CapEff/{print $2}' /proc/self/status)
echo unshare=$(unshare -U true 2>&1 | grep -c 'not permitted')
echo masked=$(cat /proc/kcore 2>/dev/null | wc -c)
echo pid=$$
echo umask=$(umask)
echo nodes=$(ls /dev | tr '\\n' ,)
"""


@pytest.fixture(scope="module")
def facts(home: Engine, kind: str) -> dict[str, str]:
    """What a program with many options says of itself, by name."""
    done = Maker(home, kind).sh(
        _FACTS,
        user="7:8",
        group_add=["9", "users"],
        env=["COLOUR=green", "EMPTY="],
        workdir="/usr",
        hostname="kept-host",
        add_host=["peer:10.9.8.7"],
        dns=["10.1.2.3"],
        read_only=True,
        tmpfs="/scratch:size=1m,mode=1777",
        ulimits=["nofile=123:456", "core=0"],
        sysctls={"kernel.shm_rmid_forced": "1"},
        shm_size="2m",
        cap_drop=["CHOWN"],
        cap_add=["SYS_TIME"],
        security_opt={"no-new-privileges": "true"},
    )
    assert done.exit_code == 0, done.stderr
    words = (word for line in done.text.splitlines() for word in line.split(" "))
    return dict(word.split("=", 1) for word in words if "=" in word)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uid", "7"),
        ("gid", "8"),
        ("groups", "8,9,100"),
        ("pwd", "/usr"),
        ("colour", "green"),
        ("empty", ""),
        ("hostname", "kept-host"),
        ("file", "kept-host"),
        ("hosts", "1"),
        ("resolv", "1"),
        ("root", "1"),
        ("tmpfs", "1"),
        ("nofile", "123"),
        ("core", "0"),
        ("sysctl", "1"),
        ("shm", "2048"),
        ("nnp", "1"),
        ("seccomp", "2"),
        ("unshare", "1"),
        ("masked", "0"),
        ("pid", "1"),
        ("umask", "0022"),
    ],
)
def test_the_program_has_what_was_asked_for(
    facts: dict[str, str], name: str, expected: str
) -> None:
    assert facts[name] == expected


def test_capabilities_are_dockers_with_what_was_added_and_dropped(facts: dict[str, str]) -> None:
    bounding = int(facts["bounding"], 16)
    chown, kill, net_raw, sys_admin, sys_time = 0, 5, 13, 21, 25
    assert not bounding >> chown & 1 and not bounding >> sys_admin & 1
    assert bounding >> kill & 1 and bounding >> net_raw & 1 and bounding >> sys_time & 1
    assert int(facts["effective"], 16) == 0, "an ordinary user has none in effect"


def test_the_devices_are_the_harmless_ones(facts: dict[str, str]) -> None:
    given = {"full", "null", "random", "tty", "urandom", "zero", "ptmx", "pts", "shm", "mqueue"}
    given |= {"fd", "stdin", "stdout", "stderr", "core"}
    assert set(facts["nodes"].strip(",").split(",")) <= given


def test_processes_are_limited(make: Maker) -> None:
    script = "for i in 1 2 3 4 5 6 7 8 9; do sleep 20 & done; wait; echo all"
    done = make.sh(script, pids_limit=5)
    assert b"all" not in done.stdout and b"fork" in done.stderr


def test_memory_that_is_not_there_ends_the_program_and_is_told(make: Maker) -> None:
    # What was written to /dev/shm counts, and a shell's variable is not swapped out.
    script = "a=xxxxxxxxxxxxxxxx; while :; do a=$a$a; done"
    done = make.sh(script, memory="128m", memory_swap="128m")
    assert (done.exit_code, done.oom_killed) == (137, True)


def test_an_entrypoint_comes_before_the_command(make: Maker) -> None:
    assert make.run("a", "b", entrypoint="/bin/echo").text == "a b\n"


def test_a_user_is_found_by_name(make: Maker) -> None:
    done = make.sh("id -u; id -g; echo $HOME; touch /denied", user="nobody")
    assert done.text.split() == ["65534", "65534", "/home"]
    assert b"Permission denied" in done.stderr


def test_an_init_reaps_what_the_program_leaves(make: Maker) -> None:
    # One that nobody reaps stays in the list, and with it the program.
    gone = "until ! ps -o comm | grep -q ^sleep; do usleep 10000; done"
    script = f"(sh -c 'sleep 0.1 & exit 0'); timeout 60 sh -c '{gone}'; ps -o pid,stat,comm"
    done = make.sh(script, init=True)
    assert done.exit_code == 0
    lines = [line.split() for line in done.text.splitlines()]
    assert not [line for line in lines if line[1].startswith("Z")]
    assert "sh" not in [line[2] for line in lines if line[0] == "1"]


def test_privileged_means_all_capabilities_and_no_filter(make: Maker) -> None:
    done = make.sh("grep -E 'CapEff|^Seccomp:' /proc/self/status", privileged=True)
    fields = dict(line.split(":\t") for line in done.text.splitlines())
    assert int(fields["Seccomp"]) == 0
    assert int(fields["CapEff"], 16) >> 21 & 1


@pytest.fixture
def limited(make: Maker) -> Iterator[Instance]:
    with make.start(pids_limit=50) as made:
        yield made


def test_the_limit_of_processes_is_changed_while_it_runs(limited: Instance) -> None:
    assert limited.exec(["sh", "-c", "sleep 0 & sleep 0 & wait"]).exit_code == 0
    line = "sleep 20 & sleep 20 & sleep 20 & wait; echo all"
    limited.update(pids_limit=4)
    assert b"all" not in limited.exec(["sh", "-c", line]).stdout
