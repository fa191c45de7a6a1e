"""Measures the reading of many RTSP cameras, inference stubbed: frames dropped, processor time and memory a camera.

Run by `logicrd bench ingest`, or by hand; it needs no server but the simulated cameras it starts. The line's own ingest
and plain `cv2.VideoCapture` read the same streams in turn, round after round, each in a process of its own; both bring
every frame to RGB at model size. Dropped are the frames that the cameras sent and that did not come out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from serving import BenchmarkError, machine

ROOT = Path(__file__).parents[2]
SIMULATE = ROOT / "deploy/local/simulate.py"
WORKER = Path(__file__).with_name("ingest_worker.py")
WAYS = ("logicrd", "opencv")
PICTURES = 10
# What a run needs beside its steady part: every camera's first frames before, which OpenCV opens one by one.
MARGIN_S = 12.0
MARGIN_S_PER_CAMERA = 1.5


def write_pictures(folder: Path, width: int, height: int) -> Path:
    """Write moving shapes over grain and their playlist: what a camera over a belt costs to decode."""
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 6, (height, width, 3))
    entries = []
    for number in range(PICTURES):
        picture = np.full((height, width, 3), 120.0) + np.roll(grain, number * 3, axis=1)
        for part in range(6):
            x, y = (60 + part * 95 + number * 40) % (width - 60), part * height // 8
            picture[y : y + height // 12, x : x + 60] = rng.integers(0, 255, 3)
        cv2.imwrite(str(folder / f"{number}.png"), picture.clip(0, 255).astype(np.uint8))
        entries.append({"path": f"{number}.png", "part_id": f"part-{number}"})
    playlist = folder / "playlist.json"
    playlist.write_text(json.dumps(entries))
    return playlist


def run(way: str, playlist: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Read all cameras once. Raises BenchmarkError when the cameras or the reader fail."""
    report = playlist.with_name("report.json")
    report.unlink(missing_ok=True)
    command = [sys.executable, str(SIMULATE), "--loop", "--report", str(report)]
    command += ["--rate", str(arguments.rate), "--size", f"{arguments.size[0]}x{arguments.size[1]}"]
    command += ["--seconds", str(arguments.seconds + MARGIN_S + arguments.cameras * MARGIN_S_PER_CAMERA)]
    for number in range(arguments.cameras):
        command += ["--camera", f"cam-{number}={playlist}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as cameras:
        assert cameras.stdout is not None
        try:
            first = cameras.stdout.readline()
            if not first:
                raise BenchmarkError("the simulated cameras did not start; their error is above")
            addresses = json.dumps(json.loads(first)["cameras"])
            reader = subprocess.run(
                [sys.executable, str(WORKER), way, addresses, str(arguments.seconds)],
                stdout=subprocess.PIPE,
                text=True,
                timeout=arguments.seconds + 360,
                check=False,
            )
            if reader.returncode != 0:
                raise BenchmarkError(f"reading by {way} failed; its error is above")
            cameras.wait(timeout=30)
        finally:
            cameras.terminate()
    figures: dict[str, Any] = json.loads(reader.stdout.splitlines()[-1])  # OpenCV chatters there
    frames = figures.pop("frames")
    sent = {name: len(camera["sent"]) for name, camera in json.loads(report.read_text())["cameras"].items()}
    figures["sent"] = sum(sent.values())
    figures["dropped"] = sum(abs(count - frames.get(name, 0)) for name, count in sent.items())
    return figures


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Take the ways in turn for some rounds; costs are medians over rounds, counts are sums."""
    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        playlist = write_pictures(Path(scratch), *arguments.size)
        for _ in range(arguments.rounds):
            for way in WAYS:
                rounds[way].append(run(way, playlist, arguments))
    document: dict[str, Any] = {
        "machine": machine(),
        "cameras": arguments.cameras,
        "size": list(arguments.size),
        "rate": arguments.rate,
    }
    for way, figures in rounds.items():
        document[way] = {
            key: (sum if key in {"sent", "dropped"} else statistics.median)(each[key] for each in figures)
            for key in figures[0]
        }
    ours, theirs = (document[way]["cpu_ms_per_frame"] for way in WAYS)
    document["cpu_ratio"] = round(ours / theirs, 3) if theirs else math.nan
    document["rounds"] = rounds
    return document


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="logicrd bench ingest", description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--cameras", type=int, default=16)
    parser.add_argument("--rate", type=float, default=5.0, help="frames a second of each camera")
    parser.add_argument("--size", type=_size, default=(640, 480), help="WIDTHxHEIGHT (default: 640x480)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the steady part of a run")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """0 and the figures; 4 and one line on standard error when something did not start."""
    arguments = _arguments(argv)
    try:
        document = measure(arguments)
    except (BenchmarkError, subprocess.TimeoutExpired, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    if arguments.json:
        print(json.dumps(document, indent=2))
        return 0
    print(f"{document['cameras']} cameras on {document['machine']['cores']} cores, {document['machine']['cpu']}")
    for way in WAYS:
        print(f"  {way:8} " + "  ".join(f"{key} {value}" for key, value in document[way].items()))
    print(f"  processor time a frame, logicrd ÷ opencv: {document['cpu_ratio']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
