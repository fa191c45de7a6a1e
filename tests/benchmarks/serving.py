"""Measures what serving costs: the Triton ensemble of a product against the same network as one fused ONNX graph.

Run by `logicrd bench serving`, or by hand against a running stack. Both sides are asked in turn, round after round, so
a busy moment of the machine falls on both; figures are medians over rounds. It starts no server and judges nothing: it
prints. `--fused` is the file that `logicrd-train export --fused` writes. Needs nothing else busy on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException

ROOT = Path(__file__).parents[2]
OUTPUTS = ("score", "map_score", "mahalanobis", "anomaly_map")
# (images a request, requests in flight): single requests as the line sends them, and full batches.
CELLS = ((1, 1), (1, 2), (1, 4), (8, 1), (8, 2), (8, 3))
FUSED_BATCHES = (1, 8)
REQUEST_TIMEOUT_S = 60.0


class BenchmarkError(Exception):
    """What cannot be measured, and what to do about it."""


@dataclass(slots=True)
class Cell:
    """What one setting (batch, requests in flight) gave: a rate for each round, a latency for each request."""

    images_per_s: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)

    def add(self, images: int, wall_s: float, latencies_s: list[float]) -> None:
        """One round's outcome."""
        self.images_per_s.append(images / wall_s)
        self.latencies_s.extend(latencies_s)

    def summary(self) -> dict[str, float]:
        """Median rate over rounds; percentiles over all requests."""
        p50, p99 = np.percentile(self.latencies_s, [50, 99]) * 1000
        return {
            "images_per_s": round(statistics.median(self.images_per_s), 2),
            "latency_p50_ms": round(float(p50), 2),
            "latency_p99_ms": round(float(p99), 2),
        }


class Ensemble:
    """One product's ensemble behind gRPC."""

    def __init__(self, address: str, product: str) -> None:
        self._client = triton.InferenceServerClient(address)
        self._product = product
        self._outputs = [triton.InferRequestedOutput(name) for name in OUTPUTS]

    def image_shape(self) -> tuple[int, ...]:
        """Height, width and 3 of the ensemble's input; raises BenchmarkError when it is not served."""
        try:
            metadata = self._client.get_model_metadata(self._product, client_timeout=REQUEST_TIMEOUT_S)
        except InferenceServerException as error:
            remedy = "`logicrd stack status` shows the server"
            raise BenchmarkError(f"product '{self._product}': {error.message()}; {remedy}") from error
        return tuple(int(size) for size in metadata.inputs[0].shape[1:])

    def measure(self, images: Any, in_flight: int, requests: int) -> tuple[float, list[float]]:
        """Send the batch `images` so often, at most `in_flight` at once: (wall seconds, each request's seconds)."""
        tensor = triton.InferInput("image", list(images.shape), "UINT8").set_data_from_numpy(images)
        done: queue.Queue[tuple[float, Any]] = queue.Queue()
        latencies: list[float] = []
        start = time.perf_counter()
        for sent in range(requests):
            if sent >= in_flight:
                latencies.append(_next_latency(done))
            on_answer = partial(_answered, done, time.perf_counter())
            self._client.async_infer(
                self._product, [tensor], on_answer, outputs=self._outputs, client_timeout=REQUEST_TIMEOUT_S
            )
        latencies.extend(_next_latency(done) for _ in range(min(in_flight, requests)))
        return time.perf_counter() - start, latencies

    def stages(self) -> dict[str, dict[str, int]]:
        """Triton's running totals of the ensemble and its steps: requests, and nanoseconds by phase."""
        config = self._client.get_model_config(self._product, client_timeout=REQUEST_TIMEOUT_S).config
        names = {self._product, *(step.model_name for step in config.ensemble_scheduling.step)}
        answer = self._client.get_inference_statistics(client_timeout=REQUEST_TIMEOUT_S)
        return {model.name: _totals(model) for model in answer.model_stats if model.name in names}


