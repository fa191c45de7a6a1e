"""Traces of parts, from camera to Kafka (`tracing` of the line file).

A part's trace is named by its inspection id, and its spans by what they are, so that nothing is kept between the
stages: whether a part is traced, and what its request to Triton is called, follow from its identity. The spans of a
part are made at once when its verdict is stored, from the times that the stages took anyway. Decides nothing and holds
nothing back. Called by `judge` and `sink`; owned by `app`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.events import Event, Place, inspection_id
from pipeline.metrics import Metrics
from pipeline.servers import Tracing as TracingSettings
from pipeline.types import Attributes, Frame, Judgement, Part, PartVerdict, Span, ViewVerdict

if TYPE_CHECKING:
    from pipeline.otlp import Collector

_ROOT = "part"
# Of the bits of an inspection id, a UUID of version 5, those from the right that are neither version nor variant.
_HASHED_BITS = 56


class Tracing:
    """The traces of one worker; every call from any thread, none of them blocking but `start` and `close`."""

    def __init__(self, settings: TracingSettings, place: Place, metrics: Metrics) -> None:
        self._settings = settings
        self._place = place
        self._metrics = metrics
        self._collector: Collector | None = None

    def start(self) -> None:
        """Make ready to send; does not wait for the collector. Raises ConfigError."""
        try:
            from pipeline.otlp import Collector  # here: its packages are those of `logicrd[tracing]`
        except ImportError as error:
            hint = "pip install 'logicrd[tracing]', or take `tracing` out of the line file"
            raise ConfigError(f"tracing: {error}", hint=hint) from None
        told = {
            "service.name": "logicrd",
            "service.namespace": self._place.source,
            "service.instance.id": self._place.worker,
        }
        self._collector = Collector(self._settings, told, self._metrics)

    def close(self, timeout_s: float) -> None:
        """Send what is left, for as long."""
        if self._collector is not None:
            self._collector.close(timeout_s)

    def of_part(self, part: Part) -> str | None:
        """Give the context of a part's trace, for whoever goes on with it; None for a part that is not traced."""
        trace_id = self._trace_of(part)
        return None if trace_id is None else traceparent(trace_id, span_id_of(trace_id, _ROOT))

    def of_request(self, part: Part, frame: Frame) -> str | None:
        """Give the context of a frame's request to Triton; None for a part that is not traced."""
        trace_id = self._trace_of(part)
        return None if trace_id is None else traceparent(trace_id, span_id_of(trace_id, _of_view("inference", frame)))

    def stored(self, verdict: PartVerdict) -> None:
        """Send the spans of a part whose verdict can no longer be lost."""
        if self._collector is not None and (trace_id := self._trace_of(verdict.part)) is not None:
            for span in spans_of(verdict, trace_id, time.monotonic()):
                self._collector.send(span)

    def acknowledged(self, event: Event, sent_s: float) -> None:
        """Send the span of a verdict on its way to Kafka, which has it now."""
        parent = next((value for name, value in event.headers if name == "traceparent"), None)
        if self._collector is not None and parent is not None and event.is_part:
            trace_id = int(parent.split(b"-")[1], 16)
            self._collector.send(_child(trace_id, "kafka", sent_s, time.monotonic(), is_call=True))

    def _trace_of(self, part: Part) -> int | None:
        name = inspection_id(self._place.source, part.station, part.part_id, part.camera_id, part.meas_id)
        trace_id = trace_id_of(name)
        return trace_id if is_sampled(trace_id, self._settings.share) else None


def trace_id_of(inspection: str) -> int:
    """Name the trace of an inspection: its id, without the dashes."""
    return int(inspection.replace("-", ""), 16)


def is_sampled(trace_id: int, share: float) -> bool:
    """Say whether a part is among the share that is traced; every worker says the same of it."""
    return (trace_id & ((1 << _HASHED_BITS) - 1)) < share * (1 << _HASHED_BITS)


def span_id_of(trace_id: int, name: str) -> int:
    """Name a span of a trace."""
    return int.from_bytes(hashlib.sha256(f"{trace_id:032x}/{name}".encode()).digest()[:8]) or 1


def traceparent(trace_id: int, span_id: int) -> str:
    """Write the context of a sampled span (https://www.w3.org/TR/trace-context/)."""
    return f"00-{trace_id:032x}-{span_id:016x}-01"


def spans_of(verdict: PartVerdict, trace_id: int, stored_s: float) -> Iterator[Span]:
    """List a part's spans, the root first: of each view `capture`, `queue`, `inference`, `judge`; then `outbox`."""
    part = verdict.part
    told: Attributes = {
        "logicrd.part_id": part.part_id,
        "logicrd.part_id_source": part.part_id_source,
        "logicrd.station": part.station,
        "logicrd.product": part.product,
        "logicrd.sequence": verdict.sequence,
        "logicrd.verdict": verdict.judgement.value,
        "logicrd.causes": list(verdict.reasons),
    }
    began_s = min([part.opened_s, *(view.frame.captured_s for view in verdict.views)])
    is_error = verdict.judgement is Judgement.UNINSPECTED
    yield Span(_ROOT, trace_id, span_id_of(trace_id, _ROOT), None, began_s, stored_s, told, is_error=is_error)
    for view in verdict.views:
        yield from _spans_of_view(view, trace_id)
    yield _child(trace_id, "outbox", verdict.decided_s, stored_s)


def _spans_of_view(view: ViewVerdict, trace_id: int) -> Iterator[Span]:
    frame, inference = view.frame, view.inference
    moments = {
        "capture": (frame.captured_s, frame.ready_s),
        "queue": (frame.ready_s, inference.sent_s),
        "inference": (inference.sent_s, inference.received_s),
        "judge": (inference.received_s, view.decided_s),
    }
    told: Attributes = {
        "logicrd.camera": frame.camera_id,
        "logicrd.frame": frame.number,
        "logicrd.product": frame.product,
    }
    for name, (began_s, ended_s) in moments.items():
        if began_s is None or ended_s is None:
            continue
        span_id = span_id_of(trace_id, _of_view(name, frame))
        # Where another part of the batch came first, Triton's spans hang below that one's.
        is_other = name == "inference" and inference.request not in (None, traceparent(trace_id, span_id))
        root = span_id_of(trace_id, _ROOT)
        link = inference.request if is_other else None
        yield Span(name, trace_id, span_id, root, began_s, ended_s, told, is_call=name == "inference", link=link)


def _child(trace_id: int, name: str, began_s: float, ended_s: float, *, is_call: bool = False) -> Span:
    root = span_id_of(trace_id, _ROOT)
    return Span(name, trace_id, span_id_of(trace_id, name), root, began_s, ended_s, {}, is_call=is_call)


def _of_view(name: str, frame: Frame) -> str:
    return f"{name}/{frame.camera_id}/{frame.number}"
