"""Measures real Triton servers side by side, through the line's own client and its balancing; for `bench scaling`.

Every count of servers is kept busy in turn, round after round, so that a busy moment of the machine falls on all. It
starts no server. Servers of one machine share its processors: give each its own by `taskset`, or more than there are
to see what sharing costs.
"""

from __future__ import annotations

import queue
import statistics
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from pipeline.health import Health
from pipeline.inference import InferenceClient
from pipeline.manifest import Manifest
from pipeline.metrics import Metrics
from pipeline.servers import Triton
from pipeline.types import Batch, Frame, Image, Inference

BATCH = 8
ROUNDS = 5
DEADLINE_S = 60.0
ROOM_S = 10.0


def measure(
    addresses: Sequence[str], counts: Sequence[int], manifest: Manifest, seconds: float
) -> list[dict[str, Any]]:
    """Give one row for each count of servers. Raises DependencyError when one of them cannot be used."""
    size = (manifest.input.height, manifest.input.width, 3)
    image = np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)
    rates: dict[int, list[float]] = {count: [] for count in counts}
    latencies: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(ROUNDS):
        for count in counts:
            client = InferenceClient(
                Triton(address=list(addresses[:count])),
                {manifest.product: manifest},
                metrics=Metrics(),
                health=Health(),
            )
            try:
                client.start()
                client.require_all()
                answered, took_s = _keep_busy(client, manifest.product, image, seconds / ROUNDS)
            finally:
                client.close()
            rates[count].append(len(answered) * BATCH / took_s)
            latencies[count] += answered
    return [_row(count, rates[count], latencies[count], statistics.median(rates[counts[0]])) for count in counts]


def _row(count: int, rates: list[float], latencies_s: list[float], of_first: float) -> dict[str, Any]:
    p50, p99 = np.percentile(latencies_s, [50, 99]) * 1e3
    rate = statistics.median(rates)
    return {
        "servers": count,
        "images_per_s": round(rate, 1),
        "of_the_first": round(rate / of_first, 2),
        "batch_p50_ms": round(float(p50), 1),
        "batch_p99_ms": round(float(p99), 1),
        "spread": [round(each, 1) for each in (min(rates), max(rates))],
    }


def _keep_busy(client: InferenceClient, product: str, image: Image, seconds: float) -> tuple[list[float], float]:
    """Send batches whenever a server has room for one; gives the seconds that each took, and those of all."""
    answers: queue.Queue[list[Inference]] = queue.Queue()
    batch = Batch(product, ())
    begin, sent = time.monotonic(), 0
    while time.monotonic() - begin < seconds:
        if not client.wait_for_room(ROOM_S):
            raise RuntimeError(f"no server had room for a batch within {ROOM_S:.0f} s")
        now_s = time.monotonic()
        frame = Frame("c", "s", product, sent, "", "generated", datetime.now(UTC), now_s, now_s + DEADLINE_S, image)
        batch = Batch(product, (frame,) * BATCH)
        client.submit(batch, answers.put)
        sent += 1
    latencies = []
    for _ in range(sent):
        first = answers.get(timeout=DEADLINE_S)[0]
        if first.scores is None or first.sent_s is None or first.received_s is None:
            raise RuntimeError(f"a batch was not judged: {first.cause}")
        latencies.append(first.received_s - first.sent_s)
    return latencies, time.monotonic() - begin
