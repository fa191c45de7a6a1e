"""Every number the line counts, declared once: for Prometheus, the live table and the closing summary.

Stages are handed one `Metrics` and report to it from their own threads; nothing here decides anything. No part id, no
frame id and no error text ever becomes a label.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter as Tally
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from pipeline.types import CameraState, Cause, Judgement, PartVerdict, StrayReason

_LATENCY_BUCKETS_S = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
_WINDOW = 2048  # latencies kept per camera for the table's quantiles: about ten minutes at 3 frames/s


@dataclass(slots=True)
class CameraFigures:
    """What one camera did since the start."""

    product: str
    station: str
    state: CameraState = CameraState.CONNECTING
    reason: str = ""
    frames: int = 0
    queued: int = 0
    judgements: Tally[Judgement] = field(default_factory=Tally)
    causes: Tally[str] = field(default_factory=Tally)
    dropped: Tally[str] = field(default_factory=Tally)
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))


@dataclass(frozen=True, slots=True)
class CameraSnapshot:
    """A camera's figures at one moment; `p50_ms` and `p99_ms` are from capture to verdict, None before the first.

    `dropped` counts frames that never reached the server, by cause; `missed` are gaps in the camera's own count.
    """

    camera_id: str
    product: str
    station: str
    state: CameraState
    reason: str
    frames: int
    queued: int
    judgements: dict[str, int]
    causes: dict[str, int]
    dropped: dict[str, int]
    p50_ms: float | None
    p99_ms: float | None


@dataclass(slots=True)
class StationFigures:
    """The parts of one station since the start: triggered = OK + NG + REVIEW + UNINSPECTED + those still open."""

    triggered: int = 0
    open: int = 0
    judgements: Tally[Judgement] = field(default_factory=Tally)
    causes: Tally[str] = field(default_factory=Tally)


@dataclass(frozen=True, slots=True)
class StationSnapshot:
    """A station's figures at one moment."""

    station: str
    triggered: int
    judgements: dict[str, int]
    causes: dict[str, int]
    open: int = 0


@dataclass(frozen=True, slots=True)
class LineSnapshot:
    """The line's figures at one moment: of the cameras that it reads, and the sums of all that it has read.

    `triggered` and `judged` count parts, `acknowledged` those Kafka has confirmed, `found` among them those that an
    earlier run left in the outbox, `stored` those that are in it now. `p50_ms` and `p99_ms` are from a part's trigger
    or capture to its verdict.
    """

    cameras: tuple[CameraSnapshot, ...]
    stations: tuple[StationSnapshot, ...]
    triggered: int
    judged: int
    acknowledged: int
    undelivered: int
    p50_ms: float | None
    p99_ms: float | None
    found: int = 0
    stored: int = 0

    @property
    def lost(self) -> int:
        """Parts that nobody will hear of: what was due, less what Kafka has and what the outbox keeps."""
        return max(self.undelivered, self.triggered + self.found - self.acknowledged - self.stored)


