"""A registry of the test's own: Debian's docker-registry on loopback, images put into it
byte by byte, and a proxy before it that misbehaves on demand."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import json
import shutil
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from hutch.image.catalog import Images, image_roots
from hutch.image.registry_config import RegistryConfig
from hutch.oci.types import MediaType
from hutch.storage.content import ContentStore
from hutch.storage.gc import Collector
from hutch.storage.layers import Layers
from hutch.storage.leases import Leases
from hutch.storage.trash import Trash
from hutch.store.database import Store

USER, PASSWORD = "alice", "s3cret-word"
# bcrypt of PASSWORD: docker-registry takes no other hash.
HTPASSWD = "alice:$2y$05$IVg7WWspCaKpcc.NSgvvSe.tWqJFv5xoE1nVCsLIAnnPDpg1wLuQS"
FAST = RegistryConfig(auth_files=(), max_wait_s=0.02, read_timeout_s=10, tries=4)
"""Settings that wait for nothing and look at no one's credentials."""


class Root:
    """Everything an engine would open on one root."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.store = Store.open(path / "hutch.db")
        self.images = Images(self.store)
        self.content = ContentStore(path, durable=False)
        self.trash = Trash(path)
        self.layers = Layers(path, trash=self.trash)
        self.leases = Leases(self.store)

    def parts(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "content": self.content,
            "layers": self.layers,
            "leases": self.leases,
        }

    def collector(self) -> Collector:
        return Collector(self.store, self.content, self.layers, self.trash, image_roots)

    def close(self) -> None:
        self.trash.drain(10)
        self.store.close()


# ---- content ------------------------------------------------------------------------------


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def tar(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


class Blob(msgspec.Struct, frozen=True):
    """A piece of content with its media type."""

    data: bytes
    media_type: str

    @property
    def digest(self) -> str:
        return digest(self.data)

    def descriptor(self, **more: Any) -> dict[str, Any]:
        size = len(self.data)
        return {"mediaType": self.media_type, "digest": self.digest, "size": size, **more}


class Image(msgspec.Struct, frozen=True):
    """An image made by hand."""

    manifest: Blob
    config: Blob
    layers: list[Blob]


_LAYER_TYPES = {
    ("oci", "gzip"): MediaType.OCI_LAYER_GZIP,
    ("oci", "zstd"): MediaType.OCI_LAYER_ZSTD,
    ("oci", ""): MediaType.OCI_LAYER,
    ("docker", "gzip"): MediaType.DOCKER_LAYER_GZIP,
    ("docker", ""): MediaType.DOCKER_LAYER,
}


def compressed(data: bytes, how: str) -> bytes:
    if how == "gzip":
        return gzip.compress(data, 1, mtime=0)
    return zstandard.compress(data) if how == "zstd" else data


def make_image(
    *layers: Mapping[str, bytes],
    how: str = "gzip",
    flavour: str = "oci",
    architecture: str = "amd64",
    config: Mapping[str, Any] | None = None,
    diff_ids: list[str] | None = None,
) -> Image:
    plain = [tar(files) for files in layers]
    kind = _LAYER_TYPES[flavour, how]
    blobs = [Blob(compressed(data, how), kind) for data in plain]
    document = {
        "architecture": architecture,
        "os": "linux",
        "created": "2024-05-06T07:08:09Z",
        "config": dict(config or {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]}),
        "rootfs": {"type": "layers", "diff_ids": diff_ids or [digest(data) for data in plain]},
        "history": [{"created_by": f"layer {n}"} for n in range(len(plain))],
    }
    oci = flavour == "oci"
    config_blob = Blob(
        json.dumps(document).encode(), MediaType.OCI_CONFIG if oci else MediaType.DOCKER_CONFIG
    )
    manifest_type = MediaType.OCI_MANIFEST if oci else MediaType.DOCKER_MANIFEST
    manifest = {
        "schemaVersion": 2,
        "mediaType": manifest_type,
        "config": config_blob.descriptor(),
        "layers": [blob.descriptor() for blob in blobs],
    }
    return Image(Blob(json.dumps(manifest).encode(), manifest_type), config_blob, blobs)


def make_index(entries: list[tuple[Image, dict[str, Any]]], *, flavour: str = "oci") -> Blob:
    kind = MediaType.OCI_INDEX if flavour == "oci" else MediaType.DOCKER_LIST
    document = {
        "schemaVersion": 2,
        "mediaType": kind,
        "manifests": [image.manifest.descriptor(platform=p) for image, p in entries],
    }
    return Blob(json.dumps(document).encode(), kind)


# ---- the registry -------------------------------------------------------------------------


class Registry:
    """A docker-registry that is running, reached by plain HTTP (`host`)."""

    def __init__(self, host: str, authorization: str = "") -> None:
        self.host = host
        self._headers = {"Authorization": authorization} if authorization else {}

    def call(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.host, timeout=20)
        try:
            sent = {**self._headers, **{k.replace("_", "-"): v for k, v in headers.items()}}
            connection.request(method, path, body=body, headers=sent)
            answer = connection.getresponse()
            data = answer.read()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, data
        finally:
            connection.close()

    def put_blob(self, repository: str, data: bytes) -> None:
        status, headers, _ = self.call("POST", f"/v2/{repository}/blobs/uploads/", b"")
        assert status == 202, status
        path = headers["location"].split(self.host, 1)[-1]
        status, _, said = self.call(
            "PUT",
            f"{path}&digest={digest(data)}",
            data,
            Content_Type="application/octet-stream",
        )
        assert status == 201, (status, said)

    def put_manifest(self, repository: str, target: str, blob: Blob) -> None:
        status, _, said = self.call(
            "PUT", f"/v2/{repository}/manifests/{target}", blob.data, Content_Type=blob.media_type
        )
        assert status == 201, (status, said)

    def put_image(self, repository: str, tag: str, image: Image) -> None:
        for blob in (*image.layers, image.config):
            self.put_blob(repository, blob.data)
        self.put_manifest(repository, tag, image.manifest)

    def put_index(self, repository: str, tag: str, index: Blob, images: list[Image]) -> None:
        for image in images:
            self.put_image(repository, digest(image.manifest.data), image)
        self.put_manifest(repository, tag, index)


@contextmanager
def running_registry(directory: Path, *, auth: str = "", tls: str = "") -> Iterator[str]:
    """Run docker-registry beneath `directory` and yield its host:port."""
    program = shutil.which("docker-registry")
    assert program is not None
    directory.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    config = directory / "config.yml"
    config.write_text(
        "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
        f"storage:\n  filesystem: {{rootdirectory: {directory}/data}}\n"
        "  delete: {enabled: true}\n"
        f"http:\n  addr: 127.0.0.1:{port}\n  secret: test\n{tls}{auth}"
    )
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "serve", str(config)], stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
        try:
            _wait_for_port(port, process, directory / "log")
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            threading.Event().wait(0.02)


# ---- the proxy ----------------------------------------------------------------------------


class Asked(msgspec.Struct):
    """One request that went through the proxy."""

    method: str
    path: str
    headers: dict[str, str]


class Fault(msgspec.Struct):
    """What to do with an answer: replace its status, headers, body, or cut it short.

    `cut`: close the connection after that many bytes of the body; `forward=False`: do not
    ask the registry at all; `hang_up`: close the connection without an answer.
    """

    status: int | None = None
    headers: dict[str, str] = {}
    body: bytes | None = None
    cut: int | None = None
    forward: bool = True
    hang_up: bool = False
    drop_headers: tuple[str, ...] = ()
    drop_request_headers: tuple[str, ...] = ()
    before: Callable[[], None] | None = None


Rule = Callable[[Asked], Fault | None]


class Proxy(ThreadingHTTPServer):
    """Passes requests on to a registry, with faults by `rule`; remembers what was asked."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.rule: Rule = lambda asked: None
        self.asked: list[Asked] = []
        self.guard = threading.Lock()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def count(self, method: str, part: str) -> int:
        return sum(a.method == method and part in a.path for a in self.asked)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Header and body are two writes: with Nagle's algorithm each answer takes 40 ms.
    disable_nagle_algorithm = True
    server: Proxy

    def log_message(self, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        headers = {k.lower(): v for k, v in self.headers.items()}
        asked = Asked(self.command, self.path, headers)
        with self.server.guard:
            self.server.asked.append(asked)
            fault = self.server.rule(asked) or Fault()
        if fault.before is not None:
            fault.before()
        status, sent, data = (
            self._forward(headers, body, fault) if fault.forward else (200, {}, b"")
        )
        if fault.hang_up:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        status = fault.status or status
        data = data if fault.body is None else fault.body
        if fault.body is not None or not fault.forward:
            sent["content-length"] = str(len(data))
        sent = {k: v for k, v in {**sent, **fault.headers}.items() if k not in fault.drop_headers}
        self.send_response_only(status)
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if fault.cut is None else data[: fault.cut])
            self.wfile.flush()
        if fault.cut is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _forward(
        self, headers: dict[str, str], body: bytes, fault: Fault
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.server.target, timeout=20)
        try:
            skip = {"connection", *fault.drop_request_headers}
            passed = {k: v for k, v in headers.items() if k not in skip}
            connection.request(self.command, self.path, body=body, headers=passed)
            answer = connection.getresponse()
            data = answer.read()
            sent = {k.lower(): v for k, v in answer.getheaders()}
            sent.pop("transfer-encoding", None)
            if self.command != "HEAD":
                sent["content-length"] = str(len(data))
            return answer.status, sent, data
        finally:
            connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _handle


@contextmanager
def running_proxy(target: str) -> Iterator[Proxy]:
    proxy = Proxy(target)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()
