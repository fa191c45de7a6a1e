"""Measures the whole line: frames/s from camera to acknowledged verdict, against the limit of the same network alone.

Run by `logicrd bench line`, or by hand against a running stack. The cameras are H.264 video files read as fast as the
line takes them; the worker is the real command in a process of its own; what arrived is counted by a consumer of the
verdict topic, not by the worker. The limit is the network as one fused ONNX graph in ONNX Runtime at its best batch on
all cores, measured in turn with the line, round after round. It starts no server and judges nothing: it prints.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import yaml
from serving import BenchmarkError, FusedGraph, endpoints, machine

from pipeline.errors import LineError
from pipeline.events import Encoder, Place
from pipeline.parts import Parts
from pipeline.servers import Kafka
from pipeline.stations import Station, StationView
from pipeline.tail import VerdictReader
from pipeline.types import Frame, Inference, Judgement, Scores, Trigger, Verdict, ViewVerdict

ROOT = Path(__file__).parents[2]
SIZE = (640, 480)
VIDEO_FRAMES = 120
WARM_UP_S = 3.0
FUSED_BATCHES = (1, 2, 4, 8)


def write_video(path: Path, seed: int) -> None:
    """Encode moving shapes over grain, H.264 at 640 x 480: what a camera over a belt costs to decode."""
    rng = np.random.default_rng(seed)
    grain = rng.normal(0, 6, (SIZE[1], SIZE[0], 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(30), options={"crf": "20", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for number in range(VIDEO_FRAMES):
            picture = np.full((SIZE[1], SIZE[0], 3), 120.0) + np.roll(grain, number * 3, axis=1)
            for part in range(6):
                x, y = (60 + part * 95 + number * 4) % 560, 60 + part * 60
                picture[y : y + 40, x : x + 60] = rng.integers(0, 255, 3)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), "rgb24")))
        container.mux(stream.encode(None))


def line_file(folder: Path, addresses: dict[str, str], models: Path, products: list[str], cameras: int) -> Path:
    """Write the line under measure: cameras without pace, waiting for room, so that nothing is dropped."""
    document = {
        "line": f"bench-{os.getpid()}-{time.time_ns()}",
        "budget_ms": 30_000,
        "drain_timeout_s": 60,
        "cameras": [
            {
                "id": f"cam-{number}",
                "type": "video",
                "path": str(folder / f"{number}.mp4"),
                "loop": True,
                "product": products[number % len(products)],
                "station": f"station-{number}",
                "queue_frames": 8,
            }
            for number in range(cameras)
        ],
        "triton": {"address": addresses["triton"], "models_repo": str(models)},
        "kafka": {"bootstrap": [addresses["kafka"]]},
        "redis": {"url": addresses["redis"]},
    }
    path = folder / "line.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def run_line(path: Path, seconds: float, addresses: dict[str, str]) -> dict[str, Any]:
    """Run the worker once and count what reached Kafka. Latencies are the worker's, in milliseconds."""
    command = [sys.executable, "-m", "pipeline.cli", "run", "-c", str(path), "--seconds", str(seconds), "--json"]
    with VerdictReader(Kafka(bootstrap=[addresses["kafka"]]), start="now") as reader:
        worker = subprocess.run(
            [*command, "--log-level", "error"], stdout=subprocess.PIPE, text=True, timeout=seconds + 120, check=False
        )
        if worker.returncode != 0:
            raise BenchmarkError(f"the worker ended with exit code {worker.returncode}; its error is above")
        events = list(reader.read(idle_s=2.0))
    summary = json.loads(worker.stdout)
    ids = Counter(event["attributes"]["id"] for event in events)
    times = sorted(datetime.fromisoformat(event["attributes"]["time"]).timestamp() for event in events)
    steady = [at for at in times if at - times[0] >= WARM_UP_S and times[-1] - at >= 1.0]
    verdicts = Counter(event["data"]["verdict"] for event in events)
    return {
        "frames_per_s": round((len(steady) - 1) / (steady[-1] - steady[0]), 2),
        "p50_ms": summary["p50_ms"],
        "p99_ms": summary["p99_ms"],
        "parts": summary["triggered"],
        "uninspected": verdicts["UNINSPECTED"],
        "lost": summary["triggered"] - len(ids),
        "duplicated": sum(ids.values()) - len(ids),
    }


