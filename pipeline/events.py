"""The wire form: what the line says becomes a CloudEvent on Kafka.

CloudEvents 1.0 (https://github.com/cloudevents/spec), Kafka binding in binary mode (attributes as `ce_` headers, the
data as the value) or structured mode (one JSON document). The data models are those of `wire`. Pure: no clock, no
client.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal
from uuid import NAMESPACE_URL, uuid5

from pydantic import BaseModel

from pipeline.types import (
    CameraState,
    Model,
    Part,
    PartVerdict,
    Scores,
    Stray,
    StrayReason,
    Threshold,
    ViewVerdict,
)
from pipeline.wire import (
    AuditData,
    HeartbeatData,
    MissingViewData,
    ModelData,
    RegionData,
    ScoresData,
    StatusData,
    ThresholdData,
    TimingData,
    VerdictData,
    ViewData,
)

_TYPE_PREFIX = "io.logicrd.inspection."
_NAMESPACE = uuid5(NAMESPACE_URL, "urn:logicrd:inspection")
_TYPES = {kind: f"{kind}.v1" for kind in ("verdict", "view", "status", "audit", "heartbeat")}
_TOPICS = _TYPES | {"heartbeat": "status.v1"}
_DEAD_LETTER = "dlq.v1"
_LONGEST_DEAD_LETTER = 64 * 1024
_LONGEST_HEADER, _MOST_HEADERS = 1024, 64

EventKind = Literal["verdict", "view", "status", "audit", "heartbeat"]


@dataclass(frozen=True, slots=True)
class Event:
    """One Kafka record. `topic` is without the site's prefix; `is_part` marks what the MES counts.

    `done` is called once the record can no longer be lost, on the outbox's or the client library's thread; it must not
    block.
    """

    topic: str
    key: bytes
    value: bytes
    headers: tuple[tuple[str, bytes], ...]
    is_part: bool = False
    done: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a line is, and who speaks."""

    site: str
    area: str
    line: str
    worker: str
    budget_ms: float
    pool: str | None = None
    host: str = ""

    @property
    def source(self) -> str:
        """CloudEvents source; with the id it is what consumers dedupe by."""
        return f"/{self.site}/{self.area}/{self.line}"


