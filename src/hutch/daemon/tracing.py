"""Traces by OpenTelemetry, where its environment variables say where to and it is installed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hutch.errors import Unavailable

if TYPE_CHECKING:
    from hutch.api.docker.front import Served

__all__ = ["is_configured", "load_provider", "tracer_of"]

_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def is_configured() -> bool:
    """Tell whether the environment asks for traces."""
    return any(os.environ.get(name) for name in _VARIABLES)


def load_provider() -> Any:
    """Return OpenTelemetry's provider that exports by OTLP as the environment says."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as exc:
        raise Unavailable(
            f"{_VARIABLES[0]} is set, and OpenTelemetry is not installed",
            hint="pip install 'hutch[telemetry]', or unset the variable",
        ) from exc
    name = os.environ.get("OTEL_SERVICE_NAME", "hutch")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def tracer_of(provider: Any) -> Callable[[Served], None]:
    """Return what makes a span of each answer, in the trace that its client has begun."""
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    tracer = provider.get_tracer("hutch.docker")
    propagator = TraceContextTextMapPropagator()

    def observe(served: Served) -> None:
        now = time.time_ns()
        path = served.route.path if served.route else "unknown"
        span = tracer.start_span(
            f"{served.method} {path}",
            context=propagator.extract({"traceparent": served.traceparent}),
            kind=SpanKind.SERVER,
            start_time=now - int(served.seconds * 1e9),
            attributes={
                "http.request.method": served.method,
                "http.route": path,
                "http.response.status_code": served.status,
            },
        )
        span.end(end_time=now)

    return observe
