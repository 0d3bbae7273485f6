"""Spans of what was answered."""

from __future__ import annotations

import pytest

from hutch.api.docker.front import Served
from hutch.daemon import tracing
from hutch.errors import Unavailable


def test_an_answer_is_a_span_in_its_clients_trace() -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    observe = tracing.tracer_of(provider)
    trace = "0af7651916cd43dd8448eb211c80319c"
    observe(
        Served(
            method="GET",
            route=None,
            status=404,
            seconds=0.25,
            traceparent=f"00-{trace}-b7ad6b7169203331-01",
        )
    )
    (span,) = exporter.get_finished_spans()
    assert f"{span.context.trace_id:032x}" == trace
    assert span.attributes is not None
    assert span.attributes["http.response.status_code"] == 404
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.end_time - span.start_time == 250_000_000


def test_traces_are_asked_for_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not tracing.is_configured()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    assert tracing.is_configured()


def test_without_the_extra_the_cure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    with pytest.raises(Unavailable) as caught:
        tracing.load_provider()
    assert "hutch[telemetry]" in (caught.value.hint or "")
