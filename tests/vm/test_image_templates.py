"""Templates of images: when they are made, what goes on from them, and what cannot."""

from __future__ import annotations

import errno
import os
import secrets
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from hutch.drivers.base import Launch, LaunchMount
from hutch.drivers.failures import CommandFailed
from hutch.drivers.vm import images, making, templates
from hutch.drivers.vm.images import ImageRequest, ImageTemplates, image_request, most_kept
from hutch.drivers.vm.templates import Templates
from hutch.engine import Engine, Instance
from hutch.errors import InvalidArgument, Unavailable
from hutch.plan import ops
from hutch.plan.assets import ResolvedUser
from hutch.plan.machine.model import Shape
from hutch.plan.vm import SYNC_REST, GuestAssets, compile_guest, split_guest
from hutch.process.launcher import Launcher
from hutch.spec.model import InstanceSpec, ProcessSpec, Security
from hutch.storage.disks import Disks
from tests.requires import requires
from tests.vm.confined import assert_confined
from tests.vm.machines import NEEDS, SMALL, machine_root, nothing_left, start, until

KEY = "0123456789abcdef0123456789abcdef"


# ---- what they depend on --------------------------------------------------------------


def _spec(*argv: str, **more: Any) -> InstanceSpec:
    process = ProcessSpec(argv=argv or ("true",))
    return InstanceSpec(image="x", process=process, **more)


def _plan(spec: InstanceSpec, env: tuple[str, ...] = ()) -> ops.Plan:
    return compile_guest(spec, GuestAssets(user=ResolvedUser(uid=0, gid=0), env=env))


def test_nothing_of_an_instance_is_in_the_first_part_of_its_launch() -> None:
    one = _spec("/bin/secret-program", hostname="secret-name")
    parts = split_guest(_plan(one, ("SECRET=1",)))
    assert parts.first == split_guest(_plan(_spec("other", hostname="else"))).first
    assert parts.first.child[-1] == ops.Rest(number=SYNC_REST)
    assert "secret" not in repr(parts.first).lower()
    assert parts.first.child[:-1] + parts.rest == _plan(one, ("SECRET=1",)).child


def test_with_a_known_filter_only_the_program_is_left() -> None:
    one = _spec("/bin/secret-program", hostname="secret-name")
    plan = _plan(one, ("SECRET=1",))
    parts = split_guest(plan, known_filter=True)
    other = _plan(_spec("other", hostname="else"))
    assert parts.first == split_guest(other, known_filter=True).first
    assert "secret" not in repr(parts.first).lower()
    assert (parts.rest, parts.hostname) == (plan.child[-1:], "secret-name")
    # What fails is told by its number.
    assert [type(op) for op in parts.first.child[:-1]] == [type(op) for op in plan.child[:-1]]
    assert not split_guest(_plan(_spec()), known_filter=True).hostname


def test_the_size_of_a_terminal_is_the_instances() -> None:
    terminal = InstanceSpec(image="x", process=ProcessSpec(argv=("sh",), tty=True))
    plan = _plan(terminal)
    assert split_guest(plan, known_filter=True) == split_guest(plan)


@pytest.mark.parametrize(
    ("security", "left"),
    [
        (Security(), 1),
        (Security(seccomp="unconfined"), 1),
        (Security(privileged=True), 1),
        (Security(seccomp='{"defaultAction": "SCMP_ACT_KILL"}'), 8),
    ],
)
@requires("mke2fs")
def test_a_filter_of_ones_own_is_in_force_when_all_else_is_done(
    launch: Launch, security: Security, left: int
) -> None:
    spec = msgspec.structs.replace(launch.spec, security=security)
    found = image_request(
        msgspec.structs.replace(launch, spec=spec),
        _plan(spec),
        Disks(Path(launch.directory)),
        base="b" * 32,
        shape=Shape(memory=128 << 20),
        on_taps=True,
    )
    assert found is not None
    assert struct.unpack_from("<II", found[1].rest) == (SYNC_REST, left)


