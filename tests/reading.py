"""A camera's reader without the rest of the line, for tests: what it handed over, and what it said of itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from line_process import wait_until

from pipeline.cameras import Camera
from pipeline.health import Health
from pipeline.ingest import CameraReader, Handover
from pipeline.metrics import Metrics
from pipeline.networks import Networks
from pipeline.types import CameraState, Frame


@dataclass
class Reading:
    """What one reader did so far."""

    frames: list[Frame] = field(default_factory=list)
    states: list[tuple[str, str]] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)
    held_until_s: float = 0.0

    def wait_for(self, state: CameraState, reason: str = "", timeout_s: float = 60) -> None:
        """Wait until the reader's present state is this one."""
        wait_until(lambda: self.states[-1:] == [(state, reason)], timeout_s, f"{state} ({reason})")

    def wait_for_frames(self, count: int, timeout_s: float = 60) -> None:
        """Wait until so many frames have come."""
        wait_until(lambda: len(self.frames) >= count, timeout_s, f"{count} frames")

    def hold(self, seconds: float) -> None:
        """Have no room for frames meanwhile."""
        self.held_until_s = time.monotonic() + seconds

    def has_room(self, camera_id: str, timeout_s: float) -> bool:
        del camera_id
        wait_s = self.held_until_s - time.monotonic()
        time.sleep(max(0.0, min(timeout_s, wait_s)))
        return wait_s <= timeout_s


@contextmanager
def reading(camera: Camera, networks: Networks = ()) -> Iterator[Reading]:
    """Read a camera inside the block; none outside of `networks`."""
    done = Reading()
    done.metrics.camera(camera.id, product=camera.product, station=camera.station)
    handover = Handover(
        accept=done.frames.append,
        answer=lambda _: None,
        wait_for_room=done.has_room,
        announce=lambda _, state, reason: done.states.append((state, reason)),
        metrics=done.metrics,
        health=Health(),
        run="run",
        budget_s=60.0,
        networks=networks,
    )
    reader = CameraReader(camera, (64, 64), handover)
    reader.start()
    try:
        yield done
    finally:
        reader.stop()
        assert reader.join(30.0)
