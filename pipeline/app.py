"""The composition root: builds the stages of one line, wires them with queues, starts, drains and stops them.

Threads: one reader a camera -> batcher -> one dispatcher -> gRPC's own -> one judge -> one for the outbox -> one
publisher, one for pictures, one for thresholds, one for heartbeats, one for new versions, one for shadows; one for
triggers where a station asks for them, one for the log of parts, one with a pool: its cameras. A part is opened when
its frame is captured or its trigger comes, and gets exactly one verdict. Called by the command line and by tests.
"""

from __future__ import annotations

import gc
import secrets
import socket
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import structlog

from pipeline.batcher import Batcher
from pipeline.config import LineConfig
from pipeline.deepstream import Graphs
from pipeline.errors import ConfigError, DependencyError, LineError
from pipeline.events import Encoder, Place, decode, inspection_id
from pipeline.evidence import Evidence
from pipeline.health import Health, HealthPage
from pipeline.heartbeat import Heartbeat
from pipeline.inference import InferenceClient
from pipeline.judge import TICK_S, Judge
from pipeline.manifest import Manifests, products_in, read_manifest
from pipeline.metrics import LineSnapshot, Metrics
from pipeline.newcomers import Newcomers
from pipeline.outbox import Outbox, read_stored
from pipeline.part_log import PartLog
from pipeline.parts import Parts
from pipeline.pool import CameraPool
from pipeline.readers import Readers
from pipeline.shadow import Shadow
from pipeline.sink import Sink
from pipeline.threshold_store import ThresholdStore
from pipeline.thresholds import ThresholdCache
from pipeline.tracing import Tracing
from pipeline.triggers import TriggerReader
from pipeline.types import Cause, Frame, Inference, Trigger

_DRAIN_MARGIN_S = 1.0
# Of the time for the end of a run: what open parts may take of it, the pictures, and Kafka's clients to disconnect; the
# rest is for delivery.
_JUDGING_SHARE = 0.7
_PICTURES_S = 5.0
_CLOSING_S = 2.0

log = structlog.get_logger(__name__)


