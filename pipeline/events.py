"""The wire form: what the line says becomes a CloudEvent on Kafka.

CloudEvents 1.0 (https://github.com/cloudevents/spec), Kafka binding in binary mode (attributes as `ce_` headers, the
data as the value) or structured mode (one JSON document). The data models here are the contract; their JSON Schemas in
`pipeline/schemas/` are generated from them and a test holds them equal. Pure: no clock, no client.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import NAMESPACE_URL, uuid5

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from pipeline.types import CameraState, PartVerdict, Scores

_TYPE_PREFIX = "io.logicrd.inspection."
_NAMESPACE = uuid5(NAMESPACE_URL, "urn:logicrd:inspection")
_TYPES = {"verdict": "verdict.v1", "view": "view.v1", "status": "status.v1"}

EventKind = Literal["verdict", "view", "status"]


@dataclass(frozen=True, slots=True)
class Event:
    """One Kafka record. `topic` is without the site's prefix; `is_part` marks what the MES counts."""

    topic: str
    key: bytes
    value: bytes
    headers: tuple[tuple[str, bytes], ...]
    is_part: bool = False


class _Data(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
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


class ViewData(_Data):
    """What one camera saw of the part."""

    camera_id: str
    frame_id: int
    captured_at: datetime
    scores: ScoresData | None
    regions: list[RegionData]
    image_ref: str | None


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


class TimingData(_Data):
    """Milliseconds from capture; `inferredMs` is null when Triton gave no answer."""

    queued_ms: float | None
    inferred_ms: float | None
    decided_ms: float
    budget_ms: float
    late: bool


class VerdictData(_Data):
    """The data of `inspection.verdict.v1` (one a part) and of `inspection.view.v1` (one a frame)."""

    schema_version: Literal["1.0"] = "1.0"
    inspection_id: str
    part_id: str
    part_id_source: str
    site: str
    area: str
    line: str
    station: str
    product_id: str
    verdict: Literal["OK", "NG", "REVIEW", "UNINSPECTED"]
    reason_codes: list[str]
    views: list[ViewData]
    threshold: ThresholdData | None
    model: ModelData | None
    timing: TimingData
    sequence: int
    worker: str
    epoch: int | None = None
    """Fencing epoch: the generation of the camera pool's group at capture; null for a worker without a pool. Of two
    workers that read one camera at the same time, the higher was in charge. Compare only verdicts of about the same
    time: Kafka counts anew when a pool has had no worker for long."""


class StatusData(_Data):
    """The data of `inspection.status.v1`: a camera changed its state."""

    schema_version: Literal["1.0"] = "1.0"
    camera_id: str
    state: Literal["connecting", "streaming", "lost", "ended", "failed"]
    reason: str
    worker: str
    epoch: int | None = None
    """As in a verdict; of a camera's last states that of the highest epoch holds."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a line is, and who speaks."""

    site: str
    area: str
    line: str
    worker: str
    budget_ms: float

    @property
    def source(self) -> str:
        """CloudEvents source; with the id it is what consumers dedupe by."""
        return f"/{self.site}/{self.area}/{self.line}"


class Encoder:
    """Makes events of one line; `content_mode` as in the line file."""

    def __init__(self, place: Place, content_mode: Literal["binary", "structured"]) -> None:
        self._place = place
        self._content_mode = content_mode

    def part(self, part: PartVerdict, *, decided_at: datetime) -> tuple[Event, Event]:
        """Encode a part's verdict: the view's event, then the part's."""
        place, frame = self._place, part.frame
        inspection = inspection_id(place.source, frame.station, frame.part_id, frame.camera_id)
        value = self._verdict(part, inspection).model_dump_json(by_alias=True).encode()
        key = f"{place.line}/{frame.station}".encode()
        view = self._event("view", f"{inspection}/{frame.camera_id}", frame.part_id, decided_at, key, value)
        return view, self._event("verdict", inspection, frame.part_id, decided_at, key, value, is_part=True)

    def status(
        self, camera_id: str, state: CameraState, reason: str, at: datetime, *, epoch: int | None = None
    ) -> Event:
        """Encode a camera's change of state; keyed by camera, so that the last state can be kept."""
        data = StatusData(camera_id=camera_id, state=state.value, reason=reason, worker=self._place.worker, epoch=epoch)
        name = f"{self._place.worker}/{camera_id}/{at.isoformat()}"
        value = data.model_dump_json(by_alias=True).encode()
        return self._event("status", name, camera_id, at, camera_id.encode(), value)

    def _verdict(self, part: PartVerdict, inspection: str) -> VerdictData:
        place, frame, inference = self._place, part.frame, part.inference
        threshold, model = part.verdict.threshold, inference.model
        return VerdictData(
            inspection_id=inspection,
            part_id=frame.part_id,
            part_id_source=frame.part_id_source,
            site=place.site,
            area=place.area,
            line=place.line,
            station=frame.station,
            product_id=frame.product,
            verdict=part.verdict.judgement.value,
            reason_codes=list(part.verdict.reasons),
            views=[_view(part)],
            threshold=None
            if threshold is None
            else ThresholdData(
                ng=threshold.ng, review=threshold.review, version=threshold.version, source=threshold.source.value
            ),
            model=None if model is None else ModelData(name=model.name, version=model.version, sha256=model.sha256),
            timing=_timing(part, place.budget_ms),
            sequence=part.sequence,
            worker=place.worker,
            epoch=frame.epoch,
        )

    def _event(
        self,
        kind: EventKind,
        event_id: str,
        subject: str,
        at: datetime,
        key: bytes,
        value: bytes,
        *,
        is_part: bool = False,
    ) -> Event:
        attributes = {
            "specversion": "1.0",
            "id": event_id,
            "source": self._place.source,
            "type": _TYPE_PREFIX + _TYPES[kind],
            "subject": subject,
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "partitionkey": key.decode(),
        }
        if self._content_mode == "binary":
            headers = [(f"ce_{name}", text.encode()) for name, text in attributes.items()]
            headers.append(("content-type", b"application/json"))
        else:
            head = json.dumps({**attributes, "datacontenttype": "application/json"})
            value = head[:-1].encode() + b', "data": ' + value + b"}"
            headers = [("content-type", b"application/cloudevents+json; charset=UTF-8")]
        return Event(_TYPES[kind], key, value, tuple(headers), is_part=is_part)


def inspection_id(source: str, station: str, part_id: str, camera_id: str) -> str:
    """Give a part's inspection the same id whenever it is computed: UUID 5 of where and what was inspected."""
    return str(uuid5(_NAMESPACE, f"{source}/{station}/{camera_id}/{part_id}"))


def decode(value: bytes, headers: dict[str, bytes | None]) -> dict[str, Any]:
    """Read an event of either mode as `{"attributes": {...}, "data": {...}}`. Raises ValueError for anything else."""
    try:
        document = json.loads(value)
    except RecursionError:
        raise ValueError("not a CloudEvent: nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("not a CloudEvent of ours: no JSON object")  # noqa: TRY004 (a wrong record, not a wrong call)
    if (headers.get("content-type") or b"").startswith(b"application/cloudevents"):
        attributes, data = document, document.pop("data", None)
    else:
        named = ((name.removeprefix("ce_"), text) for name, text in headers.items() if name.startswith("ce_"))
        attributes, data = {name: text.decode() for name, text in named if text is not None}, document
    if "id" not in attributes or not isinstance(data, dict):
        raise ValueError("not a CloudEvent of ours: no id, or no data object")
    return {"attributes": attributes, "data": data}


def schemas() -> dict[str, dict[str, Any]]:
    """Give the JSON Schemas of the wire, by file name."""
    models: dict[str, type[BaseModel]] = {"verdict.v1.json": VerdictData, "status.v1.json": StatusData}
    return {
        name: {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **model.model_json_schema(by_alias=True, mode="serialization"),
        }
        for name, model in models.items()
    }


def _view(part: PartVerdict) -> ViewData:
    frame, scores = part.frame, part.inference.scores
    return ViewData(
        camera_id=frame.camera_id,
        frame_id=frame.number,
        captured_at=frame.captured_at,
        scores=None if scores is None else _scores(scores),
        regions=[RegionData(bbox=list(region.bbox), peak=region.peak) for region in part.regions],
        image_ref=part.image_ref,
    )


def _scores(scores: Scores) -> ScoresData:
    """JSON has no NaN and no infinity: they become null, and the verdict's reason says why."""
    map_score, distance, fused = (
        value if math.isfinite(value) else None for value in (scores.map, scores.mahalanobis, scores.fused)
    )
    return ScoresData(map=map_score, mahalanobis=distance, fused=fused)


def _timing(part: PartVerdict, budget_ms: float) -> TimingData:
    start = part.frame.captured_s

    def since(at_s: float | None) -> float | None:
        return None if at_s is None else round((at_s - start) * 1e3, 2)

    decided = timedelta(seconds=part.decided_s - start) / timedelta(milliseconds=1)
    return TimingData(
        queued_ms=since(part.inference.sent_s),
        inferred_ms=since(part.inference.received_s),
        decided_ms=round(decided, 2),
        budget_ms=budget_ms,
        late=decided > budget_ms,
    )
