"""Images at the command line: what is shown, what is left behind, and how it ends."""

from __future__ import annotations

import gzip
import json
import os
import signal
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.image.registries import (
    Asked,
    Fault,
    Proxy,
    Registry,
    make_image,
    running_proxy,
    running_registry,
    tar,
)
from tests.requires import requires

pytestmark = [requires("root", "busybox")]


@pytest.fixture
def empty(tmp_path: Path) -> Cli:
    """The command line on a root with nothing in it."""
    return Cli(tmp_path / "root")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as host:
        yield Registry(host)


@pytest.fixture
def proxy(registry: Registry) -> Iterator[Proxy]:
    with running_proxy(registry.host) as running:
        yield running


def left(root: Path) -> list[str]:
    """Return what work on images may leave: blobs, parts, layers, scratch directories."""
    found = []
    for place in ("blobs", "ingest", "layers", "tmp"):
        for directory, names, files in os.walk(root / place):
            found += [f"{directory}/{n}" for n in files]
            found += [f"{directory}/{n}" for n in names if place in ("layers", "tmp")]
    return found


# ---- what is shown ----------------------------------------------------------------------


@requires("docker-registry")
def test_pull_prints_the_name_it_was_asked_for(registry: Registry, empty: Cli) -> None:
    image = make_image({"a": b"1"})
    for tag in ("1", "10"):
        registry.put_image("named", tag, image)
    assert empty.out("pull", "-q", f"{registry.host}/named:10").endswith("/named:10\n")
    assert empty.out("pull", "-q", f"{registry.host}/named:1").endswith("/named:1\n")
    shown = json.loads(empty.out("pull", "-q", "-o", "json", f"{registry.host}/named:1"))
    assert shown["Name"] == f"{registry.host}/named:1"


def test_load_prints_the_names_that_came_with_the_archive(empty: Cli, tmp_path: Path) -> None:
    empty.out("image", "bootstrap", "-q", "busybox")
    empty.out("save", "-o", str(tmp_path / "one.tar"), "busybox")
    empty.out("tag", "busybox", "other:2")
    assert (
        empty.out("load", "-q", "-i", str(tmp_path / "one.tar")) == "Loaded image: busybox:latest\n"
    )
    identifier = empty.out("images", "-q", "--no-trunc").split()[0]
    data = subprocess.run([*empty.argv, "save", identifier], capture_output=True, check=True).stdout
    assert empty.out("load", "-q", input=gzip.compress(data)) == f"Loaded image ID: {identifier}\n"


@pytest.mark.parametrize("command", [["import", "-"], ["load"]])
def test_an_empty_pipe_is_refused(command: list[str], empty: Cli) -> None:
    done = empty(*command, input=b"")
    assert done.returncode == 1
    assert b"empty" in done.stderr
    assert left(empty.root) == []


def test_the_space_of_unused_images_is_reclaimable(empty: Cli) -> None:
    empty.out("image", "bootstrap", "-q", "busybox")
    row = json.loads(empty.out("df", "-o", "json"))[0]
    assert row["kind"] == "images" and row["active"] == 0
    assert row["reclaimable"] == row["size"] > 0
    empty.out("create", "busybox", "true")
    assert json.loads(empty.out("df", "-o", "json"))[0]["reclaimable"] == 0
    empty.out("prune", "-f")


# ---- where archives go --------------------------------------------------------------------


def test_a_device_given_as_output_stays_one(empty: Cli, tmp_path: Path) -> None:
    empty.out("image", "bootstrap", "-q", "busybox")
    name = empty.out("create", "busybox", "true").strip()
    device = tmp_path / "null"
    os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    empty.out("save", "-o", str(device), "busybox")
    empty.out("export", "-o", str(device), name)
    assert stat.S_ISCHR(os.stat(device).st_mode)
    assert sorted(os.listdir(tmp_path)) == ["null", "root"]
    empty.out("rm", name)


@pytest.mark.parametrize("target", ["missing/x.tar", "."])
def test_an_output_that_cannot_be_written_is_named_as_given(
    target: str, empty: Cli, tmp_path: Path
) -> None:
    empty.out("image", "bootstrap", "-q", "busybox")
    done = empty("save", "-o", str(tmp_path / target), "busybox")
    assert done.returncode == 1
    assert f"output: {tmp_path / target}: ".encode() in done.stderr


# ---- a full disk --------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Callable[[str], Cli]]:
    """Make the command line on a root with this much room."""
    place = tmp_path / "small"
    place.mkdir()
    mounted: list[Path] = []

    def make(size: str) -> Cli:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "hutch-test", str(place)]
        subprocess.run(command, check=True)
        mounted.append(place)
        return Cli(place)

    yield make
    for one in mounted:
        subprocess.run(["umount", str(one)], check=True)


LAYERS: list[dict[str, bytes]] = [
    {f"{n}/{i}": os.urandom(1 << 18) for i in range(4)} for n in "abcd"
]


@requires("docker-registry")
@pytest.mark.parametrize("size", ["300k", "1m", "3m", "5m", "7m"])
@pytest.mark.parametrize("command", ["pull", "load", "import"])
def test_a_full_disk_is_told_and_leaves_nothing(
    command: str, size: str, small: Callable[[str], Cli], registry: Registry, tmp_path: Path
) -> None:
    cli = small(size)
    if command == "pull":
        registry.put_image("full", "1", make_image(*LAYERS))
        done = cli("pull", "-q", f"{registry.host}/full:1")
    else:
        archive = tmp_path / "archive.tar"
        archive.write_bytes(
            _archive() if command == "load" else tar(LAYERS[0] | LAYERS[1] | LAYERS[2] | LAYERS[3])
        )
        done = cli(command, *(["-q", "-i"] if command == "load" else []), str(archive))
    assert done.returncode == 1
    # It is a layer, a blob or the records that the space runs out for first.
    assert b"no space left" in done.stderr and b"\nhint: free " in done.stderr
    assert left(cli.root) == []
    assert cli.out("images", "-q") == ""