class Line:
    """One line, at work between `start` and `close`."""

    def __init__(self, config: LineConfig) -> None:
        self._config = config
        self._manifests = read_manifests(config)
        # Workers that start in the same second give different names to the parts of a camera that moves between them.
        run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"
        host = socket.gethostname()
        self._place = Place(
            config.site,
            config.area,
            config.line,
            worker=f"{host}-{run}",
            budget_ms=config.budget_ms,
            pool=None if config.pool is None else config.pool.name,
            host=host,
        )
        self.metrics = Metrics()
        self.health = Health()
        self._batcher = Batcher(
            self.metrics, max_size=config.batching.max_size, max_age_s=config.batching.max_age_ms / 1e3
        )
        self._inference = InferenceClient(config.triton, self._manifests, metrics=self.metrics, health=self.health)
        self._thresholds = ThresholdCache(
            ThresholdStore(config.redis), self._manifests, config.redis, metrics=self.metrics, health=self.health
        )
        self._encoder = Encoder(self._place, config.kafka.content_mode)
        self._evidence = Evidence(config.evidence, self._manifests, self.health)
        self._tracing = None if config.tracing is None else Tracing(config.tracing, self._place, self.metrics)
        self._outbox = self._make_outbox(config)
        self._triggers = self._make_triggers(config)
        self._part_log = PartLog(self.metrics) if config.monitoring.log_parts else None
        self._judge = self._make_judge(config, run)
        self._stop_dispatch = threading.Event()
        self.cameras = self._make_readers(config, run)
        known = (self._manifests, self._inference, self._thresholds)
        self._newcomers = Newcomers(
            config.triton,
            *known,
            new_products=config.pool is not None,
            graph_products=config.graph_products,
            metrics=self.metrics,
        )
        self._shadow = Shadow(*known, metrics=self.metrics, health=self.health)
        self._heartbeat = self._make_heartbeat(config)
        for camera in config.cameras:
            self.cameras.prepare(camera)
        self._pool: CameraPool | None = None
        if config.pool is not None:
            self._pool = CameraPool(config.kafka, config.pool, self.cameras, metrics=self.metrics, health=self.health)
        self._dispatcher = threading.Thread(target=self._dispatch, name="dispatcher", daemon=True)
        self._page: HealthPage | None = None
        self._told: frozenset[str] = frozenset()

    def start(self) -> None:
        """Reach every dependency, then start the cameras. Raises DependencyError or CheckError; nothing stays up."""
        if self._tracing is not None:
            self._tracing.start()
        try:
            for product in self._inference.start(optional=self._manifests.keys() - set(self._config.products)):
                del self._manifests[product]
            self._thresholds.start()
            self._told = stored_inspections(self._config.outbox.dir)
            self._outbox.start()
            self._start_evidence()
            if self._pool is not None:
                self._pool.connect()
            self._start_page()
            self._triggers.connect()
        except LineError:
            if self._pool is not None:
                self._pool.close()
            self._triggers.close()
            self._close_page()
            self._evidence.close()
            self._outbox.close(time.monotonic())
            self._thresholds.close()
            self._inference.close()
            if self._tracing is not None:
                self._tracing.close(_CLOSING_S / 2)
            raise
        if self._part_log is not None:
            self._part_log.start()
        self._judge.start()
        self.health.beat("dispatcher")
        self._dispatcher.start()
        self.cameras.start()
        self._triggers.start()
        if self._pool is not None:
            self._pool.start(list(self.cameras.names))
        self._newcomers.start()
        self._shadow.start()
        self._heartbeat.start()
        gc.collect()
        gc.freeze()  # what is here now stays: the collections of the judge look at the frames' garbage only
        log.info("line started", line=self._config.line, cameras=len(self._config.cameras), products=[*self._manifests])

    @property
    def finished(self) -> bool:
        """Whether no camera will give another frame."""
        return self._pool is None and self.cameras.finished

    def snapshot(self) -> LineSnapshot:
        """Give the line's figures of this moment."""
        return self.metrics.snapshot()

    def close(self) -> LineSnapshot:
        """Stop the cameras, let every open part get its verdict, deliver what is left; gives the last figures."""
        now_s = time.monotonic()
        drained_s = now_s + self._config.drain_timeout_s
        judging_s = min(self._config.budget_ms / 1e3 + _DRAIN_MARGIN_S, self._config.drain_timeout_s * _JUDGING_SHARE)
        judged_s = now_s + judging_s
        self._triggers.stop()
        self._newcomers.close()
        self._shadow.close()
        if self._pool is not None:
            self._pool.stop()
        self.cameras.stop()
        self._batcher.close()
        self.cameras.join(judged_s)
        if self._pool is not None:
            self._pool.close()  # only now: whoever gets the cameras reads them at once
        while self._judge.open_parts and time.monotonic() < judged_s:
            time.sleep(TICK_S)
        self._stop_dispatch.set()
        self._inference.close()
        self._dispatcher.join(2.0)
        self._judge.close()
        self._evidence.close(max(0.0, min(_PICTURES_S, drained_s - time.monotonic())))
        self._heartbeat.close()
        left = self._outbox.close(drained_s - _CLOSING_S)
        self._triggers.close()  # after the last acknowledgement, which moves its place
        self._thresholds.close()
        if self._part_log is not None:
            self._part_log.close(_CLOSING_S / 2)
        if self._tracing is not None:
            self._tracing.close(_CLOSING_S / 2)
        self._close_page()
        last = self.snapshot()
        log.info(
            "line stopped",
            triggered=last.triggered,
            judged=last.judged,
            acknowledged=last.acknowledged,
            undelivered=last.undelivered,
            left_in_outbox=left.parts,
        )
        return last

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

    def _close_page(self) -> None:
        if self._page is not None:
            self._page.__exit__(None, None, None)

    def _make_outbox(self, config: LineConfig) -> Outbox:
        return Outbox(
            config.outbox,
            Sink(config.kafka, encoder=self._encoder, metrics=self.metrics, health=self.health, tracing=self._tracing),
            max_held=config.kafka.max_unacknowledged,
            metrics=self.metrics,
            health=self.health,
        )

    def _make_triggers(self, config: LineConfig) -> TriggerReader:
        return TriggerReader(
            config.kafka,
            config.station_plans,
            line=config.line,
            take=self._triggered,
            refuse=self._outbox.put,
            encoder=self._encoder,
            metrics=self.metrics,
            health=self.health,
        )

    def _make_judge(self, config: LineConfig, run: str) -> Judge:
        return Judge(
            Parts(config.station_plans, {}, budget_s=config.budget_ms / 1e3, run=run),
            self._manifests,
            self._thresholds,
            evidence=self._evidence,
            encoder=self._encoder,
            outbox=self._outbox,
            metrics=self.metrics,
            health=self.health,
            settled=self._triggers.settled,
            graph_products=config.graph_products,
            part_log=self._part_log,
            tracing=self._tracing,
        )

    def _make_readers(self, config: LineConfig, run: str) -> Readers:
        return Readers(
            self._manifests,
            config.station_plans,
            batcher=self._batcher,
            judge=self._judge,
            encoder=self._encoder,
            outbox=self._outbox,
            metrics=self.metrics,
            health=self.health,
            take=self._accept,
            run=run,
            budget_s=config.budget_ms / 1e3,
            networks=config.camera_networks,
            graphs=Graphs(config, self._manifests),
        )

    def _make_heartbeat(self, config: LineConfig) -> Heartbeat:
        return Heartbeat(
            config.monitoring.heartbeat_s,
            self._manifests,
            self._thresholds,
            epoch=lambda: self.cameras.epoch,
            refused=self._newcomers.fault,
            candidate=self._newcomers.candidate,
            encoder=self._encoder,
            put=self._outbox.put,
            metrics=self.metrics,
            health=self.health,
        )

    # Camera threads, and that of the triggers

    def _accept(self, frame: Frame) -> None:
        self._infer(self._judge.accept(frame))

    def _triggered(self, trigger: Trigger) -> None:
        place, part = self._place, trigger
        if inspection_id(place.source, part.station, part.part_id, None, part.meas_id) in self._told:
            # Judged by the run before, whose place in the topic was not kept: its verdict lies in the outbox.
            self.metrics.trigger("duplicate")
            self._triggers.settled(trigger.receipt)
            return
        self._infer(self._judge.trigger(replace(trigger, epoch=self.cameras.epoch)))

    def _infer(self, frames: list[Frame]) -> None:
        for frame in frames:
            if (evicted := self._batcher.put(frame)) is not None:
                self._judge.put(Inference(evicted, cause=evicted.cause))

    # Dispatcher thread

    def _dispatch(self) -> None:
        """Form a batch whenever a replica has room for one: the busier they are, the larger it becomes, up to what one
        finishes in time."""
        while not self._stop_dispatch.is_set():
            self.health.beat("dispatcher")
            room = self._inference.wait_for_room(0.5)
            if not room:
                continue
            batch = self._batcher.take(timeout_s=0.25, most=room)
            live = self._in_time(batch.frames) if batch is not None else ()
            if batch is None or not live:
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
        latest = time.monotonic() + min(self._batcher.service_s, self._config.budget_ms / 2e3)
        for frame in frames:
            if frame.deadline_s <= latest:
                self.metrics.dropped(frame.camera_id, Cause.DEADLINE)
                self._judge.put(Inference(frame, cause=Cause.DEADLINE))
        return tuple(frame for frame in frames if frame.deadline_s > latest)

    def _answered(self, inferences: list[Inference]) -> None:
        """Take a batch's answers from gRPC's thread."""
        self._batcher.learn(inferences[0])
        for inference in inferences:
            self._judge.put(inference)
        self._shadow.offer(inferences)