class Metrics:
    """Counts of one line; safe from every thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._lock = threading.Lock()
        self._cameras: dict[str, CameraFigures] = {}
        self._retired: set[str] = set()
        self._stations: dict[str, StationFigures] = {}
        self._latencies_s: deque[float] = deque(maxlen=_WINDOW)
        self._acknowledged = self._undelivered = self._found = self._stored = 0
        registry = self.registry
        self._frames = Counter("inspection_frames", "Frames read", ["camera"], registry=registry)
        self._triggered = Counter(
            "inspection_parts_triggered", "Parts opened; all get a verdict", ["station"], registry=registry
        )
        self._open = Gauge(
            "inspection_parts_open", "Parts opened whose verdict has not gone out", ["station"], registry=registry
        )
        self._verdicts = Counter(
            "inspection_parts", "Part verdicts given", ["station", "verdict", "cause"], registry=registry
        )
        self._latency = Histogram(
            "inspection_verdict_latency_seconds", "Capture to verdict", buckets=_LATENCY_BUCKETS_S, registry=registry
        )
        self._queued = Gauge("inspection_queue_frames", "Frames waiting", ["camera"], registry=registry)
        self._up = Gauge("inspection_camera_up", "1 while frames arrive", ["camera"], registry=registry)
        self._strays = Counter(
            "inspection_strays", "Frames and answers that count for no verdict", ["station", "cause"], registry=registry
        )
        self._triggers = Counter("inspection_triggers", "Trigger messages by fate", ["fate"], registry=registry)
        self._resets = Counter(
            "inspection_counter_resets", "Trigger counters aligned anew", ["camera"], registry=registry
        )
        self._dropped = Counter(
            "inspection_frames_dropped", "Frames that never reached the server", ["camera", "cause"], registry=registry
        )
        self._losses = Counter(
            "inspection_camera_losses", "Times a camera was lost", ["camera", "reason"], registry=registry
        )
        self._stage = Histogram(
            "inspection_stage_seconds", "Time in a stage", ["stage"], buckets=_LATENCY_BUCKETS_S, registry=registry
        )
        self._triton_requests = Counter(
            "inspection_triton_requests", "Batches sent to a replica of Triton", ["replica"], registry=registry
        )
        self._triton_failures = Counter(
            "inspection_triton_failures", "Batches that a replica gave no scores for", ["replica"], registry=registry
        )
        self.triton_replicas_up = Gauge(
            "inspection_triton_replicas_up", "Replicas of Triton that get batches", registry=registry
        )
        self._events = Counter("inspection_events", "Events by fate", ["fate"], registry=registry)
        self._refused = Gauge(
            "inspection_cameras_refused", "Cameras of the pool that are not read", ["reason"], registry=registry
        )
        self.epoch = Gauge("inspection_pool_epoch", "Generation of the pool's group", registry=registry)
        self.unacknowledged = Gauge(
            "inspection_events_unacknowledged", "Events Kafka has not confirmed yet", registry=registry
        )
        self._outbox = Gauge(
            "inspection_outbox", "Outbox: events and parts kept for Kafka, bytes on disk", ["what"], registry=registry
        )
        self._outbox_age = Gauge(
            "inspection_outbox_age_seconds", "How long the oldest event has waited for Kafka", registry=registry
        )
        self._outbox_fill = Gauge(
            "inspection_outbox_fill_ratio", "Share of the outbox's bound of size or age, the larger", registry=registry
        )
        self.outbox_up = Gauge(
            "inspection_outbox_up", "1 while events can be stored; at 0 no verdict is OK", registry=registry
        )
        self.outbox_failures = Counter(
            "inspection_outbox_failures", "Times the disk did not take events", registry=registry
        )
        self.part_lines_dropped = Counter(
            "inspection_part_lines_dropped", "Lines of parts that found no room in the log", registry=registry
        )
        self.spans = Counter("inspection_spans", "Spans of traces by fate", ["fate"], registry=registry)
        self.threshold_age = Gauge(
            "inspection_threshold_age_seconds", "Since the last good read of Redis", registry=registry
        )
        self._unused = Gauge("inspection_threshold_unused", "Record not used", ["product", "reason"], registry=registry)
        self.candidates = Counter(
            "inspection_candidate_views", "Views on trial", ["product", "version", "outcome"], registry=registry
        )
        self.versions_refused = Gauge(
            "inspection_version_refused", "1 while what was promoted is not used", ["product"], registry=registry
        )

    def camera(self, camera_id: str, *, product: str, station: str) -> None:
        """Announce a camera, so that it is shown before its first frame; one that comes again goes on counting."""
        with self._lock:
            figures = self._cameras.setdefault(camera_id, CameraFigures(product, station))
            figures.product, figures.station = product, station
            figures.state, figures.reason = CameraState.CONNECTING, ""
            self._retired.discard(camera_id)
        self._frames.labels(camera_id)
        self._up.labels(camera_id).set(0)

    def retire(self, camera_id: str) -> None:
        """Show a camera no longer. Its parts stay in the line's sums, and those under way are still counted."""
        with self._lock:
            self._retired.add(camera_id)
        for gauge in (self._up, self._queued):
            with contextlib.suppress(KeyError):
                gauge.remove(camera_id)

    def refused(self, reasons: Mapping[str, int]) -> None:
        """Note how many cameras of the pool this worker does not read, by the code of the reason."""
        self._refused.clear()
        for reason, count in reasons.items():
            self._refused.labels(reason).set(count)

    def camera_state(self, camera_id: str, state: CameraState, reason: str = "") -> None:
        """Note what a camera's reader is doing; `reason` is a code, for the states that have one."""
        with self._lock:
            figures = self._cameras[camera_id]
            figures.state, figures.reason = state, reason
            if camera_id in self._retired:
                return
        self._up.labels(camera_id).set(state is CameraState.STREAMING)
        if state in {CameraState.LOST, CameraState.FAILED}:
            self._losses.labels(camera_id, reason).inc()

    def frame(self, camera_id: str) -> None:
        """Count a frame that was read, usable or not."""
        with self._lock:
            self._cameras[camera_id].frames += 1
        self._frames.labels(camera_id).inc()

    def dropped(self, camera_id: str, cause: str, count: int = 1) -> None:
        """Count frames that never reached the server: a `Cause`, or `missed` for gaps in the camera's own count."""
        with self._lock:
            self._cameras[camera_id].dropped[str(cause)] += count
        self._dropped.labels(camera_id, str(cause)).inc(count)

    def queued(self, camera_id: str, frames: int) -> None:
        """Note how many frames of a camera wait for inference."""
        self._cameras[camera_id].queued = frames
        if camera_id in self._retired:  # what a removed camera left in its queue
            return
        self._queued.labels(camera_id).set(frames)

    def stage(self, stage: str, seconds: float) -> None:
        """Note the time that a frame spent in a stage."""
        self._stage.labels(stage).observe(seconds)

    def triggered(self, station: str, parts: int) -> None:
        """Count parts that were opened: as many verdicts are due."""
        with self._lock:
            self._stations.setdefault(station, StationFigures()).triggered += parts
        self._triggered.labels(station).inc(parts)

    def parts_open(self, parts: Mapping[str, int]) -> None:
        """Note how many parts of each station are open, counted where they lie and not from the other figures."""
        with self._lock:
            for station, count in parts.items():
                self._stations.setdefault(station, StationFigures()).open = count
        for station, count in parts.items():
            self._open.labels(station).set(count)

    def view(self, camera_id: str, judgement: Judgement, cause: Cause | None, latency_s: float) -> None:
        """Count what one view said; `latency_s` is from its capture."""
        with self._lock:
            figures = self._cameras[camera_id]
            figures.judgements[judgement] += 1
            if cause is not None:
                figures.causes[cause.value] += 1
            figures.latencies_s.append(latency_s)

    def verdict(self, part: PartVerdict) -> None:
        """Count a part's verdict."""
        station, judgement = part.part.station, part.judgement
        cause = part.reasons[0] if judgement is Judgement.UNINSPECTED else ""
        latency_s = part.decided_s - part.part.opened_s
        with self._lock:
            figures = self._stations.setdefault(station, StationFigures())
            figures.judgements[judgement] += 1
            if cause:
                figures.causes[cause] += 1
            self._latencies_s.append(latency_s)
        self._verdicts.labels(station, judgement.value, cause).inc()
        self._latency.observe(latency_s)

    def triton_request(self, replica: str, *, failed: bool) -> None:
        """Count a batch that a replica of Triton has answered, or failed to."""
        self._triton_requests.labels(replica).inc()
        failures = self._triton_failures.labels(replica)
        if failed:
            failures.inc()

    def triton_replica_left(self, replica: str) -> None:
        """Forget the counts of a replica that has left, so that a restart of pods does not add series for ever."""
        self._triton_requests.remove(replica)
        self._triton_failures.remove(replica)

    def stray(self, station: str, reason: StrayReason) -> None:
        """Count a frame, or an answer, that counts for no verdict."""
        self._strays.labels(station, reason.value).inc()

    def trigger(self, fate: str) -> None:
        """Count a trigger message: `opened`, `duplicate` or `refused`."""
        self._triggers.labels(fate).inc()

    def counter_reset(self, camera_id: str) -> None:
        """Count a trigger counter that jumped, and was aligned anew."""
        self._resets.labels(camera_id).inc()

    def threshold_unused(self, product: str, *, before: str, now: str) -> None:
        """Note why a product's record in Redis is not used any more, or (`now` empty) that it is."""
        if before:
            self._unused.labels(product, before).set(0)
        if now:
            self._unused.labels(product, now).set(1)

    def acknowledged(self, *, is_part: bool) -> None:
        """Count an event that Kafka has confirmed."""
        if is_part:
            with self._lock:
                self._acknowledged += 1
        self._events.labels("acknowledged").inc()

    def undelivered(self, count: int, *, parts: int) -> None:
        """Count events that will not reach Kafka: the line's only way to lose a verdict, and never a silent one."""
        with self._lock:
            self._undelivered += parts
        self._events.labels("undelivered").inc(count)

    def outbox_found(self, parts: int) -> None:
        """Note how many part verdicts an earlier run left."""
        with self._lock:
            self._found = self._stored = parts

    def outbox(self, *, events: int, parts: int, size: int, age_s: float, fill: float) -> None:
        """Note what the outbox keeps."""
        with self._lock:
            self._stored = parts
        for what, value in (("events", events), ("parts", parts), ("bytes", size)):
            self._outbox.labels(what).set(value)
        self._outbox_age.set(age_s)
        self._outbox_fill.set(fill)

    def snapshot(self) -> LineSnapshot:
        """Give the figures of this moment."""
        with self._lock:
            cameras = tuple(
                _camera_snapshot(name, figures) for name, figures in self._cameras.items() if name not in self._retired
            )
            stations = tuple(_station_snapshot(name, figures) for name, figures in self._stations.items())
            latencies = list(self._latencies_s)
            acknowledged, undelivered = self._acknowledged, self._undelivered
            found, stored = self._found, self._stored
        triggered = sum(station.triggered for station in stations)
        judged = sum(sum(station.judgements.values()) for station in stations)
        quantiles = _quantiles_ms(latencies)
        return LineSnapshot(
            cameras, stations, triggered, judged, acknowledged, undelivered, *quantiles, found=found, stored=stored
        )


def _station_snapshot(name: str, figures: StationFigures) -> StationSnapshot:
    judgements = {judgement.value: figures.judgements[judgement] for judgement in Judgement}
    return StationSnapshot(name, figures.triggered, judgements, dict(figures.causes), figures.open)


def _camera_snapshot(name: str, figures: CameraFigures) -> CameraSnapshot:
    p50, p99 = _quantiles_ms(figures.latencies_s)
    return CameraSnapshot(
        camera_id=name,
        product=figures.product,
        station=figures.station,
        state=figures.state,
        reason=figures.reason,
        frames=figures.frames,
        queued=figures.queued,
        judgements={judgement.value: figures.judgements[judgement] for judgement in Judgement},
        causes=dict(figures.causes),
        dropped=dict(figures.dropped),
        p50_ms=p50,
        p99_ms=p99,
    )


def _quantiles_ms(latencies_s: deque[float] | list[float]) -> tuple[float | None, float | None]:
    if not latencies_s:
        return None, None
    p50, p99 = np.quantile(np.fromiter(latencies_s, float), (0.5, 0.99)) * 1e3
    return round(float(p50), 1), round(float(p99), 1)