@pytest.mark.parametrize("change", [{"read_only": True}, {"shm_size": 1 << 20}])
def test_mounts_of_its_own_are_in_the_first_part(change: dict[str, Any]) -> None:
    assert split_guest(_plan(_spec(**change))).first != split_guest(_plan(_spec())).first


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    root_disk = tmp_path / "disk.erofs"
    root_disk.write_bytes(b"image")
    disk = tmp_path / "disk.raw"
    Disks(tmp_path).create(str(disk), 64 << 20)
    return Launch(
        id="1" * 64,
        name="one",
        spec=_spec(),
        directory=str(tmp_path),
        root_disk=str(root_disk),
        disk=str(disk),
    )


def _request(launch: Launch, **changes: object) -> ImageRequest:
    found = image_request(
        msgspec.structs.replace(launch, **changes),
        _plan(launch.spec),
        Disks(Path(launch.directory)),
        base="b" * 32,
        shape=Shape(memory=128 << 20),
        on_taps=True,
    )
    assert found is not None
    return found[0]


@requires("mke2fs")
def test_another_image_or_way_of_mounting_it_is_another_template(launch: Launch) -> None:
    keys = {_request(launch).key, _request(launch, volatile=True).key}
    keys.add(_request(launch, id="2" * 64, name="two").key)
    assert len(keys) == 2
    hosts = LaunchMount(source="/x/hosts", target="/etc/hosts", ours=True)
    keys.add(_request(launch, mounts=(hosts,)).key)
    Path(launch.root_disk).write_bytes(b"another")
    keys.add(_request(launch).key)
    assert len(keys) == 4


@requires("mke2fs")
def test_shared_directories_and_a_very_large_environment_go_without(launch: Launch) -> None:
    disks = Disks(Path(launch.directory))

    def found(launch: Launch, env: tuple[str, ...] = ()) -> object:
        shape = Shape(memory=128 << 20)
        plan = _plan(launch.spec, env)
        return image_request(launch, plan, disks, base="b", shape=shape, on_taps=True)

    share = LaunchMount(source="/srv", target="/data")
    assert found(launch)
    assert found(msgspec.structs.replace(launch, mounts=(share,))) is None
    assert found(launch, ("BIG=" + "x" * 70_000,)) is None


# ---- when one is made -----------------------------------------------------------------


class Kept:
    """Templates of images without machines."""

    def __init__(self, root: Path, launcher: Launcher, most: int = 2) -> None:
        (root / "templates").mkdir()
        self.directory = root / "templates"
        self.images = ImageTemplates(root, Templates(root, launcher), most=most)

    def put(self, key: str, age_s: float) -> None:
        disk = self.directory / key / images.DISK
        disk.parent.mkdir()
        disk.touch()
        when = disk.stat().st_mtime - age_s
        os.utime(disk, (when, when))

    def keys(self) -> set[str]:
        return {disk.parent.name for disk in self.directory.glob(f"*/{images.DISK}")}


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    with Launcher() as launcher:
        yield Kept(tmp_path, launcher)


@requires("mke2fs")
def test_the_second_start_has_it_made_and_no_third(kept: Kept, launch: Launch) -> None:
    request = _request(launch)
    assert kept.images.wish(request) is None
    assert kept.images.wish(request) == request.key
    assert kept.images.requested(request.key) == request
    assert kept.images.wish(request) is None
    kept.images.made(request.key)
    assert kept.images.requested(request.key) is None


@requires("mke2fs")
def test_of_many_second_starts_one_has_it_made(kept: Kept, launch: Launch) -> None:
    request = _request(launch)
    kept.images.wish(request)
    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda _: kept.images.wish(request), range(32)))
    assert [key for key in told if key] == [request.key]


@requires("mke2fs")
def test_a_start_of_long_ago_does_not_count(kept: Kept, launch: Launch) -> None:
    request = _request(launch)
    kept.images.wish(request)
    (wish,) = kept.directory.glob(".wish-*")
    os.utime(wish, (0, 0))
    assert kept.images.wish(request) is None
    assert kept.images.wish(request) == request.key


