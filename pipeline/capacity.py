"""How many replicas of Triton a number of cameras needs: a simulation of the line's queue with measured service times.

A frame waits in one queue; a replica that is free takes up to `batch` frames, the oldest first, waiting for others no
longer than `max_age_ms`, and answers them after the time that `bench serving` measured for that many images. What could
not be answered within the budget is given up, as the line does. Left out: capture, decoding, Kafka, faults. Pure: the
caller brings the figures. Used by `logicrd plan` and by tests/benchmarks/scaling.py.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

HEADROOM = 0.8
"""The share of its capacity up to which a replica is loaded by plan: the rest is for bursts and a slow minute."""
IMAGE_CHANNELS = 3

# Wanted replicas, from the time (s), the mean wait (ms) of the frames of the last interval, the share of it that the
# replicas were busy, and the replicas that are wanted now.
Scaler = Callable[[float, float, float, int], int]


@dataclass(frozen=True, slots=True)
class Service:
    """What one replica needs for a batch, in ms: a straight line through two measured points."""

    single_ms: float
    full_ms: float
    full_batch: int

    def time_ms(self, images: int) -> float:
        """Time for so many images in one batch."""
        share = (images - 1) / (self.full_batch - 1)
        return self.single_ms + (self.full_ms - self.single_ms) * share

    def images_per_s(self, batch: int) -> float:
        """What one replica gives when every batch is full."""
        return 1e3 * batch / self.time_ms(batch)


@dataclass(frozen=True, slots=True)
class Load:
    """Cameras that each give a part `rate_hz` times a second, and what is asked of the answers."""

    cameras: int
    rate_hz: float
    budget_ms: float
    batch: int = 8
    max_age_ms: float = 30.0

    @property
    def images_per_s(self) -> float:
        """All cameras together."""
        return self.cameras * self.rate_hz


@dataclass(slots=True)
class Outcome:
    """What a simulated spell gave; `late_share` of the frames found no answer within the budget."""

    images_per_s: float
    p50_ms: float
    p99_ms: float
    late_share: float
    mean_batch: float
    replicas: list[tuple[float, int]] = field(default_factory=list)
    """Ready replicas over time, as (second, count) at each change."""


@dataclass(slots=True)
class _Fleet:
    """Replicas by the time (s) from which each is free; a new one is free once it has started."""

    free_s: list[float]
    wanted: int
    startup_s: float
    changes: list[tuple[float, int]]

    def resize(self, now_s: float, wanted: int) -> None:
        """Start or stop replicas; one that is stopped answers what it holds."""
        for _ in range(wanted - self.wanted):
            heapq.heappush(self.free_s, now_s + self.startup_s)
        for _ in range(self.wanted - wanted):
            # The one that is free last: it may be still starting.
            self.free_s.remove(max(self.free_s))
        if wanted != self.wanted:
            heapq.heapify(self.free_s)
            self.wanted = wanted
            self.changes.append((now_s, wanted))


def simulate(
    load: Load,
    service: Service,
    replicas: int,
    *,
    seconds: float = 60.0,
    seed: int = 0,
    scaler: Scaler | None = None,
    interval_s: float = 15.0,
    startup_s: float = 0.0,
    rate_at: Callable[[float], float] = lambda _: 1.0,
) -> Outcome:
    """Run the queue for so many seconds. `rate_at` scales the load over time; `scaler` is asked every `interval_s`."""
    fleet = _Fleet([0.0] * replicas, replicas, startup_s, [(0.0, replicas)])
    waiting: deque[float] = deque()
    latencies: list[float] = []
    waits: list[float] = []
    busy_s = 0.0
    late = batches = 0
    next_look_s = interval_s
    arrivals = _arrivals(load, seconds, random.Random(seed), rate_at)  # noqa: S311 (a load, no secret)
    upcoming = next(arrivals, math.inf)
    while upcoming < math.inf or waiting:
        start_s = max(fleet.free_s[0], _ready_s(waiting, load, upcoming))
        if upcoming <= start_s:
            waiting.append(upcoming)
            if scaler is not None and upcoming >= next_look_s:
                wait_ms = 1e3 * sum(waits) / max(len(waits), 1)
                fleet.resize(upcoming, scaler(upcoming, wait_ms, busy_s / interval_s / fleet.wanted, fleet.wanted))
                waits, busy_s, next_look_s = [], 0.0, upcoming + interval_s
            upcoming = next(arrivals, math.inf)
            continue
        taken: list[float] = []
        while waiting and len(taken) < load.batch:
            frame_s = waiting.popleft()
            if 1e3 * (start_s - frame_s) + service.time_ms(load.batch) > load.budget_ms:
                late += 1
            else:
                taken.append(frame_s)
        if taken:
            done_s = start_s + service.time_ms(len(taken)) / 1e3
            heapq.heapreplace(fleet.free_s, done_s)
            batches += 1
            busy_s += done_s - start_s
            latencies += [done_s - frame_s for frame_s in taken]
            waits += [start_s - frame_s for frame_s in taken]
    latencies.sort()
    return Outcome(
        images_per_s=len(latencies) / seconds,
        p50_ms=_quantile_ms(latencies, 0.5),
        p99_ms=_quantile_ms(latencies, 0.99),
        late_share=late / max(late + len(latencies), 1),
        mean_batch=len(latencies) / max(batches, 1),
        replicas=fleet.changes,
    )


def replicas_for(load: Load, service: Service) -> int:
    """Give the fewest replicas that answer everything in time with headroom. Raises ValueError when none could."""
    if service.time_ms(load.batch) > load.budget_ms:
        raise ValueError(
            f"a batch of {load.batch} takes {service.time_ms(load.batch):.0f} ms, more than the budget of "
            f"{load.budget_ms:.0f} ms: a smaller batch, a faster machine or a longer budget"
        )
    replicas = max(1, math.ceil(load.images_per_s / (HEADROOM * service.images_per_s(load.batch))))
    while simulate(load, service, replicas).late_share > 0:
        replicas += 1
    return replicas


def _arrivals(load: Load, seconds: float, chance: random.Random, rate_at: Callable[[float], float]) -> Iterator[float]:
    """Give the frames' times in order: each camera has its own phase, and jitters by a tenth of its period."""
    period_s = 1 / load.rate_hz
    due = [(chance.random() * period_s, camera) for camera in range(load.cameras)]
    heapq.heapify(due)
    while due[0][0] < seconds:
        now_s, camera = due[0]
        share = rate_at(now_s)
        if chance.random() < share:
            yield now_s
        heapq.heapreplace(due, (now_s + period_s * chance.uniform(0.9, 1.1), camera))


def _ready_s(waiting: deque[float], load: Load, upcoming: float) -> float:
    """Give when a batch may leave: when it is full, or its oldest frame has waited long enough."""
    if not waiting:
        return math.inf
    if len(waiting) >= load.batch or upcoming == math.inf:
        return waiting[-1]
    return waiting[0] + load.max_age_ms / 1e3


def _quantile_ms(ordered_s: list[float], share: float) -> float:
    if not ordered_s:
        return math.nan
    return round(1e3 * ordered_s[min(len(ordered_s) - 1, int(share * len(ordered_s)))], 1)
