"""Gathers frames across cameras into batches of one product, by count or by age, fairly.

Readers put, the dispatcher takes; the queue of each camera is bounded and says what it does when full. Never talks to a
server and never judges: a frame that has to give way is handed back to the caller, who makes its verdict.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from pipeline.metrics import Metrics
from pipeline.types import Batch, Frame


@dataclass(slots=True, eq=False)  # two queues of a camera that came again are two
class _Queue:
    camera_id: str
    product: str
    capacity: int
    overflow: Literal["wait", "drop_oldest"]
    frames: deque[Frame] = field(default_factory=deque)
    leaving: bool = False


class Batcher:
    """Bounded queues, one a camera; `put` from any thread, `take` from one."""

    def __init__(self, metrics: Metrics, *, max_size: int, max_age_s: float) -> None:
        self._metrics = metrics
        self._max_size = max_size
        self._max_age_s = max_age_s
        self._changed = threading.Condition()
        self._queues: dict[str, _Queue] = {}
        self._products: dict[str, deque[_Queue]] = {}
        self._closed = False

    def add_camera(
        self, camera_id: str, *, product: str, capacity: int, overflow: Literal["wait", "drop_oldest"]
    ) -> None:
        """Make the queue of a camera; before its reader starts."""
        queue = _Queue(camera_id, product, capacity, overflow)
        with self._changed:
            self._queues[camera_id] = queue
            self._products.setdefault(product, deque()).append(queue)

    def remove_camera(self, camera_id: str) -> None:
        """Take no more frames of a camera, after its reader has stopped; what is queued still goes out."""
        with self._changed:
            queue = self._queues.pop(camera_id)
            queue.leaving = True
            if not queue.frames:
                self._products[queue.product].remove(queue)
            self._changed.notify_all()

    def wait_for_room(self, camera_id: str, timeout_s: float) -> bool:
        """Wait until a frame of this camera may be put: at once for `drop_oldest`, when there is room for `wait`."""
        with self._changed:
            queue = self._queues.get(camera_id)
            if queue is None:  # a reader that has not noticed yet that its camera is removed
                return False
            if queue.overflow == "drop_oldest":
                return True
            return self._changed.wait_for(
                lambda: len(queue.frames) < queue.capacity or queue.leaving or self._closed, timeout_s
            )

    def put(self, frame: Frame) -> Frame | None:
        """Queue a frame. Returns the frame that had to give way: the oldest one of a full queue, or None.

        A frame of a camera that was removed at this moment gives way itself.
        """
        with self._changed:
            queue = self._queues.get(frame.camera_id)
            if queue is None:
                return frame
            evicted = queue.frames.popleft() if len(queue.frames) >= queue.capacity else None
            queue.frames.append(frame)
            self._metrics.queued(queue.camera_id, len(queue.frames))
            self._changed.notify_all()
        return evicted

    def take(self, timeout_s: float) -> Batch | None:
        """Wait for a batch: `max_size` frames of a product, or fewer once the oldest is `max_age_s` old.

        The product whose oldest frame waits longest comes first; its cameras take turns. None after `timeout_s`.
        """
        until = time.monotonic() + timeout_s
        with self._changed:
            while True:
                now = time.monotonic()
                product, wait_s = self._due(now)
                if product is not None:
                    return self._gather(product)
                if now >= until:
                    return None
                self._changed.wait(min(wait_s, until - now))

    def close(self) -> None:
        """Stop waiting for company and for room: what is queued goes out as it is."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _due(self, now: float) -> tuple[str | None, float]:
        """Pick the product to send now, or say how long until the next one is old enough."""
        due, due_since, wait_s = None, float("inf"), float("inf")
        for product, queues in self._products.items():
            heads = [queue.frames[0].captured_s for queue in queues if queue.frames]
            if not heads:
                continue
            oldest = min(heads)
            full = sum(len(queue.frames) for queue in queues) >= self._max_size
            if full or self._closed or now - oldest >= self._max_age_s:
                if oldest < due_since:
                    due, due_since = product, oldest
            else:
                wait_s = min(wait_s, oldest + self._max_age_s - now)
        return due, wait_s

    def _gather(self, product: str) -> Batch:
        """Take up to `max_size` frames, one a camera in turn; the next batch starts with the camera after the last."""
        queues = self._products[product]
        frames: list[Frame] = []
        left: list[_Queue] = []
        idle = 0
        while len(frames) < self._max_size and idle < len(queues):
            queue = queues[0]
            queues.rotate(-1)
            if queue.frames:
                frames.append(queue.frames.popleft())
                self._metrics.queued(queue.camera_id, len(queue.frames))
                idle = 0
                if queue.leaving and not queue.frames:
                    left.append(queue)
            else:
                idle += 1
        for queue in left:
            queues.remove(queue)
        self._changed.notify_all()
        return Batch(product, tuple(frames))
