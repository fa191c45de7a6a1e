"""Gathers frames across cameras into batches of one product, by count or by age, fairly.

A frame's product is its camera's, or what its part's trigger names: then it waits in a queue beside the camera's own.
Readers put, the dispatcher takes; the queue of each camera is bounded and says what it does when full. Never talks to a
server and never judges: a frame that has to give way is handed back to the caller, who makes its verdict.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace

from pipeline.cameras import Overflow
from pipeline.metrics import Metrics
from pipeline.types import Batch, Cause, Frame, Inference

_SERVICE_WEIGHT = 0.2
_A_MOMENT_S = 0.02


@dataclass(slots=True, eq=False)  # two queues of a camera that came again are two
class _Queue:
    camera_id: str
    product: str
    capacity: int
    overflow: Overflow
    frames: deque[Frame] = field(default_factory=deque)
    leaving: bool = False
    gave_way: bool = False
    """Whether a frame had to since the last one was taken."""
    others: dict[str, _Queue] = field(default_factory=dict)
    """Queues of the same camera for other products."""

    def waiting(self) -> int:
        """Count the camera's frames, whatever their product."""
        return len(self.frames) + sum(len(other.frames) for other in self.others.values())


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
        self.service_s = 0.0
        """What the server needs for a batch, in seconds (moving average); a frame with less time left is late."""

    def add_camera(self, camera_id: str, *, product: str, capacity: int, overflow: Overflow) -> None:
        """Make the queue of a camera; before its reader starts."""
        queue = _Queue(camera_id, product, capacity, overflow)
        with self._changed:
            self._queues[camera_id] = queue
            self._products.setdefault(product, deque()).append(queue)

    def remove_camera(self, camera_id: str) -> None:
        """Take no more frames of a camera, after its reader has stopped; what is queued still goes out."""
        with self._changed:
            queue = self._queues.pop(camera_id)
            for each in (queue, *queue.others.values()):
                each.leaving = True
                if not each.frames:
                    self._products[each.product].remove(each)
            self._changed.notify_all()

    def wait_for_room(self, camera_id: str, timeout_s: float) -> bool:
        """Wait until a frame of this camera may be put: at once for `drop_oldest`, when there is room for `wait`, when
        there is room or the oldest frame is late for `drop_late`. False after `timeout_s`.
        """
        until = time.monotonic() + timeout_s
        with self._changed:
            queue = self._queues.get(camera_id)
            if queue is None:  # a reader that has not noticed yet that its camera is removed
                return False
            while (wait_s := self._room_in_s(queue)) > 0:
                left_s = until - time.monotonic()
                if left_s <= 0:
                    return False
                self._changed.wait(min(left_s, wait_s))
            return not queue.leaving

    def put(self, frame: Frame) -> Frame | None:
        """Queue a frame. Returns the frame that had to give way, with its cause: the oldest one of a full queue, or
        None. A frame whose camera has been removed gives way itself.
        """
        with self._changed:
            if frame.camera_id not in self._queues:
                return replace(frame, image=None, cause=Cause.CAMERA_LOST)
            queue = self._queue_of(frame)
            evicted = self._evict(queue) if len(queue.frames) >= queue.capacity else None
            queue.frames.append(frame)
            self._note(queue.camera_id)
            self._changed.notify_all()
        return evicted

    def take(self, timeout_s: float, most: int | None = None) -> Batch | None:
        """Wait for a batch: `max_size` frames of a product, or `most` if that is less, or fewer once the oldest is
        `max_age_s` old or one had to give way: a camera that is fast enough would never have an old one.

        The product whose oldest frame waits longest comes first; its cameras take turns. None after `timeout_s`.
        """
        until = time.monotonic() + timeout_s
        size = self._max_size if most is None else min(most, self._max_size)
        with self._changed:
            while True:
                now = time.monotonic()
                product, wait_s = self._due(now, size)
                if product is not None:
                    return self._gather(product, size)
                if now >= until:
                    return None
                self._changed.wait(min(wait_s, until - now))

    def learn(self, first: Inference) -> None:
        """Note what a batch took, by its first answer, or after how long it was given up: that counts as twice the
        average at most, since one that hung says nothing of the next."""
        if first.sent_s is None:
            return
        if first.received_s is not None:
            took_s = first.received_s - first.sent_s
        elif first.cause is Cause.DEADLINE:
            took_s = min(time.monotonic() - first.sent_s, 2 * self.service_s + _A_MOMENT_S)
        else:
            return
        self.service_s += _SERVICE_WEIGHT * (took_s - self.service_s)

    def close(self) -> None:
        """Stop waiting for company and for room: what is queued goes out as it is."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _queue_of(self, frame: Frame) -> _Queue:
        own = self._queues[frame.camera_id]
        if frame.product == own.product:
            return own
        other = own.others.get(frame.product)
        if other is None:
            other = _Queue(own.camera_id, frame.product, own.capacity, own.overflow)
            own.others[frame.product] = other
            self._products.setdefault(frame.product, deque()).append(other)
        return other

    def _note(self, camera_id: str) -> None:
        if (queue := self._queues.get(camera_id)) is not None:  # what a removed camera left is nobody's queue
            self._metrics.queued(camera_id, queue.waiting())

    def _room_in_s(self, queue: _Queue) -> float:
        """Say how long a full camera holds its reader back, if nothing is taken from it; 0 when there is room."""
        if self._closed or queue.leaving or queue.waiting() < queue.capacity or queue.overflow == "drop_oldest":
            return 0.0
        if queue.overflow == "wait":
            return float("inf")
        return min(self._late_in_s(each.frames[0]) for each in (queue, *queue.others.values()) if each.frames)

    def _late_in_s(self, frame: Frame) -> float:
        return max(0.0, frame.deadline_s - self.service_s - time.monotonic())

    def _evict(self, queue: _Queue) -> Frame:
        frame = queue.frames.popleft()
        queue.gave_way = True
        is_late = queue.overflow == "drop_late" and self._late_in_s(frame) <= 0
        cause = Cause.DEADLINE if is_late else Cause.QUEUE_FULL
        self._metrics.dropped(queue.camera_id, cause)
        return replace(frame, image=None, cause=cause)

    def _due(self, now: float, size: int) -> tuple[str | None, float]:
        """Pick the product to send now, or say how long until the next one is old enough."""
        due, due_since, wait_s = None, float("inf"), float("inf")
        for product, queues in self._products.items():
            heads = [queue.frames[0].captured_s for queue in queues if queue.frames]
            if not heads:
                continue
            oldest = min(heads)
            full = sum(len(queue.frames) for queue in queues) >= size or any(queue.gave_way for queue in queues)
            if full or self._closed or now - oldest >= self._max_age_s:
                if oldest < due_since:
                    due, due_since = product, oldest
            else:
                wait_s = min(wait_s, oldest + self._max_age_s - now)
        return due, wait_s

    def _gather(self, product: str, size: int) -> Batch:
        """Take up to `size` frames, one a camera in turn; the next batch starts with the camera after the last."""
        queues = self._products[product]
        frames: list[Frame] = []
        left: list[_Queue] = []
        idle = 0
        while len(frames) < size and idle < len(queues):
            queue = queues[0]
            queues.rotate(-1)
            if queue.frames:
                frames.append(queue.frames.popleft())
                queue.gave_way = False
                self._note(queue.camera_id)
                idle = 0
                if queue.leaving and not queue.frames:
                    left.append(queue)
            else:
                idle += 1
        for queue in left:
            queues.remove(queue)
        self._changed.notify_all()
        return Batch(product, tuple(frames))
