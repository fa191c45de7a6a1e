"""One JSON line a part on standard error, for whoever gathers the logs of a plant (`monitoring.log_parts`).

A line is made of the part's own event, so that the two never differ. `put` only queues; one thread reads the event and
writes, so that a reader of the log that stands still costs lines and no verdict. Decides nothing. Called by `judge`.
"""

from __future__ import annotations

import json
import queue
import threading
from datetime import UTC, datetime
from typing import Any

import structlog

from pipeline.events import Event, decode
from pipeline.logs import write_line
from pipeline.metrics import Metrics

_MAX_WAITING = 4096
_SERIALS = frozenset({"trigger", "sei"})

log = structlog.get_logger(__name__)


class PartLog:
    """Lines on their way; `put` from any thread. A full queue gives up the new line and counts it."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._waiting: queue.Queue[Event | None] = queue.Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="part log", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def put(self, event: Event) -> None:
        """Queue the line of a part; `event` is its verdict's."""
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self._metrics.part_lines_dropped.inc()

    def close(self, timeout_s: float) -> None:
        """Write what is queued and end, or give up after that time."""
        if self._thread.is_alive():
            try:
                self._waiting.put(None, timeout=timeout_s)
            except queue.Full:
                return
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (event := self._waiting.get()) is not None:
            try:
                write_line(json.dumps(line(event)))
            except Exception:  # the thread's top frame: one line is missing, and the fault is seen
                log.exception("line of a part not written")


def line(event: Event) -> dict[str, Any]:
    """Say what a part's event says, in one flat line; the README lists the keys. Raises ValueError."""
    document = decode(event.value, dict(event.headers))
    attributes, data = document["attributes"], document["data"]
    views = data["views"]
    decisive = next((view for view in views if view["verdict"] == data["verdict"]), views[0] if views else {})
    model, threshold = data["model"] or {}, data["threshold"] or {}
    return {
        "event": "part",
        "level": "info",
        "timestamp": datetime.now(UTC).isoformat(),
        "inspectionId": data["inspectionId"],
        "traceId": _trace_id(attributes),
        **{key: data[key] for key in ("partId", "partIdSource", "measId", "line", "station", "productId", "sequence")},
        "serial": data["partId"] if data["partIdSource"] in _SERIALS else None,
        "verdict": data["verdict"],
        "causes": data["reasonCodes"],
        "missing": {view["cameraId"]: view["cause"] for view in data["missingViews"]},
        "score": _fused(decisive),
        "scores": {view["cameraId"]: _fused(view) for view in views},
        "latencyMs": data["timing"]["decidedMs"],
        "late": data["timing"]["late"],
        "modelVersion": model.get("version"),
        "modelSha256": model.get("sha256"),
        "thresholdVersion": threshold.get("version"),
        "thresholdSource": threshold.get("source"),
    }


def _fused(view: dict[str, Any]) -> float | None:
    scores: dict[str, float | None] | None = view.get("scores")
    return None if scores is None else scores["fused"]


def _trace_id(attributes: dict[str, str]) -> str | None:
    """Give the trace of a part that is traced (https://www.w3.org/TR/trace-context/)."""
    parent = attributes.get("traceparent")
    return None if parent is None else parent.split("-")[1]
