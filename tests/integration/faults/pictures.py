"""Pictures whose score is known: plain grey, and the model's score is how bright they are."""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np

LIMIT = 120.0
"""Brightness from which on a part is NG."""
VIDEO_LEVELS = (20.0, 220.0)
"""What a camera of a triggered station shows in turn: a good part, a bad one."""
_VIDEO_FRAMES = 600
_SIZE = (64, 48)


def level_of(number: int) -> float:
    """How bright the picture of a free-running camera's part is: its own among a hundred, good and bad in turn."""
    return float(number % 100 + (130 if number % 2 else 0))


def write_video(path: Path) -> None:
    """Write the film of a triggered station's camera, without loss."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height = _SIZE
        stream.pix_fmt = "bgr0"
        for index in range(_VIDEO_FRAMES):
            frame = av.VideoFrame.from_ndarray(_grey(VIDEO_LEVELS[index % len(VIDEO_LEVELS)]), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_pictures(folder: Path) -> list[Path]:
    """Write the hundred pictures of a free-running camera; number n has the one at n modulo their number."""
    paths = [folder / f"level-{number:03}.png" for number in range(100)]
    for number, path in enumerate(paths):
        cv2.imwrite(str(path), _grey(level_of(number)))
    return paths


def _grey(level: float) -> np.ndarray:
    return np.full((_SIZE[1], _SIZE[0], 3), level, np.uint8)