def fusion_ms(views: int = 4, parts: int = 2000) -> dict[str, float]:
    """Time what a part of several views costs beyond its inference: found, fused and encoded, per part, in ms.

    A trigger opens the part, each view's frame is matched to it and settled, and the events are made; the same part of
    one frame, as without stations, is the measure beside it.
    """
    cameras = [f"c{number}" for number in range(views)]
    station = Station(name="s", trigger="message", views=[StationView(camera=camera) for camera in cameras])
    alone = Parts({}, {}, budget_s=10.0, run="r")
    together = Parts({"s": station}, dict.fromkeys(cameras, "p"), budget_s=10.0, run="r")
    encoder = Encoder(Place("site", "area", "line", "worker", 10_000.0), "binary")
    at = datetime.now(UTC)
    times: dict[str, list[float]] = {"one_view": [], f"{views}_views": []}
    for number in range(parts):
        for name, held, shown in (("one_view", alone, cameras[:1]), (f"{views}_views", together, cameras)):
            began_s = time.thread_time()  # what it costs, not what others take
            if held is together:
                held.trigger(Trigger("s", f"part-{number}", "", "p", None, at, float(number), (0, number)))
            verdicts = []
            for camera in shown:
                frame = Frame(camera, "s", "p", number, "", "generated", at, number + 0.1, number + 10.0, None)
                for taken in held.arrive(frame, number + 0.1).frames:
                    inference = Inference(taken, Scores(0.5, 0.5, 0.5))
                    verdicts += held.settle(ViewVerdict(taken, inference, Verdict(Judgement.OK, ()), number + 0.2))
                held.expire(number + 0.2, ())
            for verdict in verdicts:
                encoder.part(verdict, decided_at=at)
            times[name].append((time.thread_time() - began_s) * 1e3)
    return {
        f"{name}_{what}": round(float(np.quantile(values, share)), 3)
        for name, values in times.items()
        for what, share in (("p50_ms", 0.5), ("p99_ms", 0.99))
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Alternate the limit and the line for some rounds; figures are medians over rounds."""
    addresses = endpoints(arguments.state_dir)
    products = arguments.product or sorted(path.parent.name for path in arguments.models.glob("*/manifest.json"))
    if not products:
        raise BenchmarkError(f"{arguments.models} holds no product; `logicrd-train export` writes one")
    document: dict[str, Any] = {"machine": machine(), "cameras": arguments.cameras, "products": products}
    rounds: list[dict[str, Any]] = []
    limits: dict[int, list[float]] = {batch: [] for batch in FUSED_BATCHES}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(arguments.cameras):
            write_video(Path(scratch) / f"{number}.mp4", number)
        for _ in range(arguments.rounds):
            if arguments.fused is not None:
                with FusedGraph(arguments.python, arguments.fused, document["machine"]["cores"]) as fused:
                    for batch in FUSED_BATCHES:
                        seconds = fused.measure(batch, arguments.images)
                        limits[batch].append(batch * len(seconds) / sum(seconds))
            path = line_file(Path(scratch), addresses, arguments.models, products, arguments.cameras)
            rounds.append(run_line(path, arguments.seconds, addresses))
    document["line"] = {
        key: (sum if key in {"parts", "uninspected", "lost", "duplicated"} else statistics.median)(
            each[key] for each in rounds
        )
        for key in rounds[0]
    }
    document["rounds"] = rounds
    document["part_fusion"] = fusion_ms()
    if arguments.fused is not None:
        by_batch = {batch: statistics.median(rates) for batch, rates in limits.items()}
        best = max(by_batch, key=lambda batch: by_batch[batch])
        document["limit"] = {
            "images_per_s": round(by_batch[best], 2),
            "best_batch": best,
            "by_batch": {f"batch{batch}": round(rate, 2) for batch, rate in by_batch.items()},
        }
        document["ratio"] = round(document["line"]["frames_per_s"] / by_batch[best], 3)
    return document


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="logicrd bench line", description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--product", action="append", help="products of the cameras, in turn (default: all)")
    parser.add_argument("--cameras", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of one run of the line")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=48, help="images in each measure of the fused graph")
    parser.add_argument("--fused", type=Path, help="fused ONNX graph of one of the products, for the ratio")
    parser.add_argument("--models", type=Path, default=ROOT / "models_repo", help="model repository of the stack")
    parser.add_argument("--state-dir", type=Path, default=ROOT / ".stack", help="state folder of the running stack")
    parser.add_argument(
        "--python", type=Path, default=ROOT / ".venv-triton/bin/python", help="a Python with onnxruntime"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """0 and the figures; 4 and one line on standard error when something cannot be reached."""
    arguments = _arguments(argv)
    try:
        document = measure(arguments)
    except (BenchmarkError, LineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    if arguments.json:
        print(json.dumps(document, indent=2))
        return 0
    line, limit = document["line"], document.get("limit")
    print("  fusion   " + "  ".join(f"{key} {value}" for key, value in document["part_fusion"].items()))
    print(f"{document['cameras']} cameras on {document['machine']['cores']} cores, {document['machine']['cpu']}")
    print("  line     " + "  ".join(f"{key} {value}" for key, value in line.items()))
    if limit is not None:
        print(f"  limit    images_per_s {limit['images_per_s']} at batch {limit['best_batch']}")
        print(f"  ratio    {document['ratio']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