class Encoder:
    """Makes events of one line; `content_mode` as in the line file."""

    def __init__(self, place: Place, content_mode: Literal["binary", "structured"]) -> None:
        self._place = place
        self._content_mode = content_mode

    @property
    def place(self) -> Place:
        """Who speaks."""
        return self._place

    def part(self, part: PartVerdict, *, decided_at: datetime, trace: str | None = None) -> tuple[Event, ...]:
        """Encode a part's verdict: one event a view, then the part's; `trace` is its trace context, if it has one."""
        place, subject = self._place, part.part.part_id
        inspection = self._inspection(part.part)
        key = f"{place.line}/{part.part.station}".encode()
        value = _json(self._verdict(part, inspection))
        events = []
        for view in part.views:
            alone = len(part.views) == 1 and not part.missing  # then the view says what the part says
            seen = value if alone else _json(self._verdict(_only(part, view), inspection))
            name = f"{inspection}/{view.frame.camera_id}"
            events.append(self._event("view", name, subject, decided_at, key, seen, trace=trace))
        last = self._event("verdict", inspection, subject, decided_at, key, value, is_part=True, trace=trace)
        return *events, last

    def audit(self, stray: Stray, at: datetime) -> Event:
        """Encode a frame that counts for no verdict."""
        place, frame, part = self._place, stray.frame, stray.part
        data = AuditData(
            reason=stray.reason.value,
            late=stray.reason in {StrayReason.LATE_FRAME, StrayReason.LATE_RESULT},
            inspection_id=None if part is None else self._inspection(part),
            part_id=frame.part_id if part is None else part.part_id,
            part_id_source=frame.part_id_source if part is None else part.part_id_source,
            site=place.site,
            area=place.area,
            line=place.line,
            station=frame.station,
            product_id=frame.product,
            camera_id=frame.camera_id,
            frame_id=frame.number,
            captured_at=frame.captured_at,
            scores=None if stray.scores is None else _scores(stray.scores),
            worker=place.worker,
        )
        name = f"{place.worker}/{frame.camera_id}/{frame.number}/{stray.reason.value}"
        return self._event("audit", name, data.part_id, at, f"{place.line}/{frame.station}".encode(), _json(data))

    def dead_letter(
        self,
        place: str,
        key: bytes | None,
        value: bytes | None,
        headers: Iterable[tuple[str, bytes | None]],
        error: str,
    ) -> Event:
        """Wrap a record that cannot be used: as it came, with what was wrong and where it lay (`place`) as headers.

        What is longer than a record of Kafka should be is cut: the value at 64 KB, key and headers at 1 KB each.
        """
        told = {"logicrd_error": error, "logicrd_record": place, "logicrd_worker": self._place.worker}
        if value is not None and len(value) > _LONGEST_DEAD_LETTER:
            value, told["logicrd_cut_from"] = value[:_LONGEST_DEAD_LETTER], str(len(value))
        # A header may be null in Kafka and not in the library; what is huge is cut, lest the letter be refused too.
        kept = [(name[:128], (text or b"")[:_LONGEST_HEADER]) for name, text in headers][:_MOST_HEADERS]
        added = ((name, text.encode()[:_LONGEST_HEADER]) for name, text in told.items())
        return Event(_DEAD_LETTER, (key or b"")[:_LONGEST_HEADER], value or b"", (*kept, *added))

    def status(
        self, camera_id: str, state: CameraState, reason: str, at: datetime, *, epoch: int | None = None
    ) -> Event:
        """Encode a camera's change of state; keyed by camera, so that the last state can be kept."""
        place = self._place
        data = StatusData(
            camera_id=camera_id, state=state.value, reason=reason, worker=place.worker, epoch=epoch, pool=place.pool
        )
        name = f"{place.worker}/{camera_id}/{at.isoformat()}"
        return self._event("status", name, camera_id, at, camera_id.encode(), _json(data))

    def heartbeat(self, data: HeartbeatData, at: datetime) -> Event:
        """Encode a worker's word on itself; keyed by line and host, so that the last one can be kept."""
        key = f"worker/{data.line}/{data.host}"
        return self._event("heartbeat", f"{data.worker}/{at.isoformat()}", data.worker, at, key.encode(), _json(data))

    def _inspection(self, part: Part) -> str:
        return inspection_id(self._place.source, part.station, part.part_id, part.camera_id, part.meas_id)

    def _verdict(self, verdict: PartVerdict, inspection: str) -> VerdictData:
        place, part = self._place, verdict.part
        decisive = _decisive(verdict)
        return VerdictData(
            inspection_id=inspection,
            part_id=part.part_id,
            part_id_source=part.part_id_source,
            site=place.site,
            area=place.area,
            line=place.line,
            station=part.station,
            product_id=part.product,
            verdict=verdict.judgement.value,
            reason_codes=list(verdict.reasons),
            views=[_view(view, required=view.frame.camera_id not in verdict.optional) for view in verdict.views],
            missing_views=[
                MissingViewData(camera_id=view.camera_id, required=view.required, cause=view.cause.value)
                for view in verdict.missing
            ],
            meas_id=part.meas_id,
            triggered_at=part.opened_at if part.part_id_source == "trigger" else None,
            threshold=None if decisive is None else _threshold(decisive.verdict.threshold),
            model=None if decisive is None else _model(decisive.inference.model),
            timing=_timing(verdict, place.budget_ms),
            sequence=verdict.sequence,
            worker=place.worker,
            epoch=part.epoch,
            pool=place.pool,
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
        trace: str | None = None,
    ) -> Event:
        attributes = {
            "specversion": "1.0",
            "id": event_id,
            "source": self._place.source,
            "type": _TYPE_PREFIX + _TYPES[kind],
            "subject": subject,
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "partitionkey": key.decode(),
            **({} if trace is None else {"traceparent": trace}),
        }
        if self._content_mode == "binary":
            headers = [(f"ce_{name}", text.encode()) for name, text in attributes.items()]
            headers.append(("content-type", b"application/json"))
        else:
            head = json.dumps({**attributes, "datacontenttype": "application/json"})
            value = head[:-1].encode() + b', "data": ' + value + b"}"
            headers = [("content-type", b"application/cloudevents+json; charset=UTF-8")]
        if trace is not None:  # besides the attribute: what follows traces through Kafka looks for this name
            headers.append(("traceparent", trace.encode()))
        return Event(_TOPICS[kind], key, value, tuple(headers), is_part=is_part)