@requires("mke2fs")
def test_a_request_whose_maker_was_killed_is_made_again(kept: Kept, launch: Launch) -> None:
    request = _request(launch)
    kept.images.wish(request)
    kept.images.wish(request)
    (making,) = kept.directory.glob(".making-*")
    os.utime(making, (0, 0))
    assert kept.images.wish(request) is None
    assert kept.images.wish(request) == request.key


@requires("mke2fs")
def test_forgetting_withdraws_every_request(kept: Kept, launch: Launch) -> None:
    request, other = _request(launch), _request(launch, volatile=True)
    kept.images.wish(request)
    kept.images.wish(request)
    kept.images.wish(other)
    kept.images.forget()
    assert kept.images.requested(request.key) is None
    assert not list(kept.directory.glob(".wish-*"))


def test_those_that_nobody_used_for_longest_go(kept: Kept) -> None:
    for age, key in enumerate("abcd"):
        kept.put(key * 32, 100.0 * age)
    kept.images.made(KEY)
    assert kept.keys() == {"a" * 32, "b" * 32}


@requires("mke2fs")
def test_none_are_made_where_none_are_to_be_kept(
    tmp_path: Path, launch: Launch, launcher: Launcher
) -> None:
    kept = Kept(tmp_path, launcher, most=0)
    request = _request(launch)
    assert [kept.images.wish(request) for _ in range(3)] == [None] * 3
    assert not list(kept.directory.iterdir())


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    with Launcher() as opened:
        yield opened


@pytest.mark.parametrize(("text", "number"), [("", 4), ("0", 0), ("12", 12)])
def test_how_many_are_kept_can_be_said(text: str, number: int) -> None:
    assert most_kept({"HUTCH_IMAGE_TEMPLATES": text}) == number


@pytest.mark.parametrize("text", ["-1", "many", "1.5", "٣"])
def test_a_number_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="HUTCH_IMAGE_TEMPLATES"):
        most_kept({"HUTCH_IMAGE_TEMPLATES": text})


# ---- the disk -------------------------------------------------------------------------


@requires("mke2fs")
def test_only_an_empty_disk_is_replaced(launch: Launch, tmp_path: Path) -> None:
    empty = Disks(tmp_path).empty(64 << 20)
    kept = tmp_path / "kept"
    kept.write_bytes(b"mounted")
    assert images._same_content(launch.disk, empty)
    with open(launch.disk, "r+b") as disk:
        disk.seek(20 << 20)
        disk.write(b"x")
    assert not images._same_content(launch.disk, empty)
    with open(launch.disk, "r+b") as disk:
        disk.seek(20 << 20)
        disk.write(b"\0")
    assert images._same_content(launch.disk, empty)
    assert images._replace(launch.disk, kept)
    assert Path(launch.disk).read_bytes() == b"mounted"


def test_a_disk_is_replaced_at_once_or_not_at_all(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"own")
    (tmp_path / "disk.raw.new").write_bytes(b"of a start that was killed")
    assert not images._replace(str(disk), tmp_path / "gone")
    assert disk.read_bytes() == b"own"
    (tmp_path / "kept").write_bytes(b"mounted")
    assert images._replace(str(disk), tmp_path / "kept")
    assert disk.read_bytes() == b"mounted"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk.raw", "kept"]


# ---- machines -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine whose image `busybox` has a template of its own, for plain starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HUTCH_IMAGE_TEMPLATES", "4")
        with machine_root(tmp_path_factory.mktemp("images") / "root") as opened:
            for _ in range(2):
                start(opened).remove(force=True)
            until(lambda: bool(_made(opened)), "no template of the image")
            yield opened
            opened._context.networks.teardown()