def _totals(model: Any) -> dict[str, int]:
    phases = model.inference_stats
    return {
        "requests": phases.success.count,
        "queue_ns": phases.queue.ns,
        "input_ns": phases.compute_input.ns,
        "compute_ns": phases.compute_infer.ns,
        "output_ns": phases.compute_output.ns,
    }


def _answered(done: queue.Queue[tuple[float, Any]], start: float, result: Any, error: Any) -> None:
    del result
    done.put((time.perf_counter() - start, error))


def _next_latency(done: queue.Queue[tuple[float, Any]]) -> float:
    latency, error = done.get(timeout=REQUEST_TIMEOUT_S)
    if error is not None:
        raise BenchmarkError(f"an inference failed: {error.message()}")
    return latency


class FusedGraph:
    """The fused graph in a process of its own (`fused_worker.py`), asked over pipes."""

    def __init__(self, python: Path, path: Path, threads: int) -> None:
        worker = Path(__file__).with_name("fused_worker.py")
        self._process = subprocess.Popen(
            [str(python), str(worker), str(path), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def __enter__(self) -> FusedGraph:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=30)

    def measure(self, batch: int, images: int) -> list[float]:
        """Seconds of each run of `batch` images, until `images` have passed."""
        if self._process.stdin is None:
            raise BenchmarkError("the fused graph's process has no input")
        self._process.stdin.write(json.dumps({"batch": batch, "images": images}) + "\n")
        self._process.stdin.flush()
        return [float(seconds) for seconds in self._read()["seconds"]]

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise BenchmarkError(f"the fused graph's process ended with {self._process.wait()}; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(slots=True)
class Rounds:
    """Everything measured so far."""

    ensemble: dict[tuple[int, int], Cell] = field(default_factory=lambda: {key: Cell() for key in CELLS})
    fused: dict[int, Cell] = field(default_factory=lambda: {batch: Cell() for batch in FUSED_BATCHES})
    stages: dict[int, list[dict[str, dict[str, float]]]] = field(default_factory=lambda: {1: [], 8: []})

    def run(self, ensemble: Ensemble, fused: FusedGraph | None, images: Any, count: int) -> None:
        """One round: every cell once, `count` images each, the fused graph before and between."""
        for batch, in_flight in CELLS:
            if fused is not None and in_flight == 1:
                seconds = fused.measure(batch, count)
                self.fused[batch].add(batch * len(seconds), sum(seconds), seconds)
            before = ensemble.stages()
            requests = max(in_flight, count // batch)
            wall_s, latencies = ensemble.measure(images[:batch], in_flight, requests)
            self.ensemble[batch, in_flight].add(batch * requests, wall_s, latencies)
            if in_flight == 1:
                self.stages[batch].append(_stage_times(before, ensemble.stages()))


def _stage_times(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> dict[str, dict[str, float]]:
    """Milliseconds a request spent in each phase of each model between two readings."""
    times = {}
    for name, totals in after.items():
        change = {key: value - before[name][key] for key, value in totals.items()}
        if change["requests"]:
            times[name] = {
                f"{phase}_ms": change[f"{phase}_ns"] / change["requests"] / 1e6
                for phase in ("queue", "input", "compute", "output")
            }
    return times


def _median_stages(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        name: {phase: round(statistics.median(r[name][phase] for r in rounds), 3) for phase in rounds[0][name]}
        for name in rounds[0]
    }


def report(rounds: Rounds, product: str, image: tuple[int, ...], has_fused: bool) -> dict[str, Any]:
    """The JSON document. Ratios: ensemble to fused graph; above 1 is better for throughput, worse for latency."""
    ensemble = {f"batch{b}_in_flight{n}": cell.summary() for (b, n), cell in rounds.ensemble.items()}
    document: dict[str, Any] = {
        "machine": machine(),
        "product": product,
        "image": list(image),
        "rounds": len(rounds.ensemble[CELLS[0]].images_per_s),
        "ensemble": ensemble,
        "stages": {f"batch{batch}": _median_stages(kept) for batch, kept in rounds.stages.items()},
    }
    if has_fused:
        fused = {f"batch{batch}": cell.summary() for batch, cell in rounds.fused.items()}
        best_fused = max(cell["images_per_s"] for cell in fused.values())
        single = ensemble["batch1_in_flight1"]["latency_p50_ms"] / fused["batch1"]["latency_p50_ms"]
        batch8 = ensemble["batch8_in_flight1"]["images_per_s"] / fused["batch8"]["images_per_s"]
        document["fused"] = fused
        document["ratios"] = {
            "throughput_batch8": round(batch8, 3),
            "throughput_batch8_in_flight2": round(ensemble["batch8_in_flight2"]["images_per_s"] / best_fused, 3),
            "throughput_single_in_flight4": round(ensemble["batch1_in_flight4"]["images_per_s"] / best_fused, 3),
            "latency_single": round(single, 3),
        }
    return document


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": names[0] if names else platform.machine(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="logicrd bench serving", description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--product", help="ensemble to measure (default: the first one served)")
    parser.add_argument("--fused", type=Path, help="fused ONNX graph of the same product")
    parser.add_argument("--state-dir", type=Path, default=ROOT / ".stack", help="state folder of the running stack")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-triton/bin/python", help="has onnxruntime")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=32, help="images in each cell of a round")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args(argv)


def endpoints(state_dir: Path) -> dict[str, str]:
    """Where the servers of the running stack are; raises BenchmarkError when none runs."""
    try:
        addresses: dict[str, str] = json.loads((state_dir / "state.json").read_text())["endpoints"]
    except FileNotFoundError:
        raise BenchmarkError(f"no stack is running in '{state_dir}'; start one with `logicrd stack up`") from None
    return addresses


def _first_product(address: str) -> str:
    index = triton.InferenceServerClient(address).get_model_repository_index(client_timeout=REQUEST_TIMEOUT_S)
    names = sorted(model.name for model in index.models if "." not in model.name)
    if not names:
        raise BenchmarkError(f"the server at {address} serves no product")
    return str(names[0])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds and build the document."""
    address = endpoints(arguments.state_dir)["triton"]
    product = arguments.product or _first_product(address)
    ensemble = Ensemble(address, product)
    images = np.random.default_rng(0).integers(0, 255, (8, *ensemble.image_shape()), dtype=np.uint8)
    rounds = Rounds()
    ensemble.measure(images, 1, 2)
    if arguments.fused is None:
        for _ in range(arguments.rounds):
            rounds.run(ensemble, None, images, arguments.images)
        return report(rounds, product, images.shape[1:], has_fused=False)
    with FusedGraph(arguments.python, arguments.fused, len(os.sched_getaffinity(0))) as fused:
        for _ in range(arguments.rounds):
            rounds.run(ensemble, fused, images, arguments.images)
    return report(rounds, product, images.shape[1:], has_fused=True)


def _print_table(document: dict[str, Any]) -> None:
    print(f"{document['product']} on {document['machine']['cores']} cores, {document['machine']['cpu']}")
    for side in ("fused", "ensemble"):
        for name, cell in document.get(side, {}).items():
            print(
                f"  {side:<9}{name:<18}{cell['images_per_s']:8.2f} images/s  p50 {cell['latency_p50_ms']:8.2f} ms  "
                f"p99 {cell['latency_p99_ms']:8.2f} ms"
            )
    for name, ratio in document.get("ratios", {}).items():
        print(f"  ratio    {name:<28}{ratio:6.3f}")


def main(argv: list[str]) -> int:
    """0 and the figures; 4 and one line on standard error when something cannot be reached."""
    arguments = _arguments(argv)
    try:
        document = measure(arguments)
    except (BenchmarkError, InferenceServerException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    if arguments.json:
        print(json.dumps(document, indent=2))
    else:
        _print_table(document)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
