"""Spans to a collector that speaks OTLP over gRPC (https://opentelemetry.io/docs/specs/otlp/).

The only module that imports OpenTelemetry, whose packages come with `logicrd[tracing]`. Its batch processor has a
bounded queue, of which the oldest span gives way, and one thread. What the collector does not take in time is lost
and counted. Called by `tracing`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from pipeline.metrics import Metrics
from pipeline.replicas import credentials
from pipeline.servers import Tracing as TracingSettings
from pipeline.types import Span

_EXPORT_TIMEOUT_S = 5.0
_EVERY_MS = 1_000
_GIVE_UP_S = 0.5
_MAX_WAITING = 8_192

log = structlog.get_logger(__name__)


class Collector:
    """Where spans go; `send` from any thread, never blocking. Raises ConfigError for a file that cannot be read."""

    def __init__(self, settings: TracingSettings, told: Mapping[str, str], metrics: Metrics) -> None:
        self._exporter = OTLPSpanExporter(
            endpoint=settings.address,
            insecure=settings.tls is None,
            credentials=None if settings.tls is None else credentials(settings.tls, "tracing.tls"),
            timeout=_EXPORT_TIMEOUT_S,
        )
        self._ids = _Ids()
        self._provider = TracerProvider(
            ALWAYS_ON, Resource.create(told), shutdown_on_exit=False, id_generator=self._ids
        )
        watched = _Watched(self._exporter, settings.address, metrics)
        self._provider.add_span_processor(
            BatchSpanProcessor(watched, max_queue_size=_MAX_WAITING, schedule_delay_millis=_EVERY_MS)
        )
        self._tracer = self._provider.get_tracer("logicrd")

    def send(self, span: Span) -> None:
        """Queue a span."""
        self._ids.next(span)
        link = None if span.link is None else [trace.Link(_context_of(span.link))]
        made = self._tracer.start_span(
            span.name,
            context=_below(span),
            kind=trace.SpanKind.CLIENT if span.is_call else trace.SpanKind.INTERNAL,
            attributes=span.attributes,
            links=link,
            start_time=_wall_ns(span.began_s),
        )
        if span.is_error:
            made.set_status(trace.StatusCode.ERROR)
        made.end(_wall_ns(span.ended_s))

    def close(self, timeout_s: float) -> None:
        """Send what is left, for as long; the library's own end would wait for half a minute."""
        thread = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if thread.is_alive():
            self._exporter.shutdown()  # no more attempts
            thread.join(_GIVE_UP_S)


class _Ids(IdGenerator):
    """Gives the library the names that the line has for its spans; each thread makes one at a time."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def next(self, span: Span) -> None:
        self._of_thread.span = span

    def generate_span_id(self) -> int:
        return int(self._of_thread.span.span_id)

    def generate_trace_id(self) -> int:
        return int(self._of_thread.span.trace_id)


class _Watched(SpanExporter):
    """Counts what an exporter sends, and says once of a spell that it cannot; called by the processor's thread."""

    def __init__(self, exporter: SpanExporter, address: str, metrics: Metrics) -> None:
        self._exporter = exporter
        self._address = address
        self._metrics = metrics
        self._failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        is_good = result is SpanExportResult.SUCCESS
        self._metrics.spans.labels("sent" if is_good else "lost").inc(len(spans))
        if is_good and self._failing:
            log.info("traces reach the collector again", address=self._address)
        elif not is_good and not self._failing:
            log.warning("traces do not reach the collector: they are lost meanwhile", address=self._address)
        self._failing = not is_good
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


def _below(span: Span) -> Context:
    """Give the context to make a span in: that of its parent, or none for a root."""
    if span.parent_id is None:
        return Context()
    return trace.set_span_in_context(trace.NonRecordingSpan(_context(span.trace_id, span.parent_id)))


def _context_of(traceparent: str) -> trace.SpanContext:
    _, trace_id, span_id, _ = traceparent.split("-")
    return _context(int(trace_id, 16), int(span_id, 16))


def _context(trace_id: int, span_id: int) -> trace.SpanContext:
    return trace.SpanContext(trace_id, span_id, False, trace.TraceFlags(trace.TraceFlags.SAMPLED))


def _wall_ns(moment_s: float) -> int:
    """Tell a moment of the monotonic clock by the wall clock as it is now."""
    return time.time_ns() - int((time.monotonic() - moment_s) * 1e9)
