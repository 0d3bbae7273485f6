"""Pull and unpack of a 250 MB image from a registry on loopback; unpacking alone."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import shutil
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from bench.measure import Action, Row, measure
from bench.peers import Podman, dockerd

if TYPE_CHECKING:
    from bench.cases import Peers
    from bench.stage import Stage

__all__ = ["PULL_CASES", "big_image", "stored_layers"]

SIZE = 250 << 20
LAYERS = 3
_SOURCES = ("/usr/lib/python3", "/usr/include", "/usr/share", "/usr/lib", "/usr/bin")


def _files() -> Iterator[Path]:
    """Yield ordinary files of this machine, in one order, until there are enough of them."""
    total = 0
    for source in _SOURCES:
        for path in sorted(Path(source).rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            size = path.stat().st_size
            if size > 16 << 20:
                continue
            total += size
            yield path
            if total > SIZE:
                return


def big_image(directory: Path) -> list[Path]:
    """Make an OCI layout of three gzipped layers of real files; return the layers."""
    blobs = directory / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(content: bytes) -> dict[str, object]:
        digest = hashlib.sha256(content).hexdigest()
        (blobs / digest).write_bytes(content)
        return {"digest": f"sha256:{digest}", "size": len(content)}

    everything = list(_files())
    share = -(-len(everything) // LAYERS)
    diff_ids, layers, paths = [], [], []
    for number in range(LAYERS):
        tar = directory / f"{number}.tar"
        with tarfile.open(tar, "w") as archive:
            for path in everything[number * share : (number + 1) * share]:
                archive.add(path, recursive=False)
        plain = tar.read_bytes()
        diff_ids.append(f"sha256:{hashlib.sha256(plain).hexdigest()}")
        entry = put(gzip.compress(plain, 6, mtime=0))
        layers.append({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", **entry})
        paths.append(blobs / str(entry["digest"]).removeprefix("sha256:"))
        tar.unlink()
    config = put(
        msgspec.json.encode(
            {
                "os": "linux",
                "architecture": "amd64",
                "config": {"Cmd": ["true"]},
                "rootfs": {"type": "layers", "diff_ids": diff_ids},
            }
        )
    )
    manifest = put(
        msgspec.json.encode(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **config},
                "layers": layers,
            }
        )
    )
    entry = {"mediaType": "application/vnd.oci.image.manifest.v1+json", **manifest}
    entry["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    index = {"schemaVersion": 2, "manifests": [entry]}
    (directory / "index.json").write_bytes(msgspec.json.encode(index))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return paths


def stored_layers(layout: Path) -> list[Path]:
    """Return the layers of an OCI layout of one image, lowest first."""
    blobs = layout / "blobs/sha256"
    entries = msgspec.json.decode((layout / "index.json").read_bytes())["manifests"]
    manifest = msgspec.json.decode((blobs / entries[0]["digest"][7:]).read_bytes())
    return [blobs / layer["digest"][7:] for layer in manifest["layers"]]


@contextlib.contextmanager
def registry(directory: Path) -> Iterator[str]:
    """Debian's docker-registry on a free port of loopback; yields host:port."""
    directory.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = directory / "config.yml"
    config.write_text(
        "version: 0.1\nlog: {level: error}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory / 'data'}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
    )
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def _in_memory(directory: Path) -> None:
    """Put a memory file system on a directory, unless the case was there before."""
    directory.mkdir(exist_ok=True)
    if not directory.is_mount():
        subprocess.run(["mount", "-t", "tmpfs", "bench", str(directory)], check=True)


def _publish(layout: Path, reference: str) -> None:
    subprocess.run(
        [
            *("skopeo", "copy", "-q", "--dest-tls-verify=false"),
            *(f"oci:{layout}:latest", f"docker://{reference}"),
        ],
        check=True,
    )


def _timed(pull: Callable[[], object], forget: Callable[[], object]) -> float:
    """Return how long a pull takes; make it anew each time."""
    began = time.perf_counter()
    pull()
    taken = time.perf_counter() - began
    forget()
    return taken


def _pulls(stage: Stage, state: Path, case: str, rounds: int) -> Row:
    """Measure the three with all their state under `state`."""
    import hutch

    layout = stage.directory / "layout"
    if not layout.exists():
        big_image(layout)
    with (
        registry(stage.directory / "registry") as host,
        dockerd(state / "docker") as docker,
        hutch.Engine(state / "hutch") as engine,
    ):
        podman = Podman(state / "podman")
        name = f"{host}/bench/big:latest"
        _publish(layout, name)
        ways: dict[str, Action] = {
            "hutch": lambda: _timed(
                lambda: engine.images.pull(name), lambda: engine.images.remove(name, force=True)
            ),
            "docker": lambda: _timed(
                lambda: docker("pull", "-q", name), lambda: docker("rmi", name)
            ),
            "podman": lambda: _timed(
                lambda: podman("pull", "-q", "--tls-verify=false", name),
                lambda: podman("rmi", name),
            ),
        }
        targets = {"docker": 0.7, "podman": 0.7}
        return measure(case, ways, rounds=rounds, targets=targets, gap_s=1.0)


def pull(stage: Stage, with_peers: Peers, rounds: int) -> Row:
    """Pull and unpack, from nothing present to ready to run; all state in memory."""
    state = stage.directory / "memory"
    _in_memory(state)
    case = "pull and unpack of 250 MB from loopback, state in memory"
    return _pulls(stage, state, case, max(3, rounds // 4))


def pull_to_disk(stage: Stage, with_peers: Peers, rounds: int) -> Row:
    """The same onto this machine's disk, which other work blurs."""
    state = stage.directory / "disk"
    state.mkdir()
    case = "pull and unpack of 250 MB from loopback, state on disk"
    return _pulls(stage, state, case, max(2, rounds // 8))


def unpack(stage: Stage, with_peers: Peers, rounds: int) -> Row:
    """Unpack three gzipped layers into memory, one after the other: no disk blurs it."""
    from hutch.storage.unpack import unpack as unpack_stream

    layout = stage.directory / "layout"
    if not layout.exists():
        big_image(layout)
    layers = stored_layers(layout)
    memory = stage.directory / "memory"
    _in_memory(memory)

    def timed(way: Callable[[Path, Path], object]) -> float:
        target = memory / "unpacked"
        target.mkdir()
        began = time.perf_counter()
        for number, layer in enumerate(layers):
            (target / str(number)).mkdir()
            way(layer, target / str(number))
        taken = time.perf_counter() - began
        shutil.rmtree(target)
        return taken

    def with_hutch(layer: Path, target: Path) -> None:
        root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with open(layer, "rb") as stream:
                unpack_stream(stream, root)
        finally:
            os.close(root)

    def with_tarfile(layer: Path, target: Path) -> None:
        with tarfile.open(layer) as archive:
            archive.extractall(target, filter="fully_trusted")

    def with_tar(layer: Path, target: Path) -> None:
        subprocess.run(["tar", "-xzf", str(layer), "-C", str(target)], check=True)

    return measure(
        "unpack of 250 MB",
        {
            "hutch": lambda: timed(with_hutch),
            "tarfile": lambda: timed(with_tarfile),
            "tar": lambda: timed(with_tar),
        },
        rounds=max(3, rounds // 6),
        targets={"tarfile": 0.35, "tar": 1.3},
    )


PULL_CASES: dict[str, Callable[[Stage, Peers, int], Row | list[Row]]] = {
    "pull": pull,
    "pull-disk": pull_to_disk,
    "unpack": unpack,
}