def stored_inspections(folder: Path | None) -> frozenset[str]:
    """Give the ids of the parts whose verdict an earlier run left in the outbox of that folder."""
    if folder is None or not folder.is_dir():
        return frozenset()
    try:
        parts = [event for event in read_stored(folder) if event.is_part]
    except OSError as error:
        log.error("outbox not read: triggers may be told twice", folder=str(folder), error=error.strerror)
        return frozenset()
    return frozenset(str(decode(part.value, dict(part.headers))["attributes"]["id"]) for part in parts)


def read_manifests(config: LineConfig) -> Manifests:
    """Read the manifest of every product that the line may have to judge; with a pool, of all that are there.

    Raises ConfigError for those of the line file; of the others, one that cannot be read is left out.

    A frame is brought to model size before it is known which product its trigger names, so the products of a station
    must agree on that size.
    """
    repository, signer = config.triton.models_repo, config.triton.signer_file
    manifests = Manifests({product: read_manifest(repository, product, signer) for product in config.products})
    there = products_in(repository) if config.pool is not None else []
    for product in (product for product in there if product not in manifests):
        try:
            manifests[product] = read_manifest(repository, product, signer)
        except ConfigError as error:
            log.error("product left out", product=product, error=str(error), hint=error.hint)
    for station in config.stations:
        cameras = (camera.product for camera in config.cameras if camera.station == station.name)
        fixed = (view.product for view in station.views if view.product is not None)
        first, *others = dict.fromkeys([*cameras, *fixed, *station.recipes]) or [""]
        for other in others:
            if manifests[other].input != manifests[first].input:
                raise ConfigError(
                    f"station {station.name}: products {first!r} and {other!r} take pictures of different sizes",
                    hint="export them at one size, or give them stations of their own",
                )
    return manifests
