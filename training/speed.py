"""How fast networks run side by side: pictures a second of each, exported, in ONNX Runtime on the CPU.

Rounds are interleaved, so that a machine whose speed drifts drifts for all; the median round counts. Weights do not
matter, shapes do. Called by `cli` for `compare`.
"""

import statistics
import time
from collections.abc import Mapping

import numpy as np
import onnxruntime as ort

from training.config import NetworkConfig
from training.detector import empty_deployable
from training.export import stage_graphs
from training.graphs import joined
from training.table import Speed

BATCHES = (1, 8)
WARM_UPS = 2


def measure_speed(networks: Mapping[str, NetworkConfig], teacher_arch: str, rounds: int) -> dict[str, Speed]:
    """Pictures a second of each network by name; uses all cores, so run it on an idle machine."""
    sessions = {name: _session(config, teacher_arch) for name, config in networks.items()}
    generator = np.random.default_rng(0)
    seconds: dict[str, dict[int, list[float]]] = {name: {batch: [] for batch in BATCHES} for name in networks}
    for turn in range(rounds + WARM_UPS):
        for name, session in sessions.items():
            size = networks[name].image_size
            for batch in BATCHES:
                images = generator.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
                started = time.perf_counter()
                session.run(["map_score", "descriptor"], {"image": images})
                if turn >= WARM_UPS:
                    seconds[name][batch].append(time.perf_counter() - started)
    rates = {n: {b: b / statistics.median(spent) for b, spent in by.items()} for n, by in seconds.items()}
    return {name: Speed(batch_1=rate[1], batch_8=rate[8]) for name, rate in rates.items()}


def _session(config: NetworkConfig, teacher_arch: str) -> ort.InferenceSession:
    network = empty_deployable(config, teacher_arch)
    graph = joined(stage_graphs(network, config.image_size), network.wiring)
    return ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
