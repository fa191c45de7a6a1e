"""Gives every open part its one verdict: from its views' scores, from a fault on the way, or from its deadline.

Owns the open parts and one thread, on which all verdicts are made and leave, in order. Frames and triggers are taken
on their own threads, answers through a bounded queue. What a frame or an answer cannot change any more goes to the
audit topic. Decides nothing itself: `verdict` judges a view, `fusion` a part. Owned by `app`.
"""

from __future__ import annotations

import contextlib
import gc
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

import structlog

from pipeline.events import Encoder, Event
from pipeline.evidence import Evidence
from pipeline.fusion import unstored
from pipeline.health import Health
from pipeline.manifest import Manifests
from pipeline.metrics import Metrics
from pipeline.outbox import Outbox
from pipeline.part_log import PartLog
from pipeline.parts import Arrival, Parts
from pipeline.thresholds import ThresholdCache
from pipeline.tracing import Tracing
from pipeline.types import (
    CameraState,
    Cause,
    Frame,
    Inference,
    Judgement,
    PartVerdict,
    Stray,
    StrayReason,
    Trigger,
    ViewVerdict,
)
from pipeline.verdict import decide, regions

TICK_S = 0.05
"""How often deadlines are looked at: the most by which an overdue verdict is late."""
_MAX_RESULTS = 4096
# PyAV's frames lie in reference cycles, half a megabyte each: too few objects for Python to look after them soon.
_COLLECT_EVERY_S = 2.0
_STAGE = "judge"

log = structlog.get_logger(__name__)


