"""Reads RTSP cameras to their end for `ingest.py`, by the line's own ingest or by plain OpenCV, with inference stubbed.

One process, so that its memory and processor time, children included, are the way of reading's alone. Prints one JSON
document: frames a camera, and what the steady middle of the run cost.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipeline.batcher import Batcher
from pipeline.cameras import RtspCamera
from pipeline.health import Health
from pipeline.ingest import CameraReader, Handover, to_model_size
from pipeline.metrics import Metrics
from pipeline.types import CameraState, Frame

MODEL_SIZE = (256, 256)


def tree() -> list[int]:
    """This process and all below it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [os.getpid()]
    for pid in found:
        found.extend(child for child, parent in parents.items() if parent == pid)
    return found


def cpu_s(pids: list[int]) -> float:
    """Processor time of these processes' living threads so far, in seconds."""
    threads = [path for pid in pids for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(path.read_text().split()[0]) for path in threads) / 1e9


def pss_mb(pids: list[int]) -> float:
    """Memory of these processes, shared pages divided among those that share them, in MB."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


class Ours:
    """The line's readers and queues; who would ask Triton takes the batches and throws them away."""

    def __init__(self, addresses: dict[str, str]) -> None:
        metrics = Metrics()
        self.frames: Counter[str] = Counter()
        self._batcher = Batcher(metrics, max_size=8, max_age_s=0.03)
        self._ended: set[str] = set()
        self._dropped: Counter[str] = Counter()
        handover = Handover(
            accept=self._accept,
            answer=lambda _: None,
            wait_for_room=self._batcher.wait_for_room,
            announce=self._announce,
            metrics=metrics,
            health=Health(),
            run="bench",
            budget_s=2.0,
        )
        self._readers = []
        for name, address in addresses.items():
            camera = RtspCamera(id=name, type="rtsp", product="bench", url=address)
            metrics.camera(name, product="bench", station=name)
            self._batcher.add_camera(name, product="bench", capacity=camera.queue_frames, overflow=camera.overflow)
            self._readers.append(CameraReader(camera, MODEL_SIZE, handover))
        threading.Thread(target=self._take, daemon=True).start()

    def start(self) -> None:
        for reader in self._readers:
            reader.start()

    @property
    def finished(self) -> bool:
        return len(self._ended) == len(self._readers)

    def close(self) -> None:
        for reader in self._readers:
            reader.stop()
        for reader in self._readers:
            reader.join(10.0)

    def _accept(self, frame: Frame) -> None:
        if frame.image is not None and self._batcher.put(frame) is None:
            self.frames[frame.camera_id] += 1

    def _take(self) -> None:
        while True:
            self._batcher.take(0.5)

    def _announce(self, camera_id: str, state: CameraState, reason: str) -> None:
        if state is CameraState.LOST and reason == "stream_ended":
            self._ended.add(camera_id)


class OpenCv:
    """A thread a camera around cv2.VideoCapture: read, to RGB, to model size."""

    def __init__(self, addresses: dict[str, str]) -> None:
        # TCP and a short probe, as the line's own: without it each camera takes seconds to open.
        options = "rtsp_transport;tcp|probesize;65536|analyzeduration;500000"
        os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = options  # noqa: TID251 (OpenCV has no other way)
        self.frames: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._read, args=item, daemon=True) for item in addresses.items()]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def finished(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        pass

    def _read(self, name: str, address: str) -> None:
        capture = cv2.VideoCapture(address, cv2.CAP_FFMPEG)
        while True:
            read, picture = capture.read()
            if not read:
                break
            rgb = np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)
            to_model_size(rgb, *MODEL_SIZE)
            self.frames[name] += 1
        capture.release()


def measure(how: str, addresses: dict[str, str], steady_s: float) -> dict[str, Any]:
    """Read until every camera has ended; figures are of `steady_s` seconds after each gave its first five frames."""
    before_mb = pss_mb(tree())
    reading = Ours(addresses) if how == "logicrd" else OpenCv(addresses)
    reading.start()
    while not reading.finished and (len(reading.frames) < len(addresses) or min(reading.frames.values()) < 5):
        time.sleep(0.05)
    pids = tree()
    cpu_before_s, frames_before = cpu_s(pids), reading.frames.total()
    time.sleep(steady_s)
    frames = reading.frames.total() - frames_before
    used_s, memory_mb = cpu_s(pids) - cpu_before_s, pss_mb(pids) - before_mb
    until = time.monotonic() + 300
    while not reading.finished and time.monotonic() < until:
        time.sleep(0.05)
    reading.close()
    return {
        "frames": dict(reading.frames),
        "cpu_ms_per_frame": round(used_s * 1e3 / frames, 3),
        "frames_per_s": round(frames / steady_s, 2),
        "memory_mb_per_camera": round(memory_mb / len(addresses), 2),
        "processes": len(pids),
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3]))), flush=True)
