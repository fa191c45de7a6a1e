"""The contract on Kafka: the data of every event that the line sends, of the trigger and the camera that it takes.

Their JSON Schemas in `pipeline/schemas/` are generated from the models here, and a test holds them equal. Changes are
additive. Pure: no clock, no client. Called by `events`, `triggers` and the command line.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel

from pipeline.cameras import Camera, PoolMember
from pipeline.errors import first_fault

JudgementName = Literal["OK", "NG", "REVIEW", "UNINSPECTED"]


class _Data(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, use_attribute_docstrings=True
    )


class ScoresData(_Data):
    """Raw scores, higher is more anomalous; null where a score was not finite."""

    map: float | None
    mahalanobis: float | None
    fused: float | None


class RegionData(_Data):
    """A marked area: `bbox` is x, y, width, height as fractions of the picture."""

    bbox: Annotated[list[float], Field(min_length=4, max_length=4)]
    peak: float


class ThresholdData(_Data):
    """The limits that were applied."""

    ng: float
    review: float
    version: int
    source: Literal["redis", "cache", "file", "manifest"]


class ModelData(_Data):
    """The network that gave the scores."""

    name: str
    version: str
    sha256: str


class ViewData(_Data):
    """What one camera saw of the part, and what that alone says. `triggerCount` is the camera's own counter."""

    camera_id: str
    frame_id: int
    captured_at: datetime
    scores: ScoresData | None
    regions: list[RegionData]
    image_ref: str | None
    required: bool
    product_id: str
    verdict: JudgementName
    reason_codes: list[str]
    threshold: ThresholdData | None
    model: ModelData | None
    trigger_count: int | None


class MissingViewData(_Data):
    """A camera of the station that gave no picture of the part, and why."""

    camera_id: str
    required: bool
    cause: str


class TimingData(_Data):
    """Milliseconds from the trigger, or from capture; `inferredMs` is null when Triton gave no answer."""

    queued_ms: float | None
    inferred_ms: float | None
    decided_ms: float
    budget_ms: float
    late: bool


class VerdictData(_Data):
    """The data of `inspection.verdict.v1` (one a part) and of `inspection.view.v1` (one a frame, that view alone).

    `threshold` and `model` are those of the view that decided. `measId` and `triggeredAt` are the trigger message's.
    """

    schema_version: Literal["1.0"] = "1.0"
    inspection_id: str
    part_id: str
    part_id_source: str
    site: str
    area: str
    line: str
    station: str
    product_id: str
    verdict: JudgementName
    reason_codes: list[str]
    views: list[ViewData]
    missing_views: list[MissingViewData]
    meas_id: str | None
    triggered_at: datetime | None
    threshold: ThresholdData | None
    model: ModelData | None
    timing: TimingData
    sequence: int
    worker: str
    epoch: int | None = None
    """Fencing epoch: the generation of the camera pool's group when the part was opened; null for a worker without a
    pool. Of two workers that read one camera at the same time, the higher was in charge. Compare only verdicts of one
    `pool`, which counts for itself, and of about the same time: Kafka counts anew when it had no worker for long."""
    pool: str | None = None
    """The camera pool of the worker; null for a worker without one."""


class StatusData(_Data):
    """The data of `inspection.status.v1`: a camera changed its state."""

    schema_version: Literal["1.0"] = "1.0"
    camera_id: str
    state: Literal["connecting", "streaming", "lost", "ended", "failed"]
    reason: str
    worker: str
    epoch: int | None = None
    """As in a verdict; of a camera's last states in one `pool` that of the highest epoch holds."""
    pool: str | None = None
    """As in a verdict."""


class WorkerStageData(_Data):
    """A stage of a worker, and how long ago its loop last came round."""

    name: str
    age_s: float


class WorkerCameraData(_Data):
    """A camera that a worker reads; `state` and `reason` as in `StatusData`."""

    camera_id: str
    station: str
    state: Literal["connecting", "streaming", "lost", "ended", "failed"]
    reason: str


CANDIDATE_FIGURES = ("judged", "agreed", "disagreed", "failed", "dropped")
"""What a worker counts of a version on trial, in views: the figures of `WorkerCandidateData`."""


class WorkerCandidateData(_Data):
    """A version that is tried beside the one in force, on `percent` of the parts, and what this run of the worker
    counted of its views: a `canary` judges them, a `shadow` says what it would have said.

    `refused` says why this worker does not try it; then the version in force judges all parts.
    """

    version: str
    sha256: str
    mode: Literal["canary", "shadow"]
    percent: float
    refused: str
    judged: int
    agreed: int
    disagreed: int
    failed: int
    """Views for which it gave no usable scores; they were judged by the version in force."""
    dropped: int
    """Views that no shadow was asked for, because the servers had no room."""