def inspection_id(
    source: str, station: str, part_id: str, camera_id: str | None = None, meas_id: str | None = None
) -> str:
    """Give a part's inspection the same id whenever it is computed: UUID 5 of where and what was inspected.

    `camera_id` for a part that is one frame of one camera; a part of several views has an id of its own.
    """
    if camera_id is not None:
        return str(uuid5(_NAMESPACE, f"{source}/{station}/{camera_id}/{part_id}"))
    return str(uuid5(_NAMESPACE, f"{source}/{json.dumps([station, part_id, meas_id])}"))


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


def packed(event: Event) -> bytes:
    """Put an event into bytes for the outbox, without `done`: a line of JSON, then the value. Headers are any bytes."""
    headers = [[name, value.decode("latin-1")] for name, value in event.headers]
    head = [event.topic, event.key.decode("latin-1"), event.is_part, headers]
    return json.dumps(head, separators=(",", ":")).encode() + b"\n" + event.value


def unpacked(data: bytes) -> Event:
    """Read what `packed` made. Raises ValueError."""
    head, _, value = data.partition(b"\n")
    try:
        topic, key, is_part, headers = json.loads(head)
        named = tuple((name, text.encode("latin-1")) for name, text in headers)
        return Event(topic, key.encode("latin-1"), value, named, is_part=is_part)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"no event: {error}") from None


def _json(data: BaseModel) -> bytes:
    return data.model_dump_json(by_alias=True).encode()


def _only(part: PartVerdict, view: ViewVerdict) -> PartVerdict:
    """Make what one view alone says of a part, in time since its own capture."""
    own = replace(part.part, product=view.frame.product, opened_s=view.frame.captured_s)
    verdict = view.verdict
    return replace(
        part,
        part=own,
        judgement=verdict.judgement,
        reasons=verdict.reasons,
        views=(view,),
        missing=(),
        decided_s=view.decided_s,
    )


def _decisive(part: PartVerdict) -> ViewVerdict | None:
    """Find the view whose limits and model stand for the part's."""
    same = (view for view in part.views if view.verdict.judgement is part.judgement)
    return next(same, part.views[0] if part.views else None)


def _view(view: ViewVerdict, *, required: bool) -> ViewData:
    frame, scores = view.frame, view.inference.scores
    return ViewData(
        camera_id=frame.camera_id,
        frame_id=frame.number,
        captured_at=frame.captured_at,
        scores=None if scores is None else _scores(scores),
        regions=[RegionData(bbox=list(region.bbox), peak=region.peak) for region in view.regions],
        image_ref=view.image_ref,
        required=required,
        product_id=frame.product,
        verdict=view.verdict.judgement.value,
        reason_codes=list(view.verdict.reasons),
        threshold=_threshold(view.verdict.threshold),
        model=_model(view.inference.model),
        trigger_count=frame.trigger_count,
    )


def _threshold(threshold: Threshold | None) -> ThresholdData | None:
    if threshold is None:
        return None
    return ThresholdData(
        ng=threshold.ng, review=threshold.review, version=threshold.version, source=threshold.source.value
    )


def _model(model: Model | None) -> ModelData | None:
    return None if model is None else ModelData(name=model.name, version=model.version, sha256=model.sha256)


def _scores(scores: Scores) -> ScoresData:
    """JSON has no NaN and no infinity: they become null, and the verdict's reason says why."""
    map_score, distance, fused = (
        value if math.isfinite(value) else None for value in (scores.map, scores.mahalanobis, scores.fused)
    )
    return ScoresData(map=map_score, mahalanobis=distance, fused=fused)


def _timing(part: PartVerdict, budget_ms: float) -> TimingData:
    """Tell the part's times; of several views those of the last one."""

    def since(moments: Iterable[float | None]) -> float | None:
        known = [moment for moment in moments if moment is not None]
        return round((max(known) - part.part.opened_s) * 1e3, 2) if known else None

    decided_ms = (part.decided_s - part.part.opened_s) * 1e3
    return TimingData(
        queued_ms=since(view.inference.sent_s for view in part.views),
        inferred_ms=since(view.inference.received_s for view in part.views),
        decided_ms=round(decided_ms, 2),
        budget_ms=budget_ms,
        late=decided_ms > budget_ms,
    )
