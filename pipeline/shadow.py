"""Lets the version on trial judge parts whose verdict is given, and counts how often both say the same.

A frame comes here after its answer has gone to the judge, waits in a short queue for a replica that has nothing else to
do, and is given up when there is none: a verdict never waits for a shadow. What the candidate says goes into counts and
one line of the log a disagreement, into no event. Owned by `app`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import structlog

from pipeline.health import Health
from pipeline.inference import InferenceClient
from pipeline.manifest import Manifests
from pipeline.metrics import Metrics
from pipeline.thresholds import ThresholdCache
from pipeline.types import Batch, Inference, Judgement
from pipeline.verdict import decide

_STAGE = "shadow"
_QUEUE_LENGTH = 8
_IDLE_S = 0.5
_ANSWER_S = 5.0
_TICK_S = 0.02

log = structlog.get_logger(__name__)


class Shadow:
    """At work between `start` and `close`; `offer` from any thread, never blocking."""

    def __init__(
        self,
        manifests: Manifests,
        inference: InferenceClient,
        thresholds: ThresholdCache,
        *,
        metrics: Metrics,
        health: Health,
    ) -> None:
        self._manifests = manifests
        self._inference = inference
        self._thresholds = thresholds
        self._metrics = metrics
        self._health = health
        # Answered batches of one product; a full queue costs the newest one its shadow, which is counted.
        self._queue: queue.Queue[list[Inference]] = queue.Queue(_QUEUE_LENGTH)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=_STAGE, daemon=True)

    def start(self) -> None:
        """Begin to compare."""
        self._health.beat(_STAGE)
        self._thread.start()

    def offer(self, answered: Sequence[Inference]) -> None:
        """Take a product's answers, of whose parts some may be the candidate's too."""
        product = answered[0].frame.product
        rollout = self._inference.shadow(product)
        if rollout is None:
            return
        chosen = [each for each in answered if each.scores is not None and rollout.takes(each.frame.part_id)]
        if not chosen:
            return
        try:
            self._queue.put_nowait(chosen)
        except queue.Full:
            self._count(product, rollout.version, "dropped", len(chosen))

    def close(self) -> None:
        """End the thread; what waits is given up."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._health.beat(_STAGE)
            try:
                answered = self._queue.get(timeout=0.25)
            except queue.Empty:
                continue
            try:
                self._judge(answered)
            except Exception:  # the thread's top frame: verdicts do not depend on it
                log.exception("shadow not compared", product=answered[0].frame.product)
        self._health.retire(_STAGE)

    def _judge(self, answered: list[Inference]) -> None:
        product = answered[0].frame.product
        done: queue.SimpleQueue[list[Inference]] = queue.SimpleQueue()
        until_s = time.monotonic() + _IDLE_S
        while (rollout := self._inference.shadow(product)) is not None and not self._stop.is_set():
            late_s = time.monotonic() + _ANSWER_S
            frames = tuple(replace(each.frame, deadline_s=late_s, request=None) for each in answered)
            if self._inference.submit_beside(Batch(product, frames), done.put):
                break
            if time.monotonic() > until_s:
                self._count(product, rollout.version, "dropped", len(answered))
                return
            self._stop.wait(_TICK_S)
        else:
            return
        try:
            others = done.get(timeout=_ANSWER_S + 1.0)
        except queue.Empty:
            others = []
        self._compare(answered, others, rollout.version)

    def _compare(self, answered: list[Inference], others: list[Inference], version: int) -> None:
        product = answered[0].frame.product
        self._count(product, version, "failed", len(answered) - len(others))
        for given, other in zip(answered, others, strict=False):
            says, would_say = self._judgement(given), self._judgement(other)
            outcome = "agreed" if says is would_say else "disagreed"
            if would_say is Judgement.UNINSPECTED:
                outcome = "failed"
            self._count(product, version, outcome)
            if outcome == "disagreed":
                log.info(
                    "shadow disagrees",
                    product=product,
                    version=version,
                    part=given.frame.part_id,
                    camera=given.frame.camera_id,
                    verdict=says.value,
                    shadow=would_say.value,
                )

    def _judgement(self, inference: Inference) -> Judgement:
        product = inference.frame.product
        manifest = self._manifests.of(product, inference.model)
        limits = self._thresholds.get(product, inference.model)
        return decide(inference, limits, None if manifest is None else manifest.calibration).judgement

    def _count(self, product: str, version: int, outcome: str, views: int = 1) -> None:
        self._metrics.candidates.labels(product, str(version), outcome).inc(views)
