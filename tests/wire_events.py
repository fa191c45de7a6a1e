"""One event of every kind that a line sends, with the name of its schema: for the tests of the wire."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np

from pipeline.events import Encoder, Event, Place
from pipeline.types import (
    CameraState,
    Cause,
    Frame,
    Inference,
    Judgement,
    MissingView,
    Model,
    Part,
    PartVerdict,
    Region,
    Scores,
    Stray,
    StrayReason,
    Threshold,
    ThresholdSource,
    Verdict,
    ViewVerdict,
)
from pipeline.wire import HeartbeatData, WorkerCameraData, WorkerCandidateData, WorkerModelData, WorkerStageData

PLACE = Place("site", "area", "l1", worker="host-20261123T120000", budget_ms=2000.0)
AT = datetime(2026, 11, 23, 12, 0, 1, 500_000, tzinfo=UTC)


def frame_of(part_id="Gehäuse-7", cause=None):
    image = None if cause else np.zeros((4, 4, 3), np.uint8)
    return Frame("c1", "s1", "tray", 3, part_id, "sei", AT, 10.0, 12.0, image, cause)


def part_of(view, **fields):
    frame, verdict = view.frame, view.verdict
    part = Part(frame.station, frame.part_id, frame.part_id_source, frame.product, AT, 10.0, 12.0, frame.camera_id)
    made = PartVerdict(part, 3, verdict.judgement, verdict.reasons, (view,), (), view.decided_s)
    return replace(made, **fields)


def judged(judgement, reasons, scores=None, source=ThresholdSource.REDIS):
    frame = frame_of()
    inference = Inference(frame, scores, None, Model("tray", "1", "ab" * 32), sent_s=10.02, received_s=10.14)
    threshold = Threshold(3.0, 2.0, 7, source, "ab" * 32)
    marks = (Region((0.1, 0.2, 0.3, 0.4), 5.0),)
    return part_of(ViewVerdict(frame, inference, Verdict(judgement, reasons, threshold), 10.15, marks, "c1/x.NG.jpg"))


def uninspected(cause):
    frame = frame_of(cause=cause)
    verdict = Verdict(Judgement.UNINSPECTED, (cause.value,))
    return part_of(ViewVerdict(frame, Inference(frame, cause=cause), verdict, 12.5))


def triggered(views=()):
    """Give a part of a trigger of which some views, at least one, are missing."""
    missing = tuple(MissingView(f"c{n}", required=n == 7, cause=cause) for n, cause in enumerate(Cause))
    part = Part("s1", "Gehäuse-7", "trigger", "tray", AT, 10.0, 12.0, meas_id="m-1", receipt=(0, 1))
    return PartVerdict(part, 3, Judgement.UNINSPECTED, ("deadline",), tuple(views), missing, 12.0, frozenset({"c1"}))


PARTS = {
    "ok": judged(Judgement.OK, (), Scores(0.5, 1.0, 9.0)),
    "ng": judged(Judgement.NG, ("score_above_ng", "anomaly_map"), Scores(3.5, 2.0, 11.0)),
    "review": judged(Judgement.REVIEW, ("score_above_review", "global_statistics"), Scores(2.5, 1.0, 19.0)),
    "nan": judged(Judgement.UNINSPECTED, ("score_not_finite",), Scores(float("nan"), float("inf"), 1.0)),
    **{f"limits from {source.value}": judged(Judgement.OK, (), Scores(0, 0, 0), source) for source in ThresholdSource},
    **{cause.value: uninspected(cause) for cause in Cause},
    "no view": triggered(),
    "some views": triggered(judged(Judgement.OK, (), Scores(0.5, 1.0, 9.0)).views),
}


CANDIDATES = [
    WorkerCandidateData(
        version="2",
        sha256="cd" * 32,
        mode=mode,
        percent=12.5,
        refused="",
        judged=1,
        agreed=2,
        disagreed=3,
        failed=4,
        dropped=5,
    )
    for mode in ("canary", "shadow")
]


def heartbeat(state="running", **fields):
    """Give what a worker says of itself; keywords replace fields."""
    said = {
        "worker": PLACE.worker,
        "host": "host",
        "line": "l1",
        "state": state,
        "interval_s": 10.0,
        "uptime_s": 99.5,
        "stages": [WorkerStageData(name="judge", age_s=0.03)],
        "stalled": [],
        "not_ready": ["triton"],
        "cameras": [WorkerCameraData(camera_id="c1", station="s1", state=state, reason="") for state in CameraState],
        "parts_open": 1,
        "parts_undelivered": 0,
        "unacknowledged": 7,
        "models": [
            WorkerModelData(
                product_id="tray",
                version="1",
                sha256="ab" * 32,
                threshold_version=7,
                threshold_source=source.value,
                refused="not served",
                candidate=candidate,
            )
            for source in ThresholdSource
            for candidate in (None, *CANDIDATES)
        ],
    }
    return HeartbeatData(**(said | fields))


def sent(mode, place=PLACE) -> Iterator[tuple[str, str, Event]]:
    """Give every kind of event that a line sends: what it is, the name of its schema, and the event."""
    encoder = Encoder(place, mode)
    for name, part in PARTS.items():
        for event in encoder.part(part, decided_at=AT):
            yield f"{event.topic} {name}", "verdict.v1.json", event
    for reason in StrayReason:
        for part in (None, PARTS["ok"].part):
            stray = Stray(frame_of(), reason, part, Scores(0.5, float("nan"), 9.0) if part else None)
            name = f"audit.v1 {reason.value}{'' if part else ' of no known part'}"
            yield name, "audit.v1.json", encoder.audit(stray, AT)
    for state in CameraState:
        yield f"status.v1 {state.value}", "status.v1.json", encoder.status("c1", state, "timeout", AT)
    for said in ("running", "stopping"):
        yield f"heartbeat {said}", "heartbeat.v1.json", encoder.heartbeat(heartbeat(said, epoch=3), AT)