def _made(engine: Engine) -> set[str]:
    found = {s.parent.name for s in (engine.root / "templates").glob("*/state")}
    return {k for k in found if (engine.root / "templates" / k / images.DISK).exists()}


def _is_from_image(engine: Engine, box: Instance) -> bool:
    record = engine._context.machines.record(box.id)
    assert record is not None and record.template
    return record.template in _made(engine)


@contextmanager
def _told(engine: Engine) -> Iterator[list[str]]:
    """Give the keys of the templates that starts within the block have made; one at least."""
    asked: list[str] = []
    machines = type(engine._context.machines._machines)
    prepare = machines._start_preparing

    def tell(self: Any, key: str) -> None:
        asked.append(key)
        prepare(self, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machines, "_start_preparing", tell)
        yield asked
    assert asked, "no template was asked for"


def machines(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that starts machines."""
    for mark in NEEDS:
        test = mark(test)
    return test


@machines
@pytest.mark.parametrize("count", [20])
@pytest.mark.timeout(400)
def test_clones_of_one_image_are_different_machines(engine: Engine, count: int) -> None:
    show = "hostname; cat /etc/hostname; cat /proc/sys/kernel/random/uuid; date +%s; ls /root"
    with nothing_left(engine), ThreadPoolExecutor(count) as pool:
        boxes = list(pool.map(lambda _: start(engine), range(count)))
        try:
            assert all(_is_from_image(engine, box) for box in boxes)
            assert_confined(engine, boxes[0])
            list(pool.map(lambda box: box.exec(["touch", f"/root/{box.id}"]), boxes))
            said = [s.split() for s in pool.map(lambda b: b.exec(["sh", "-c", show]).text, boxes)]
            assert [s[0] for s in said] == [s[1] for s in said] == [box.id[:12] for box in boxes]
            assert len({s[2] for s in said}) == count, "two clones have the same entropy"
            assert all(abs(int(s[3]) - time.time()) < 60 for s in said)
            assert [s[4:] for s in said] == [[box.id] for box in boxes]
        finally:
            list(pool.map(lambda box: box.remove(force=True), boxes))


@pytest.mark.versions
@machines
def test_user_network_input_and_exit_code_are_the_instances(engine: Engine) -> None:
    script = "id -u; id -g; umask; pwd; ulimit -n; hostname; cd /sys/class/net/eth0; "
    script += "cat operstate address; ip route | grep -o '^default'; "
    script += "grep -E '^(Cap[EB]|NoN|Seccomp:)' /proc/self/status | tr -s '\\t\\n' '  '; "
    script += "cat; echo problem >&2; exit 3"
    options: dict[str, Any] = {**SMALL, "user": "7:9", "workdir": "/made/here"}
    options["ulimits"] = {"nofile": "99:99"}
    del options["network"]
    options["tmpfs"] = [f"/{secrets.token_hex(8)}"]  # a template that nothing else makes
    # One that goes when it ends, and one with an input, are from other templates than others.
    with _told(engine) as asked:
        for _ in range(2):
            engine.run("busybox", ["true"], **options, input=b"given")
    until(lambda: _made(engine).issuperset(asked), "no template for this user")
    mac = "02:00:00:00:0a:0b"
    done = engine.run(
        "busybox", ["sh", "-c", script], **options, hostname="mine", mac_address=mac, input=b"given"
    )
    assert (
        done.stdout.decode().split()
        == (
            f"7 9 0022 /made/here 99 mine up {mac} default CapEff: 0000000000000000 "
            "CapBnd: 00000000a80425fb NoNewPrivs: 1 Seccomp: 2 given"
        ).split()
    )
    assert (done.exit_code, done.stderr) == (3, b"problem\n")


@machines
def test_a_program_that_is_not_there_is_named(engine: Engine) -> None:
    with nothing_left(engine), pytest.raises(CommandFailed, match="missing") as error:
        engine.run("busybox", ["missing"], **SMALL)
    assert error.value.exit_code == 127


@machines
def test_a_disk_in_use_keeps_what_was_written(engine: Engine) -> None:
    wishes = sorted((engine.root / "templates").glob(".wish-*"))
    with nothing_left(engine):
        box = start(engine)
        try:
            assert _is_from_image(engine, box)
            box.exec(["sh", "-c", "echo kept >/root/note; sync"])
            for _ in range(2):
                box.restart()
                assert not _is_from_image(engine, box)
                assert box.exec(["cat", "/root/note"]).text == "kept\n"
            assert sorted((engine.root / "templates").glob(".wish-*")) == wishes
        finally:
            box.remove(force=True)


@machines
def test_a_file_put_there_before_the_first_start_is_kept(engine: Engine) -> None:
    box = engine.create("busybox", ["cat", "/root/note"], **SMALL)
    try:
        box.files.write("/root/note", b"early")
        box.start()
        assert box.wait() == 0
        assert b"".join(record.data for record in box.logs()) == b"early"
    finally:
        box.remove(force=True)


@machines
def test_a_template_that_cannot_be_resumed_goes(engine: Engine) -> None:
    with nothing_left(engine):
        box = start(engine)
        record = engine._context.machines.record(box.id)
        box.remove(force=True)
        assert record is not None
        os.truncate(engine.root / "templates" / record.template / "state", 1000)
        with pytest.raises(Unavailable, match="cannot be resumed"):
            start(engine)
        box = start(engine)
        assert not _is_from_image(engine, box)
        box.remove(force=True)
        for failed in engine.list(all=True):
            engine.get(failed.id).remove(force=True)
        start(engine).remove(force=True)  # the second of this image since the template went
    until(lambda: bool(_made(engine)), "no other template of the image")


STEPS = [
    (making, "copy_sparse"),
    (making, "resume"),
    (templates, "fill_memory"),
    (templates, "listen_at"),
]


@machines
@pytest.mark.parametrize(("module", "name"), STEPS, ids=[name for _, name in STEPS])
def test_a_template_that_cannot_be_made_leaves_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    machines = engine._context.machines._machines
    asked: list[str] = []
    monkeypatch.setattr(type(machines), "_start_preparing", lambda _, key: asked.append(key))
    own = [f"/{secrets.token_hex(8)}"]  # a template that nothing else makes
    with nothing_left(engine):
        for _ in range(2):
            start(engine, tmpfs=own).remove(force=True)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(module, name, fail)
    with nothing_left(engine), pytest.raises(OSError, match="no space"):
        machines.prepare(asked[0])
    assert not (engine.root / "templates" / asked[0]).exists()
    start(engine, tmpfs=own).remove(force=True)
    assert len(asked) == 1, "every start tries it again"


@machines
def test_the_addresses_are_the_clones_own(engine: Engine) -> None:
    options: dict[str, Any] = {"network": "bridge", "tmpfs": [f"/{secrets.token_hex(8)}"]}
    with _told(engine) as asked:
        for _ in range(2):
            start(engine, **options).remove(force=True)
    until(lambda: _made(engine).issuperset(asked), "no template with a card")
    boxes = [start(engine, **options) for _ in range(2)]
    try:
        assert all(_is_from_image(engine, box) for box in boxes)
        said = [box.exec(["ip", "-o", "address", "show", "eth0"]).text for box in boxes]
        macs = {box.exec(["cat", "/sys/class/net/eth0/address"]).text for box in boxes}
        own = [box.exec(["hostname", "-i"]).text.strip() for box in boxes]
        assert all(address in text for address, text in zip(own, said, strict=True))
        assert len(set(own)) == len(macs) == 2
        assert boxes[0].exec(["ping", "-c1", "-W9", own[1]]).exit_code == 0
    finally:
        for box in boxes:
            box.remove(force=True)


@machines
def test_pruning_takes_them_too(engine: Engine) -> None:
    engine._context.machines.prune_templates()
    assert not _made(engine)
    box = start(engine)
    assert not _is_from_image(engine, box)
    box.remove(force=True)