class Judge:
    """The desk where parts wait for their verdict; `settled` is told the receipt of a trigger that is done with."""

    def __init__(
        self,
        parts: Parts,
        manifests: Manifests,
        thresholds: ThresholdCache,
        *,
        evidence: Evidence,
        encoder: Encoder,
        outbox: Outbox,
        metrics: Metrics,
        health: Health,
        settled: Callable[[tuple[int, int]], None],
        graph_products: Collection[str] = (),
        part_log: PartLog | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """`graph_products` are those that graphs ask Triton for: their limits are not for pictures of the line."""
        self._parts = parts
        self._manifests = manifests
        self._thresholds = thresholds
        self._evidence = evidence
        self._encoder = encoder
        self._outbox = outbox
        self._metrics = metrics
        self._health = health
        self._settled = settled
        self._graph_products = graph_products
        self._part_log = part_log
        self._tracing = tracing
        self._lock = threading.Lock()
        # Answers and faults; a full queue makes the one who puts wait, no longer than 1 s.
        self._results: queue.Queue[Inference] = queue.Queue(_MAX_RESULTS)
        self._lost: set[str] = set()
        self._uncounted: set[str] = set()
        self._over = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=_STAGE, daemon=True)

    def start(self) -> None:
        """Begin to judge."""
        self._health.beat(_STAGE)
        self._thread.start()

    @property
    def open_parts(self) -> int:
        """How many parts have no verdict yet."""
        return len(self._parts)

    def accept(self, frame: Frame) -> list[Frame]:
        """Take a frame from its reader: from here on its part will get a verdict. Gives the frames to be inferred."""
        with self._lock:
            if self._over:  # a read that outlasted the drain: nobody would judge it, so it is not taken
                return []
            arrival = self._parts.arrive(frame, time.monotonic())
            self._metrics.frame(frame.camera_id)
            self._metrics.triggered(frame.station, arrival.opened)
        if arrival.reset:
            self._metrics.counter_reset(frame.camera_id)
            log.warning("trigger counter jumped: aligned anew", camera=frame.camera_id, count=frame.trigger_count)
        return self._admitted(arrival)

    def trigger(self, trigger: Trigger) -> list[Frame]:
        """Open the part of a trigger. Gives the frames to be inferred: those that came before it."""
        with self._lock:
            if self._over:  # its record stays unsettled: the next run takes it
                return []
            arrival = self._parts.trigger(trigger)
            self._metrics.triggered(trigger.station, 0 if arrival is None else arrival.opened)
        self._metrics.trigger("duplicate" if arrival is None else "opened")
        if arrival is None:
            log.info("trigger repeated: ignored", part=trigger.part_id, meas=trigger.meas_id, station=trigger.station)
            self._settled(trigger.receipt)
            return []
        return self._admitted(arrival)

    def add_camera(self, camera_id: str, product: str) -> None:
        """Note that a camera is read from now on; before its reader starts."""
        with self._lock:
            self._parts.add_camera(camera_id, product)

    def remove_camera(self, camera_id: str) -> None:
        """Note that a camera is read no longer: a view of it that does not come is `camera_lost`."""
        with self._lock:
            self._lost.discard(camera_id)
            self._uncounted.discard(camera_id)
            self._parts.remove_camera(camera_id)

    def camera_is(self, camera_id: str, state: CameraState) -> None:
        """Note a camera's state, so that a view that does not come is named for its cause."""
        if state not in {CameraState.LOST, CameraState.FAILED}:
            self._lost.discard(camera_id)
            return
        self._lost.add(camera_id)
        with self._lock:
            self._parts.reopen(camera_id)

    def put(self, inference: Inference) -> None:
        """Queue an answer or a fault from any thread; one that finds no room is left to its part's deadline."""
        try:
            self._results.put(inference, timeout=1.0)
        except queue.Full:
            log.error("the judge is far behind: a part is left to its deadline", part=inference.frame.part_id)

    def answer(self, inference: Inference) -> None:
        """Queue what a graph said of a frame as its reader handed it over: `accept` took that frame before."""
        with self._lock:
            frame = self._parts.admitted(inference.frame)
        self.put(replace(inference, frame=frame))

    def close(self) -> None:
        """Judge what is queued, end the thread, and give whatever is still open its verdict."""
        self._stop.set()
        self._thread.join(2.0)
        with self._lock:
            self._over = True
        self._give_up(last=True)

    def _admitted(self, arrival: Arrival) -> list[Frame]:
        self._audit(arrival.strays)
        ready: list[Frame] = []
        for frame in arrival.frames:
            self._watch_count(frame)
            if frame.cause is not None:
                self.put(Inference(frame, cause=frame.cause))
            elif frame.product not in self._manifests:
                self.put(Inference(frame, cause=Cause.PRODUCT_NOT_READY))
            elif frame.image is None:  # a graph has asked Triton already, and gives its answer by itself
                continue
            elif frame.product in self._graph_products:  # so a trigger says
                self.put(Inference(frame, cause=Cause.PRODUCT_NOT_READY))
            else:
                ready.append(frame if self._tracing is None else self._traced(frame, self._tracing))
        return ready

    def _traced(self, frame: Frame, tracing: Tracing) -> Frame:
        with self._lock:
            part = self._parts.awaits(frame)
        return frame if part is None else replace(frame, request=tracing.of_request(part, frame))

    def _watch_count(self, frame: Frame) -> None:
        """Say once of a camera that it has no trigger counter where one is asked for: its missed parts go unseen."""
        counts = frame.part_id_source != "counter" or frame.trigger_count is not None or frame.image is None
        if not counts and frame.camera_id not in self._uncounted:
            self._uncounted.add(frame.camera_id)
            log.error(
                "camera gives no trigger counter: missed parts of its station cannot be seen",
                camera=frame.camera_id,
                station=frame.station,
                hint="set the station's `trigger` to free_run or message, or use a camera that counts its triggers",
            )

    def _run(self) -> None:
        collect_s = time.monotonic()
        while not (self._stop.is_set() and self._results.empty()):
            self._health.beat(_STAGE)
            if time.monotonic() - collect_s > _COLLECT_EVERY_S:
                gc.collect()
                collect_s = time.monotonic()
            try:
                self._turn()
            except Exception:  # this thread's top frame: the next turn goes on with the parts that are still open
                log.exception("a turn of the judge failed")
        self._health.retire(_STAGE)

    def _turn(self) -> None:
        with contextlib.suppress(queue.Empty):
            self._guarded(self._results.get(timeout=TICK_S))
        self._give_up()

    def _give_up(self, *, last: bool = False) -> None:
        """Settle the views, and the parts, whose time is over; all of them at the `last` call."""
        now_s = time.monotonic()
        with self._lock:
            overdue = self._parts.overdue(float("inf") if last else now_s)
        for frame in overdue:
            self._guarded(Inference(frame, cause=Cause.DEADLINE))
        with self._lock:
            released, strays = self._parts.expire(now_s, self._lost, last=last)
            still_open = self._parts.open_by_station()
        self._send(released)
        self._audit(strays)
        self._metrics.parts_open(still_open)

    def _guarded(self, inference: Inference) -> None:
        try:
            self._judge(inference)
        except Exception:  # this thread's top frame: a fault of ours costs this part's verdict, and says so
            log.exception("part not judged", part=inference.frame.part_id)

    def _judge(self, inference: Inference) -> None:
        """Give a view its verdict, unless its part has one: a later answer is counted and audited."""
        frame = inference.frame
        with self._lock:
            part = self._parts.awaits(frame)
        if part is None:
            self._audit([Stray(frame, StrayReason.LATE_RESULT, scores=inference.scores)])
            return
        manifest = self._manifests.of(frame.product, inference.model)
        calibration = manifest.calibration if manifest is not None else None
        verdict = decide(inference, self._thresholds.get(frame.product, inference.model), calibration)
        anomaly_map = inference.anomaly_map
        view = ViewVerdict(
            frame=frame,
            inference=inference,
            verdict=verdict,
            decided_s=time.monotonic(),
            regions=()
            if anomaly_map is None or calibration is None
            else regions(anomaly_map, calibration.heatmap.limit, frame.view),
            image_ref=self._evidence.reference(inference, verdict.judgement),
        )
        self._evidence.keep(view)
        self._count(view)
        # A part that waits for its other views, or an earlier part, keeps its numbers and lets go of its pictures.
        bare = replace(frame, image=None)
        view = replace(view, frame=bare, inference=replace(inference, frame=bare, anomaly_map=None))
        with self._lock:
            released = self._parts.settle(view)
        self._send(released)

    def _send(self, verdicts: Iterable[PartVerdict]) -> None:
        for verdict in verdicts:
            try:
                self._deliver(verdict)
            except Exception:  # the parts released with this one must not be lost with it
                log.exception("verdict not delivered", station=verdict.part.station, part=verdict.part.part_id)
                self._metrics.undelivered(1, parts=1)

    def _deliver(self, verdict: PartVerdict) -> None:
        """Let a verdict go; one that cannot be stored never leaves as OK."""
        decided_at = datetime.now(UTC)

        def otherwise() -> tuple[Event, ...]:
            left = unstored(verdict)
            events = self._events(left, decided_at)
            self._note(left, events[-1])
            return events

        events = self._events(verdict, decided_at)
        self._outbox.put(*events, final=partial(self._note, verdict, events[-1]), otherwise=otherwise)

    def _events(self, verdict: PartVerdict, decided_at: datetime) -> tuple[Event, ...]:
        trace = None if self._tracing is None else self._tracing.of_part(verdict.part)
        events = self._encoder.part(verdict, decided_at=decided_at, trace=trace)
        if (receipt := verdict.part.receipt) is None:
            return events
        return *events[:-1], replace(events[-1], done=partial(self._settled, receipt))

    def _note(self, verdict: PartVerdict, event: Event) -> None:
        """Count a verdict, and say it: unless it is OK, or all of them; from the outbox's thread, or this one."""
        self._metrics.verdict(verdict)
        if self._tracing is not None:
            self._tracing.stored(verdict)
        if self._part_log is not None:
            self._part_log.put(event)
        elif verdict.judgement is not Judgement.OK:
            log.info(
                "part",
                station=verdict.part.station,
                part=verdict.part.part_id,
                verdict=verdict.judgement.value,
                reasons=list(verdict.reasons),
                missing=[view.camera_id for view in verdict.missing],
                scores={view.frame.camera_id: _rounded(view) for view in verdict.views},
                latency_ms=round((verdict.decided_s - verdict.part.opened_s) * 1e3, 1),
            )

    def _audit(self, strays: Iterable[Stray]) -> None:
        for stray in strays:
            self._metrics.stray(stray.frame.station, stray.reason)
            if stray.reason is StrayReason.LATE_RESULT and stray.scores is None:
                continue  # a fault that came late says nothing that the verdict has not said
            self._outbox.put(self._encoder.audit(stray, datetime.now(UTC)))

    def _count(self, view: ViewVerdict) -> None:
        frame, inference = view.frame, view.inference
        cause = Cause(view.verdict.reasons[0]) if view.verdict.judgement is Judgement.UNINSPECTED else None
        self._metrics.view(frame.camera_id, view.verdict.judgement, cause, view.decided_s - frame.captured_s)
        if inference.sent_s is not None:
            self._metrics.stage("queue", inference.sent_s - frame.captured_s)
        if inference.sent_s is not None and inference.received_s is not None:
            self._metrics.stage("inference", inference.received_s - inference.sent_s)


def _rounded(view: ViewVerdict) -> float | None:
    scores = view.inference.scores
    return None if scores is None else round(scores.fused, 3)
