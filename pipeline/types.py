"""What passes between the stages: frozen values, no behaviour that touches the world.

Every stage may import this module; it imports none of them. Times: `*_at` is UTC wall clock for people and events,
`*_s` is `time.monotonic()` for durations, so that a clock jump never makes a part late.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum, StrEnum
from typing import Final

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
    TRIGGER_MISSED = "trigger_missed"
    PRODUCT_NOT_READY = "product_not_ready"
    OUTBOX_UNAVAILABLE = "outbox_unavailable"


class StrayReason(StrEnum):
    """Why a frame, or its scores, count for no verdict."""

    LATE_FRAME = "late_frame"
    LATE_RESULT = "late_result"
    DUPLICATE_FRAME = "duplicate_frame"
    NO_TRIGGER = "no_trigger"


class CameraState(StrEnum):
    """What a camera's reader is doing."""

    CONNECTING = "connecting"
    STREAMING = "streaming"
    LOST = "lost"
    ENDED = "ended"
    FAILED = "failed"


class Idle(Enum):
    """What a source's `read` gives when nothing came for a moment and the camera is well."""

    IDLE = "idle"


IDLE: Final = Idle.IDLE


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture as a source hands it over, at the camera's own size; `image` may be the source's own memory, which
    holds until its next `read`.

    `trigger_count` is the camera's own count of its frames: it grows by one a frame and starts anew with each opening,
    so that within one a gap is frames that never came. `device_timestamp_ns` is the camera's clock.
    """

    image: Image
    captured_at: datetime
    captured_s: float
    part_id: str | None = None
    part_id_source: str | None = None
    trigger_count: int | None = None
    device_timestamp_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """A picture that came into a graph which keeps it and asks Triton itself: its `Scored` comes later, or never.

    `number` is the graph's own of this camera's frames, for one opening of the source. `size` is (width, height) of the
    camera's picture in pixels.
    """

    number: int
    size: tuple[int, int]
    captured_at: datetime
    captured_s: float


@dataclass(frozen=True, slots=True)
class Scored:
    """What a graph says of the frame that it named by this number, or why it has nothing to say (`cause`)."""

    number: int
    received_s: float
    scores: Scores | None = None
    anomaly_map: AnomalyMap | None = None
    model: Model | None = None
    cause: Cause | None = None


@dataclass(frozen=True, slots=True)
class Trigger:
    """A message that a part is in front of the cameras: who it is and what it has to be.

    `product` and `cameras` are None where the station's own hold. `triggered_s` is on this worker's monotonic clock;
    `stale` marks one that was sent while no worker listened. `receipt` is the record's partition and offset.
    """

    station: str
    part_id: str
    meas_id: str
    product: str | None
    cameras: tuple[str, ...] | None
    triggered_at: datetime
    triggered_s: float
    receipt: tuple[int, int]
    stale: bool = False
    epoch: int | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Which part, as its verdict names it.

    `opened_*` is its trigger, or its first frame. `camera_id` belongs to the identity of a part that is one frame of
    one camera, and is None for a part of several views. `meas_id` and `receipt` are those of its trigger,
    `epoch` is as in its first frame.
    """

    station: str
    part_id: str
    part_id_source: str
    product: str
    opened_at: datetime
    opened_s: float
    deadline_s: float
    camera_id: str | None = None
    meas_id: str | None = None
    receipt: tuple[int, int] | None = None
    epoch: int | None = None


@dataclass(frozen=True, slots=True)
class View:
    """Which part of the camera's picture a frame shows: all sizes in pixels of that picture.

    `picture` is (width, height), `crop` is (x, y, width, height), `rotate` degrees clockwise; see `region`.
    """

    picture: tuple[int, int]
    crop: tuple[int, int, int, int]
    rotate: float


@dataclass(frozen=True, slots=True)
class Frame:
    """One view of one part on its way through the line.

    `image` is at model size; it is None when `cause` says why the picture cannot be judged, or when a graph keeps it.
    `number` counts the frames of this camera since the worker started, from 1. `view` is None where the frame shows the
    camera's whole picture. `epoch` is the generation of the camera pool's group at capture, None for a worker without a
    pool. `ready_s` is when its reader had decoded it, `request` the trace context of its request to Triton (W3C
    `traceparent`), None where its part is not traced.
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
    trigger_count: int | None = None
    meas_id: str | None = None
    view: View | None = None
    epoch: int | None = None
    ready_s: float | None = None
    request: str | None = None


@dataclass(frozen=True, slots=True)
class Stray:
    """A frame that counts for no verdict, or scores that came after it; `part` is whose it was, where that is known."""

    frame: Frame
    reason: StrayReason
    part: Part | None = None
    scores: Scores | None = None


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
    """What Triton said of one frame, or why it said nothing (`cause`).

    `request` is the trace context that its batch was sent with: that of the first traced frame in it.
    """

    frame: Frame
    scores: Scores | None = None
    anomaly_map: AnomalyMap | None = None
    model: Model | None = None
    cause: Cause | None = None
    sent_s: float | None = None
    received_s: float | None = None
    request: str | None = None


class ThresholdSource(StrEnum):
    """Where the limits in force came from."""

    REDIS = "redis"
    CACHE = "cache"
    FILE = "file"
    MANIFEST = "manifest"


@dataclass(frozen=True, slots=True)
class Threshold:
    """Limits on the fused score: `score >= ng` is NG, `review <= score < ng` is REVIEW. `review <= ng`, both finite.

    `set_at` is when somebody set them; None where that is not known.
    """

    ng: float
    review: float
    version: int
    source: ThresholdSource
    model_sha256: str = ""
    set_at: datetime | None = None


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
class ViewVerdict:
    """What the line says of one view, with all that its event needs."""

    frame: Frame
    inference: Inference
    verdict: Verdict
    decided_s: float
    regions: tuple[Region, ...] = ()
    image_ref: str | None = None


@dataclass(frozen=True, slots=True)
class MissingView:
    """A camera whose picture of the part did not come, and why."""

    camera_id: str
    required: bool
    cause: Cause


@dataclass(frozen=True, slots=True)
class PartVerdict:
    """What the line says of one part. `optional` names the views without which it can be OK."""

    part: Part
    sequence: int
    judgement: Judgement
    reasons: tuple[str, ...]
    views: tuple[ViewVerdict, ...]
    missing: tuple[MissingView, ...]
    decided_s: float
    optional: frozenset[str] = frozenset()


Attributes = dict[str, str | int | list[str]]
"""What is told of a span, by OpenTelemetry's dotted names."""


@dataclass(frozen=True, slots=True)
class Span:
    """A step of a part's trace. Ids are OpenTelemetry's, of 128 and 64 bits; a root has no `parent_id`.

    Times are on the monotonic clock. `link` is the `traceparent` of a span that this one has to do with.
    """

    name: str
    trace_id: int
    span_id: int
    parent_id: int | None
    began_s: float
    ended_s: float
    attributes: Attributes
    is_call: bool = False
    is_error: bool = False
    link: str | None = None
