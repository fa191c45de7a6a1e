"""The cameras that a line reads: those of its file from the start, those of a pool as they come and go.

Keeps the reader of each, its queue, its figures and its place at the judge in step, and tells the world of its state.
What a removed camera's reader still reads is not taken. Owned by `app`; a pool calls it from one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime

import structlog

from pipeline.batcher import Batcher
from pipeline.cameras import Camera
from pipeline.deepstream import Graphs
from pipeline.errors import ConfigError
from pipeline.events import Encoder
from pipeline.health import Health
from pipeline.ingest import CameraReader, Handover
from pipeline.judge import Judge
from pipeline.manifest import Manifest, region_doubts, with_models_region
from pipeline.metrics import Metrics
from pipeline.networks import Networks
from pipeline.outbox import Outbox
from pipeline.stations import Station
from pipeline.types import CameraState, Frame

_REMOVE_S = 2.0
"""Longest wait for the readers of removed cameras to let go of them; Kafka's heartbeats wait as well."""

log = structlog.get_logger(__name__)


class Readers:
    """The readers of one line; `take` gets each frame on its camera's thread."""

    def __init__(
        self,
        manifests: Mapping[str, Manifest],
        stations: Mapping[str, Station],
        *,
        batcher: Batcher,
        judge: Judge,
        encoder: Encoder,
        outbox: Outbox,
        metrics: Metrics,
        health: Health,
        take: Callable[[Frame], None],
        run: str,
        budget_s: float,
        networks: Networks,
        graphs: Graphs,
    ) -> None:
        self._manifests = manifests
        self._stations = stations
        self._batcher = batcher
        self._judge = judge
        self._encoder = encoder
        self._outbox = outbox
        self._metrics = metrics
        self._take = take
        self._graphs = graphs
        self._handover = Handover(
            accept=take,
            answer=judge.answer,
            wait_for_room=batcher.wait_for_room,
            announce=self._announce,
            metrics=metrics,
            health=health,
            run=run,
            budget_s=budget_s,
            networks=networks,
            open=graphs.open,
        )
        self._readers: dict[str, CameraReader] = {}
        self._numbers: dict[str, int] = {}
        self.epoch: int | None = None
        """The generation of the pool's group, which each frame and each status is stamped with; None without a pool."""

    @property
    def finished(self) -> bool:
        """Whether no camera will give another frame."""
        return all(reader.finished for reader in self._readers.values())

    @property
    def names(self) -> Collection[str]:
        """Ids of the cameras that are read."""
        return self._readers.keys()

    @property
    def products(self) -> Collection[str]:
        """Products that this worker can judge, once started."""
        return self._manifests.keys()

    def prepare(self, camera: Camera) -> None:
        """Make all that a camera needs. Raises ConfigError; its product is one of `products`, its id is free."""
        for doubt in region_doubts([camera], self._manifests):
            log.warning("region differs from the model's", doubt=doubt)
        seen = with_models_region(camera, self._manifests[camera.product])
        size = self._manifests[camera.product].input
        self._metrics.camera(camera.id, product=camera.product, station=camera.station)
        self._batcher.add_camera(
            camera.id, product=camera.product, capacity=camera.queue_frames, overflow=camera.overflow
        )
        self._judge.add_camera(camera.id, camera.product)

        def accept(frame: Frame) -> None:
            if self._readers.get(camera.id) is reader:  # a read that outlasted the camera's removal is not taken
                self._take(replace(frame, epoch=self.epoch))

        def announce(camera_id: str, state: CameraState, reason: str) -> None:
            if self._readers.get(camera.id) is reader:
                self._announce(camera_id, state, reason)

        handover = replace(self._handover, accept=accept, announce=announce)
        reader = CameraReader(seen, (size.height, size.width), handover, number=self._numbers.get(camera.id, 0))
        self._readers[camera.id] = reader

    def start(self) -> None:
        """Begin to read every camera that is prepared."""
        for reader in self._readers.values():
            reader.start()

    def objection(self, camera: Camera) -> str:
        """Say why a camera, whose product is one of `products`, cannot be read on this line; '' when it can."""
        manifest, station = self._manifests[camera.product], self._stations.get(camera.station)
        try:
            with_models_region(camera, manifest)
        except ConfigError as error:
            return str(error)
        if station is None:
            return ""
        view = station.view(camera.id)
        if view is None and (station.views or station.trigger != "free_run"):
            return f"station {station.name} of the line file has no view of this camera"
        fixed = [view.product] if view is not None and view.product is not None else []
        for other in [*fixed, *station.recipes]:
            if self._manifests[other].input != manifest.input:
                return f"products {camera.product!r} and {other!r} of one station take pictures of different sizes"
        return ""

    def add_camera(self, camera: Camera) -> None:
        """Begin to read a camera while the line runs; there is no objection to it."""
        self.prepare(camera)
        self._readers[camera.id].start()

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
            self._metrics.retire(name)
            if reason is not None:
                self._announce(name, CameraState.ENDED, reason)
            self._judge.remove_camera(name)

    def refuse_camera(self, camera_id: str, reason: str) -> None:
        """Tell the world that a camera of the pool is not read here."""
        self._tell(camera_id, CameraState.FAILED, reason)

    def stop(self) -> None:
        """Ask every reader to end."""
        for reader in self._readers.values():
            reader.stop()

    def join(self, until_s: float) -> None:
        """Wait for the readers' ends, until this moment of the monotonic clock."""
        for reader in self._readers.values():
            reader.join(max(0.1, until_s - time.monotonic()))
        self._graphs.close()

    def _announce(self, camera_id: str, state: CameraState, reason: str) -> None:
        self._judge.camera_is(camera_id, state)
        self._tell(camera_id, state, reason)

    def _tell(self, camera_id: str, state: CameraState, reason: str) -> None:
        self._outbox.put(self._encoder.status(camera_id, state, reason, datetime.now(UTC), epoch=self.epoch))
