"""The composition root: builds the stages of one line, wires them with queues, starts, drains and stops them.

Threads: one reader a camera -> batcher -> one dispatcher -> gRPC's own -> one judge -> one publisher, one for pictures,
one for thresholds. A part is opened when its frame is captured and gets exactly one verdict: from its scores, from a
fault on the way, or from its deadline. Called by the command line and by tests.
"""

from __future__ import annotations

import gc
import math
import queue
import secrets
import socket
import threading
import time
from collections.abc import Collection
from dataclasses import replace
from datetime import UTC, datetime

import structlog

from pipeline.batcher import Batcher
from pipeline.cameras import Camera
from pipeline.config import LineConfig
from pipeline.errors import ConfigError, DependencyError, LineError
from pipeline.events import Encoder, Place
from pipeline.evidence import Evidence
from pipeline.health import Health, HealthPage
from pipeline.inference import InferenceClient
from pipeline.ingest import CameraReader, Handover
from pipeline.manifest import Manifest, products_in, read_manifest
from pipeline.metrics import LineSnapshot, Metrics
from pipeline.parts import OpenParts
from pipeline.pool import CameraPool
from pipeline.sink import Sink
from pipeline.thresholds import ThresholdCache, ThresholdStore
from pipeline.types import CameraState, Cause, Frame, Inference, PartVerdict
from pipeline.verdict import decide, regions

_TICK_S = 0.05
"""How often deadlines are looked at: the most by which an overdue verdict is late."""
_MAX_RESULTS = 4096
_DRAIN_MARGIN_S = 1.0
_REMOVE_S = 2.0
"""Longest wait for the readers of removed cameras to let go of them; Kafka's heartbeats wait as well."""
_SERVICE_WEIGHT = 0.2
# PyAV's frames lie in reference cycles, half a megabyte each: too few objects for Python to look after them soon.
_COLLECT_EVERY_S = 2.0

log = structlog.get_logger(__name__)


