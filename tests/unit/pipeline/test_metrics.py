"""Every number the line counts: the same in Prometheus, the table and the summary."""

from dataclasses import replace

import pytest
from prometheus_client import generate_latest

from pipeline.metrics import Metrics
from pipeline.types import CameraState, Judgement, StrayReason


@pytest.fixture
def metrics():
    metrics = Metrics()
    for camera in ("c1", "c2"):
        metrics.camera(camera, product="tray", station="s1")
    return metrics


def test_parts_are_conserved(metrics, make_part):
    """Parts triggered = OK + NG + REVIEW + UNINSPECTED, in the snapshot and at the station in Prometheus."""
    metrics.triggered("s1", 4)
    for judgement in Judgement:
        reasons = ("deadline",) if judgement is Judgement.UNINSPECTED else ()
        metrics.verdict(make_part(judgement=judgement, reasons=reasons))
    snapshot = metrics.snapshot()
    (station,) = snapshot.stations
    assert snapshot.triggered == snapshot.judged == station.triggered == sum(station.judgements.values()) == 4
    assert station.causes == {"deadline": 1}
    assert metrics.registry.get_sample_value("inspection_parts_triggered_total", {"station": "s1"}) == 4
    samples = [s for m in metrics.registry.collect() for s in m.samples if s.name == "inspection_parts_total"]
    assert {s.labels["verdict"]: s.value for s in samples} == {judgement.value: 1.0 for judgement in Judgement}


def test_a_part_without_a_verdict_can_be_alarmed_on(metrics, make_part):
    """Per station, triggered = verdicts + open at rest; a part that is neither open nor judged makes the difference."""
    value = metrics.registry.get_sample_value

    def unaccounted(station):
        triggered = value("inspection_parts_triggered_total", {"station": station})
        found = [sample for metric in metrics.registry.collect() for sample in metric.samples]
        given = sum(s.value for s in found if s.name == "inspection_parts_total" and s.labels["station"] == station)
        return triggered - given - value("inspection_parts_open", {"station": station})

    metrics.triggered("s1", 3)
    metrics.triggered("s2", 1)
    metrics.parts_open({"s1": 3, "s2": 1})
    assert (unaccounted("s1"), unaccounted("s2")) == (0, 0)
    metrics.verdict(make_part())
    metrics.parts_open({"s1": 1, "s2": 1})  # one of three judged, one open: the third is lost
    assert (unaccounted("s1"), unaccounted("s2")) == (1, 0)
    assert [station.open for station in metrics.snapshot().stations] == [1, 1]


def test_an_event_that_did_not_arrive_is_counted_as_what_it_was(metrics):
    """Only part verdicts count as acknowledged or lost parts; every event counts in Prometheus."""
    metrics.acknowledged(is_part=True)
    metrics.acknowledged(is_part=False)
    metrics.undelivered(3, parts=2)
    snapshot = metrics.snapshot()
    assert (snapshot.acknowledged, snapshot.undelivered) == (1, 2)
    value = metrics.registry.get_sample_value
    assert value("inspection_events_total", {"fate": "acknowledged"}) == 2
    assert value("inspection_events_total", {"fate": "undelivered"}) == 3


def test_quantiles_are_of_what_was_seen(metrics, make_part):
    """Latencies are in milliseconds, of parts from their opening and of views from capture; None before the first."""
    assert metrics.snapshot().p99_ms is None
    for value in range(1, 101):
        metrics.view("c1", Judgement.OK, None, value / 1000)
        part = make_part()
        metrics.verdict(replace(part, decided_s=part.part.opened_s + value / 500))
    snapshot = metrics.snapshot()
    assert (snapshot.p50_ms, snapshot.p99_ms) == pytest.approx((101.0, 198.0), abs=0.1)
    assert snapshot.cameras[0].p50_ms == pytest.approx(50.5, abs=0.1)
    assert snapshot.cameras[0].p99_ms == pytest.approx(99.0, abs=0.1)
    assert snapshot.cameras[1].p50_ms is None


def test_a_camera_is_up_while_it_streams(metrics):
    """A camera shows before its first frame, and its state and reason follow it."""
    metrics.camera_state("c1", CameraState.STREAMING)
    assert metrics.registry.get_sample_value("inspection_camera_up", {"camera": "c1"}) == 1
    metrics.camera_state("c1", CameraState.LOST, "timeout")
    assert metrics.registry.get_sample_value("inspection_camera_up", {"camera": "c1"}) == 0
    assert metrics.registry.get_sample_value("inspection_camera_up", {"camera": "c2"}) == 0
    camera = metrics.snapshot().cameras[0]
    assert (camera.state, camera.reason) == (CameraState.LOST, "timeout")


def test_a_camera_that_is_gone_stays_in_the_sums(metrics, make_part):
    """It is shown no longer, its last parts are still counted, and it goes on counting when it comes again."""
    metrics.camera_state("c1", CameraState.STREAMING)
    for _ in range(2):
        metrics.frame("c1")
    metrics.retire("c1")
    metrics.queued("c1", 0)
    metrics.camera_state("c1", CameraState.LOST, "timeout")
    metrics.triggered("s1", 2)
    metrics.view("c1", Judgement.OK, None, 0.1)
    metrics.verdict(make_part())
    snapshot = metrics.snapshot()
    assert [camera.camera_id for camera in snapshot.cameras] == ["c2"]
    assert (snapshot.triggered, snapshot.judged) == (2, 1)
    value = metrics.registry.get_sample_value
    assert value("inspection_camera_up", {"camera": "c1"}) is None
    assert value("inspection_queue_frames", {"camera": "c1"}) is None
    metrics.camera("c1", product="other", station="s2")
    metrics.frame("c1")
    again = metrics.snapshot().cameras[0]
    assert (again.camera_id, again.product, again.state, again.frames) == ("c1", "other", CameraState.CONNECTING, 3)


def test_refusals_are_counted_by_reason(metrics):
    """The gauge follows what is refused now; a reason that is gone is gone."""
    metrics.refused({"capacity": 2, "invalid": 1})
    metrics.refused({"capacity": 1})
    value = metrics.registry.get_sample_value
    assert value("inspection_cameras_refused", {"reason": "capacity"}) == 1
    assert value("inspection_cameras_refused", {"reason": "invalid"}) is None


def test_no_part_becomes_a_label(metrics, make_part):
    """Labels are cameras, stations, stages, verdicts, causes and fates: their number does not grow with parts."""
    metrics.view("c1", Judgement.NG, None, 0.1)
    metrics.verdict(make_part())
    metrics.stray("s1", StrayReason.LATE_FRAME)
    metrics.trigger("duplicate")
    metrics.counter_reset("c1")
    metrics.stage("ingest", 0.01)
    names = {name for m in metrics.registry.collect() for s in m.samples for name in s.labels}
    assert names <= {"camera", "station", "stage", "verdict", "cause", "fate", "le"}
    assert b"inspection_verdict_latency_seconds" in generate_latest(metrics.registry)


def test_what_the_outbox_keeps_is_not_lost():
    """Lost is what was due, in this run or left by an earlier one, and neither confirmed nor kept."""
    metrics = Metrics()
    metrics.outbox_found(2)
    metrics.triggered("s1", 3)
    for _ in range(3):
        metrics.acknowledged(is_part=True)
    metrics.outbox(events=4, parts=2, size=100, age_s=1.0, fill=0.1)
    assert (metrics.snapshot().stored, metrics.snapshot().lost) == (2, 0)
    metrics.outbox(events=2, parts=1, size=100, age_s=1.0, fill=0.1)
    assert metrics.snapshot().lost == 1
