"""Traces as a collector on the loopback gets them, by OpenTelemetry's own exporter."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.api.docker.conftest import Client, Daemon
from tests.clients.conftest import load
from tests.requires import requires

pytestmark = requires("root", "overlayfs", "cgroup")

_TRACE, _PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """Takes what is exported."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Any] = []
        self.services: set[str] = set()

    def take(self, data: bytes) -> None:
        decoder = load("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
        for resource in decoder.ExportTraceServiceRequest.FromString(data).resource_spans:
            for attribute in resource.resource.attributes:
                if attribute.key == "service.name":
                    self.services.add(attribute.value.string_value)
            for scope in resource.scope_spans:
                self.spans += scope.spans


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/traces":
            assert isinstance(self.server, Collector)
            self.server.take(data)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_collector_gets_a_span_of_each_request(
    collector: Collector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "hutch-traced")
    daemon = Daemon(tmp_path / "root", tmp_path)  # the session's root has a daemon
    try:
        parent = {"traceparent": f"00-{_TRACE}-{_PARENT}-01"}
        Client(daemon.path).ask("GET", "/containers/nonesuch/json", None, parent)
    finally:
        code = daemon.stop()
    assert code == 0, daemon.log.read_text()
    assert collector.services == {"hutch-traced"}
    (span,) = [s for s in collector.spans if s.name == "GET /containers/{id}/json"]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (_TRACE, _PARENT)
    told = {a.key: a.value.string_value or a.value.int_value for a in span.attributes}
    assert told["http.response.status_code"] == 404
    assert 0 < span.start_time_unix_nano <= span.end_time_unix_nano
