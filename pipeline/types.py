"""What passes between the stages: frozen values, no behaviour that touches the world.

Every stage may import this module; it imports none of them. Times: `*_at` is UTC wall clock for people and events,
`*_s` is `time.monotonic()` for durations, so that a clock jump never makes a part late.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
"""HWC uint8, RGB, 0..255."""

AnomalyMap = npt.NDArray[np.float32]
"""(h, w) float32, smoothed in the graph, unbounded; higher is more anomalous."""


class Judgement(StrEnum):
    """The four things a verdict can say. What cannot be judged is UNINSPECTED, never OK."""

    OK = "OK"
    NG = "NG"
    REVIEW = "REVIEW"
    UNINSPECTED = "UNINSPECTED"


class Cause(StrEnum):
    """Why a part could not be judged."""

    CAMERA_LOST = "camera_lost"
    FRAME_CORRUPT = "frame_corrupt"
    TRITON_UNAVAILABLE = "triton_unavailable"
    DEADLINE = "deadline"
    THRESHOLD_MISSING = "threshold_missing"
    MODEL_MISMATCH = "model_mismatch"
    SCORE_NOT_FINITE = "score_not_finite"
    QUEUE_FULL = "queue_full"


class CameraState(StrEnum):
    """What a camera's reader is doing."""

    CONNECTING = "connecting"
    STREAMING = "streaming"
    LOST = "lost"
    ENDED = "ended"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture as a source hands it over, at the camera's own size."""

    image: Image
    captured_at: datetime
    captured_s: float
    part_id: str | None = None
    part_id_source: str | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """One view of one part on its way through the line.

    `image` is at model size; it is None exactly when `cause` says why the picture cannot be judged.
    `number` counts the frames of this camera since the worker started, from 1. `epoch` is the generation of the
    camera pool's group at capture, None for a worker without a pool.
    """

    camera_id: str
    station: str
    product: str
    number: int
    part_id: str
    part_id_source: str
    captured_at: datetime
    captured_s: float
    deadline_s: float
    image: Image | None
    cause: Cause | None = None
    epoch: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Frames of one product that go to Triton in one request."""

    product: str
    frames: tuple[Frame, ...]


@dataclass(frozen=True, slots=True)
class Scores:
    """Raw scores of one frame; higher is more anomalous. `fused` is what thresholds are compared with."""

    fused: float
    map: float
    mahalanobis: float


@dataclass(frozen=True, slots=True)
class Model:
    """Which network gave a score."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Inference:
    """What Triton said of one frame, or why it said nothing (`cause`)."""

    frame: Frame
    scores: Scores | None = None
    anomaly_map: AnomalyMap | None = None
    model: Model | None = None
    cause: Cause | None = None
    sent_s: float | None = None
    received_s: float | None = None


class ThresholdSource(StrEnum):
    """Where the limits in force came from."""

    REDIS = "redis"
    CACHE = "cache"
    FILE = "file"
    MANIFEST = "manifest"


@dataclass(frozen=True, slots=True)
class Threshold:
    """Limits on the fused score: `score >= ng` is NG, `review <= score < ng` is REVIEW. `review <= ng`, both finite."""

    ng: float
    review: float
    version: int
    source: ThresholdSource
    model_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Region:
    """A connected area of the anomaly map above the heat map's limit.

    `bbox` is (x, y, width, height) as fractions of the camera's picture, 0..1; `peak` is the map's maximum inside.
    """

    bbox: tuple[float, float, float, float]
    peak: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the line says of one frame."""

    judgement: Judgement
    reasons: tuple[str, ...]
    threshold: Threshold | None = None


@dataclass(frozen=True, slots=True)
class PartVerdict:
    """What the line says of one part: the verdict with all that its events need."""

    frame: Frame
    inference: Inference
    verdict: Verdict
    sequence: int
    decided_s: float
    regions: tuple[Region, ...] = ()
    image_ref: str | None = None