def _archive() -> bytes:
    """Return a Docker archive of LAYERS."""
    image = make_image(*LAYERS)
    names = [f"{n}.tar" for n in range(len(LAYERS))]
    manifest = [{"Config": "config.json", "RepoTags": ["full:1"], "Layers": names}]
    files = dict(zip(names, (blob.data for blob in image.layers), strict=True))
    files |= {"config.json": image.config.data, "manifest.json": json.dumps(manifest).encode()}
    return tar(files)


@requires("mmdebstrap")
@pytest.mark.parametrize("size", ["120m"])
def test_a_full_disk_ends_a_bootstrap_and_nothing_else(
    size: str, small: Callable[[str], Cli]
) -> None:
    cli = small(size)
    # A group of its own, as mmdebstrap would hang up on the one it is in.
    done = subprocess.run(
        [*cli.argv, "image", "bootstrap", "-q", "debian:bookworm"],
        capture_output=True,
        process_group=0,
    )
    assert done.returncode == 1, done
    assert b"no space left" in done.stderr and b"\nhint: free " in done.stderr
    assert left(cli.root) == []


@requires("docker-registry")
def test_prune_frees_an_interrupted_pull(registry: Registry, proxy: Proxy, empty: Cli) -> None:
    image = make_image(LAYERS[0])
    registry.put_image("broken-off", "1", image)

    def break_off(asked: Asked) -> Fault | None:
        if image.layers[0].digest not in asked.path:
            return None
        return Fault(hang_up=True) if "range" in asked.headers else Fault(cut=300_000)

    proxy.rule = break_off
    empty.root.mkdir()
    (empty.root / "registries.json").write_text('{"tries": 1}')
    assert empty("pull", "-q", f"{proxy.host}/broken-off:1").returncode == 1
    assert sum(os.path.getsize(name) for name in left(empty.root) if ".part" in name) > 0
    empty.out("system", "prune", "-f")
    assert left(empty.root) == []


# ---- interrupts ---------------------------------------------------------------------------

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@requires("docker-registry")
@pytest.mark.parametrize("number", list(CODES))
def test_a_pull_that_is_ended_can_be_done_again(
    number: signal.Signals, registry: Registry, proxy: Proxy, empty: Cli
) -> None:
    registry.put_image("ended", "1", make_image(*LAYERS))
    asked, go = threading.Semaphore(0), threading.Event()

    def hold() -> None:
        asked.release()
        go.wait(60)

    proxy.rule = lambda a: Fault(before=hold) if "/blobs/" in a.path else None
    process = empty.spawn("pull", "-q", f"{proxy.host}/ended:1")
    assert asked.acquire(timeout=60)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (CODES[number], b"")
    go.set()
    assert empty.out("images", "-q") == ""
    assert not any("/layers/" in name for name in left(empty.root))
    proxy.rule = lambda a: None
    empty.out("pull", "-q", f"{proxy.host}/ended:1")


@pytest.mark.parametrize("number", list(CODES))
def test_a_load_that_is_ended_leaves_nothing(number: signal.Signals, empty: Cli) -> None:
    data = _archive()
    process = empty.spawn("load", "-q")
    assert process.stdin is not None
    process.stdin.write(data[: len(data) // 2])
    process.stdin.flush()
    _until(lambda: any("/blobs/" in name for name in left(empty.root)))
    process.send_signal(number)
    assert process.wait(60) == CODES[number]
    process.communicate()
    assert left(empty.root) == []


@requires("mmdebstrap")
@pytest.mark.parametrize("number", [*CODES, signal.SIGKILL])
def test_a_bootstrap_that_is_ended_leaves_no_process(number: signal.Signals, empty: Cli) -> None:
    process = empty.spawn("image", "bootstrap", "debian:bookworm")
    assert process.stderr is not None
    while (line := process.stderr.readline()) and b"installing" not in line:
        pass
    _until(lambda: any("mmdebstrap" in command for command in _working_on(empty.root)))
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == CODES.get(number, -number)
    _until(lambda: _working_on(empty.root) == [])
    if number == signal.SIGKILL:
        empty.out("system", "prune", "-f")
    assert left(empty.root) == []
    empty.out("image", "bootstrap", "-q", "busybox")


def _working_on(root: Path) -> list[str]:
    """Return the commands of processes that build in a root."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if f"TMPDIR={root}/".encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (OSError, ValueError):
            continue
    return found


def _until(condition: Callable[[], bool]) -> None:
    import time

    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


@requires("cgroup", "overlayfs")
@pytest.mark.parametrize(
    ("path", "target", "found"),
    [("dev", "etc", "a link"), ("proc", "/no-such", "a link"), ("sys", None, "no directory")],
)
def test_an_image_that_leads_the_kernels_files_elsewhere_is_named_with_the_cure(
    cli: Cli, name: str, tmp_path: Path, path: str, target: str | None, found: str
) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    if target is None:
        (root / path).touch()
    else:
        (root / path).symlink_to(target)
    archive = tmp_path / "image.tar"
    subprocess.run(["tar", "-C", root, "-cf", archive, "."], check=True)
    cli.out("import", str(archive), name)
    try:
        done = cli("run", "--rm", "--network", "none", name, "/bin/true")
    finally:
        cli.out("rmi", "-f", name)
    assert done.returncode == 125
    assert f"/{path} of the image is {found}".encode() in done.stderr
    assert f"a directory /{path}".encode() in done.stderr