class Line:
    """One line, at work between `start` and `close`."""

    def __init__(self, config: LineConfig) -> None:
        self._config = config
        self._manifests = read_manifests(config)
        # Workers that start in the same second give different names to the parts of a camera that moves between them.
        run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"
        self._place = Place(
            config.site, config.area, config.line, worker=f"{socket.gethostname()}-{run}", budget_ms=config.budget_ms
        )
        self.metrics = Metrics()
        self.health = Health()
        self._batcher = Batcher(
            self.metrics, max_size=config.batching.max_size, max_age_s=config.batching.max_age_ms / 1e3
        )
        self._inference = InferenceClient(config.triton, self._manifests)
        self._thresholds = ThresholdCache(
            ThresholdStore(config.redis), self._manifests, config.redis, metrics=self.metrics, health=self.health
        )
        self._sink = Sink(config.kafka, metrics=self.metrics, health=self.health)
        self._encoder = Encoder(self._place, config.kafka.content_mode)
        self._evidence = Evidence(config.evidence, self._manifests, self.health)
        self._parts = OpenParts()
        self._parts_lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(config.triton.max_in_flight)
        # Answers and faults on their way to the judge; a full queue makes the one who puts wait, no longer than 1 s.
        self._results: queue.Queue[Inference] = queue.Queue(_MAX_RESULTS)
        self._stop_dispatch = threading.Event()
        self._stop_judge = threading.Event()
        self.epoch: int | None = None
        self._handover = self._make_handover(run)
        self._readers: dict[str, CameraReader] = {}
        self._numbers: dict[str, int] = {}
        for camera in config.cameras:
            self._readers[camera.id] = self._make_reader(camera)
        self._pool = (
            None
            if config.pool is None
            else CameraPool(config.kafka, config.pool, self, metrics=self.metrics, health=self.health)
        )
        self._threads = [
            threading.Thread(target=self._dispatch, name="dispatcher", daemon=True),
            threading.Thread(target=self._judge_all, name="judge", daemon=True),
        ]
        # Moving average of a batch's time at the server; written by gRPC's threads, read by the dispatcher.
        self._service_s = 0.0
        self._over = False
        self._page: HealthPage | None = None

    def start(self) -> None:
        """Reach every dependency, then start the cameras. Raises DependencyError or CheckError; nothing stays up."""
        try:
            for product in self._inference.start(optional=self._manifests.keys() - set(self._config.products)):
                del self._manifests[product]
            self._thresholds.start()
            self._sink.start()
            self._start_evidence()
            if self._pool is not None:
                self._pool.connect()
            self._start_page()
        except LineError:
            if self._pool is not None:
                self._pool.close()
            self._sink.close()
            self._thresholds.close()
            self._inference.close()
            raise
        for thread in self._threads:
            thread.start()
        for reader in self._readers.values():
            reader.start()
        self.health.ready("triton", state=True)
        if self._pool is not None:
            self._pool.start(self._readers)
        gc.collect()
        gc.freeze()  # what is here now stays: the collections of the judge look at the frames' garbage only
        log.info("line started", line=self._config.line, cameras=len(self._config.cameras), products=[*self._manifests])

    @property
    def finished(self) -> bool:
        """Whether no camera will give another frame."""
        return self._pool is None and all(reader.finished for reader in self._readers.values())

    @property
    def products(self) -> Collection[str]:
        """Products that this worker can judge, once started."""
        return self._manifests.keys()

    def add_camera(self, camera: Camera) -> None:
        """Begin to read a camera while the line runs; its product is one of `products`, its id is free."""
        reader = self._readers[camera.id] = self._make_reader(camera)
        reader.start()

    def remove_cameras(self, camera_ids: Collection[str], reason: str | None) -> None:
        """Take no more frames of these cameras, and give their readers `_REMOVE_S` to let go of them.

        The parts under way still get their verdicts. `reason` is a short code for the cameras' last status events; with
        None there are none.
        """
        removed = {name: self._readers.pop(name) for name in camera_ids}  # from here on nothing of theirs is taken
        for reader in removed.values():
            reader.stop()
        until = time.monotonic() + _REMOVE_S
        for name, reader in removed.items():
            reader.join(max(0.0, until - time.monotonic()))
            self._numbers[name] = reader.number
            self._batcher.remove_camera(name)
            self.metrics.retire(name)
            if reason is not None:
                self._announce(name, CameraState.ENDED, reason)

    def refuse_camera(self, camera_id: str, reason: str) -> None:
        """Tell the world that a camera of the pool is not read here."""
        self._announce(camera_id, CameraState.FAILED, reason)

    def snapshot(self) -> LineSnapshot:
        """Give the line's figures of this moment."""
        return self.metrics.snapshot()

    def close(self) -> LineSnapshot:
        """Stop the cameras, let every open part get its verdict, deliver what is left; gives the last figures."""
        if self._pool is not None:
            self._pool.stop()
        readers = list(self._readers.values())
        for reader in readers:
            reader.stop()
        self._batcher.close()
        until = time.monotonic() + self._config.budget_ms / 1e3 + _DRAIN_MARGIN_S
        for reader in readers:
            reader.join(max(0.1, until - time.monotonic()))
        if self._pool is not None:
            self._pool.close()
        while len(self._parts) and time.monotonic() < until:
            time.sleep(_TICK_S)
        self._stop_dispatch.set()
        self._inference.close()
        self._stop_judge.set()
        for thread in self._threads:
            thread.join(2.0)
        self._give_up_rest()
        self._evidence.close()
        self._sink.close()
        self._thresholds.close()
        if self._page is not None:
            self._page.__exit__(None, None, None)
        last = self.snapshot()
        log.info(
            "line stopped",
            triggered=last.triggered,
            judged=last.judged,
            acknowledged=last.acknowledged,
            undelivered=last.undelivered,
        )
        return last

    def _make_handover(self, run: str) -> Handover:
        return Handover(
            accept=self._accept,
            wait_for_room=self._batcher.wait_for_room,
            announce=self._announce,
            metrics=self.metrics,
            health=self.health,
            run=run,
            budget_s=self._config.budget_ms / 1e3,
        )

    def _make_reader(self, camera: Camera) -> CameraReader:
        self.metrics.camera(camera.id, product=camera.product, station=camera.station)
        self._batcher.add_camera(
            camera.id, product=camera.product, capacity=camera.queue_frames, overflow=camera.overflow
        )
        size = self._manifests[camera.product].input

        def accept(frame: Frame) -> None:
            if self._readers.get(camera.id) is reader:  # a read that outlasted the camera's removal is not taken
                self._accept(frame)

        def announce(camera_id: str, state: CameraState, reason: str) -> None:
            if self._readers.get(camera.id) is reader:
                self._announce(camera_id, state, reason)

        handover = replace(self._handover, accept=accept, announce=announce)
        reader = CameraReader(camera, (size.height, size.width), handover, number=self._numbers.get(camera.id, 0))
        return reader

    def _start_evidence(self) -> None:
        try:
            self._evidence.start()
        except OSError as error:
            raise ConfigError(f"evidence.dir {self._config.evidence.dir}: {error.strerror}") from None

    def _start_page(self) -> None:
        settings = self._config.monitoring
        if settings.port is None:
            return
        try:
            self._page = HealthPage(self.health, self.metrics.registry, settings.host, settings.port).__enter__()
        except OSError as error:
            place = f"{settings.host}:{settings.port}"
            raise DependencyError(
                f"monitoring: {place}: {error.strerror}", hint="choose another monitoring.port, or 0"
            ) from None
        log.info("monitoring", address=f"http://{settings.host}:{self._page.port}/metrics")

    # Camera threads

    def _accept(self, frame: Frame) -> None:
        """Take a frame from its reader: from here on its part will get a verdict."""
        frame = replace(frame, epoch=self.epoch)
        with self._parts_lock:
            if self._over:  # a read that outlasted the drain: nobody would judge it, so it is not taken
                return
            self._parts.open(frame)
            self.metrics.frame(frame.camera_id)
        if frame.cause is not None:
            self._to_judge(Inference(frame, cause=frame.cause))
        elif (evicted := self._batcher.put(frame)) is not None:
            self._to_judge(Inference(evicted, cause=Cause.QUEUE_FULL))

    def _announce(self, camera_id: str, state: CameraState, reason: str) -> None:
        self._sink.put(self._encoder.status(camera_id, state, reason, datetime.now(UTC), epoch=self.epoch))

    # Dispatcher thread

    def _dispatch(self) -> None:
        """Form a batch whenever the server has a slot: the busier it is, the larger they become."""
        while not self._stop_dispatch.is_set():
            self.health.beat("dispatcher")
            if not self._slots.acquire(timeout=0.5):
                continue
            batch = self._batcher.take(timeout_s=0.25)
            live = self._in_time(batch.frames) if batch is not None else ()
            if batch is None or not live:
                self._slots.release()
                continue
            try:
                self._inference.submit(replace(batch, frames=live), self._answered)
            except Exception:  # this thread's top frame: a fault of ours costs this batch, and says so
                log.exception("batch not sent", product=batch.product)
                self._answered([Inference(frame, cause=Cause.TRITON_UNAVAILABLE) for frame in live])
        self.health.retire("dispatcher")

    def _in_time(self, frames: tuple[Frame, ...]) -> tuple[Frame, ...]:
        """Give up the frames whose answer would come too late, and keep the others.

        Without this, an overloaded line would spend all its time on frames that are nearly overdue, and judge none.
        """
        latest = time.monotonic() + min(self._service_s, self._config.budget_ms / 2e3)
        for frame in frames:
            if frame.deadline_s <= latest:
                self._to_judge(Inference(frame, cause=Cause.DEADLINE))
        return tuple(frame for frame in frames if frame.deadline_s > latest)

    def _answered(self, inferences: list[Inference]) -> None:
        """Take a batch's answers from gRPC's thread."""
        self._slots.release()
        first = inferences[0]
        if first.sent_s is not None and first.received_s is not None:
            self._service_s += _SERVICE_WEIGHT * (first.received_s - first.sent_s - self._service_s)
        for inference in inferences:
            self._to_judge(inference)

    def _to_judge(self, inference: Inference) -> None:
        """Queue an answer or a fault from any thread; one that finds no room is left to its part's deadline."""
        try:
            self._results.put(inference, timeout=1.0)
        except queue.Full:
            log.error("the judge is far behind: a part is left to its deadline", part=inference.frame.part_id)

    # Judge thread

    def _judge_all(self) -> None:
        collect_s = time.monotonic()
        while not (self._stop_judge.is_set() and self._results.empty()):
            self.health.beat("judge")
            if time.monotonic() - collect_s > _COLLECT_EVERY_S:
                gc.collect()
                collect_s = time.monotonic()
            try:
                inference = self._results.get(timeout=_TICK_S)
            except queue.Empty:
                pass
            else:
                self._guarded(inference)
            self._give_up_overdue()
        self.health.retire("judge")

    def _give_up_overdue(self) -> None:
        with self._parts_lock:
            overdue = self._parts.overdue(time.monotonic())
        for frame in overdue:
            self._guarded(Inference(frame, cause=Cause.DEADLINE))

    def _give_up_rest(self) -> None:
        """Give the parts that the drain left open their verdict, after the last thread has ended."""
        with self._parts_lock:
            self._over = True
            left = self._parts.overdue(math.inf)
        for frame in left:
            self._guarded(Inference(frame, cause=Cause.DEADLINE))

    def _guarded(self, inference: Inference) -> None:
        try:
            self._judge(inference)
        except Exception:  # this thread's top frame: a fault of ours costs this part's verdict, and says so
            log.exception("part not judged", part=inference.frame.part_id)

    def _judge(self, inference: Inference) -> None:
        """Give a part its verdict, unless it has one: a later answer is counted and dropped."""
        frame = inference.frame
        with self._parts_lock:
            sequence = self._parts.sequence(frame)
        if sequence is None:
            self.metrics.late()
            return
        calibration = self._manifests[frame.product].calibration
        verdict = decide(inference, self._thresholds.get(frame.product), calibration)
        anomaly_map = inference.anomaly_map
        part = PartVerdict(
            frame=frame,
            inference=inference,
            verdict=verdict,
            sequence=sequence,
            decided_s=time.monotonic(),
            regions=() if anomaly_map is None else regions(anomaly_map, calibration.heatmap.limit),
            image_ref=self._evidence.reference(inference, verdict.judgement),
        )
        self._evidence.keep(part)
        self._count(part)
        # A part that waits for an earlier one of its station keeps its numbers and lets go of its pictures.
        bare = replace(frame, image=None)
        part = replace(part, frame=bare, inference=replace(inference, frame=bare, anomaly_map=None))
        with self._parts_lock:
            released = self._parts.close(part)
        for ready in released:
            self._sink.put(*self._encoder.part(ready, decided_at=datetime.now(UTC)))

    def _count(self, part: PartVerdict) -> None:
        inference = part.inference
        latency_s = part.decided_s - part.frame.captured_s
        cause = Cause(part.verdict.reasons[0]) if part.verdict.judgement == "UNINSPECTED" else None
        self.metrics.verdict(part.frame.camera_id, part.verdict.judgement, cause, latency_s)
        if inference.sent_s is not None:
            self.metrics.stage("queue", inference.sent_s - part.frame.captured_s)
        if inference.sent_s is not None and inference.received_s is not None:
            self.metrics.stage("inference", inference.received_s - inference.sent_s)
        if part.verdict.judgement != "OK":
            log.info(
                "part",
                camera=part.frame.camera_id,
                part=part.frame.part_id,
                verdict=part.verdict.judgement.value,
                reasons=list(part.verdict.reasons),
                score=None if inference.scores is None else round(inference.scores.fused, 3),
                latency_ms=round(latency_s * 1e3, 1),
            )


def read_manifests(config: LineConfig) -> dict[str, Manifest]:
    """Read the manifest of every product that the line's cameras look at; with a pool, of all others that are there.

    Raises ConfigError for the former; those of the others that cannot be read are left out.
    """
    repository = config.triton.models_repo
    manifests = {product: read_manifest(repository, product) for product in config.products}
    for product in products_in(repository) if config.pool is not None else ():
        try:
            manifests.setdefault(product, read_manifest(repository, product))
        except ConfigError as error:
            log.error("product left out", product=product, error=str(error), hint=error.hint)
    return manifests