class WorkerModelData(_Data):
    """A product that a worker judges: its network, and the limits in force (null: none yet).

    `refused` says why the version that was promoted since is not judged with; empty when there is none.
    """

    product_id: str
    version: str
    sha256: str
    threshold_version: int | None
    threshold_source: Literal["redis", "cache", "file", "manifest"] | None
    refused: str = ""
    candidate: WorkerCandidateData | None = None


class HeartbeatData(_Data):
    """A worker's word on itself: on `inspection.status.v1` beside the cameras' changes, told apart by its type.

    It comes every `intervalS` seconds, and once more as `stopping` when the worker ends on purpose. One that is several
    intervals old is that of a worker that is dead, hung or cut off. Its key is that of the line and the host, so that
    the last one is kept.
    """

    schema_version: Literal["1.0"] = "1.0"
    worker: str
    host: str
    line: str
    state: Literal["running", "stopping"]
    interval_s: float
    uptime_s: float
    stages: list[WorkerStageData]
    stalled: list[str]
    """Stages that no longer come round; any makes the worker not alive."""
    not_ready: list[str]
    """What the worker's readiness still waits for."""
    cameras: list[WorkerCameraData]
    parts_open: int
    """Parts that have no verdict yet."""
    parts_undelivered: int
    """Verdicts of this run that will not reach Kafka."""
    unacknowledged: int
    """Events that Kafka has not confirmed yet."""
    models: list[WorkerModelData]
    epoch: int | None = None
    """As in a verdict."""


class AuditData(_Data):
    """The data of `inspection.audit.v1`: a frame, or scores, that count for no verdict.

    `late` says that the part's verdict (`inspectionId`) had gone out; it stands.
    """

    schema_version: Literal["1.0"] = "1.0"
    reason: Literal["late_frame", "late_result", "duplicate_frame", "no_trigger"]
    late: bool
    inspection_id: str | None
    part_id: str
    part_id_source: str
    site: str
    area: str
    line: str
    station: str
    product_id: str
    camera_id: str
    frame_id: int
    captured_at: datetime
    scores: ScoresData | None
    worker: str


_Text = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]


class TriggerData(BaseModel):
    """What `inspection.trigger.v1` asks for, in the words of OPC 40100: a part is in front of a station's cameras.

    `partId` and `measId` together name one inspection; a repeated pair is ignored. `recipeId` is the product. `line` is
    needed where lines with equal station names share a broker. Keys that are not listed are ignored.
    """

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True, coerce_numbers_to_str=True
    )

    part_id: _Text
    station: _Text
    meas_id: Annotated[str, Field(max_length=128)] = ""
    recipe_id: _Text | None = None
    line: _Text | None = None
    cameras: Annotated[list[_Text], Field(min_length=1)] | None = None
    triggered_at: AwareDatetime | None = None


def decode_trigger(value: bytes | None, headers: dict[str, bytes | None]) -> TriggerData:
    """Read a trigger: a CloudEvent of either mode, or plain JSON. Raises ValueError that says what is wrong."""
    if value is None:
        raise ValueError("no value")
    try:
        document = json.loads(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("no JSON object")  # noqa: TRY004 (a wrong record, not a wrong call)
    if (headers.get("content-type") or b"").startswith(b"application/cloudevents") or "specversion" in document:
        document = document.get("data")
    try:
        return TriggerData.model_validate(document)
    except ValidationError as error:
        raise ValueError(first_fault(error, "data")) from None


def schemas() -> dict[str, dict[str, Any]]:
    """Give the JSON Schemas of the wire, by file name; that of what comes in says what is taken."""
    models: dict[str, type[BaseModel]] = {
        "verdict.v1.json": VerdictData,
        "status.v1.json": StatusData,
        "heartbeat.v1.json": HeartbeatData,
        "audit.v1.json": AuditData,
        "trigger.v1.json": TriggerData,
    }
    found = {
        name: model.model_json_schema(by_alias=True, mode="validation" if model is TriggerData else "serialization")
        for name, model in models.items()
    }
    found["cameras.v1.json"] = _camera_record()
    return {
        name: {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema} for name, schema in found.items()
    }


def _camera_record() -> dict[str, Any]:
    """Give the schema of a record of the camera pool: any camera's block, with its pool."""
    schema = TypeAdapter[Any](Camera).json_schema()
    for reference in schema["oneOf"]:
        kind = schema["$defs"][reference["$ref"].rpartition("/")[2]]
        kind["properties"] |= PoolMember.model_json_schema()["properties"]
    return schema
