"""The desk where parts get their verdict: what a fault, a late answer and a deadline cost, and what they do not."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from line_process import wait_until

from pipeline.config import Evidence as EvidenceSettings
from pipeline.events import Encoder, Place
from pipeline.evidence import Evidence
from pipeline.health import Health
from pipeline.judge import Judge
from pipeline.manifest import Manifests
from pipeline.metrics import Metrics
from pipeline.parts import Parts
from pipeline.stations import Station, StationView
from pipeline.types import Cause, Inference, Scores

FAR_S = time.monotonic() + 3600.0
PLACE = Place("site", "area", "line", "worker", 2000.0)


class Desk:
    """A judge, and what left it: part id, verdict and reasons of each event, by topic."""

    def __init__(self, manifest, encoder=None, stations=None, kept=None, graph_products=()):
        self.metrics = Metrics()
        for camera_id in ("c1", "c2"):
            self.metrics.camera(camera_id, product="tray", station="s1")
        self.health = Health()
        self.settled = []
        self.told = {"verdict.v1": [], "view.v1": [], "audit.v1": []}
        self.judge = Judge(
            Parts(stations or {}, {"c1": "tray", "c2": "tray"}, budget_s=2.0, run="R"),
            Manifests({"tray": manifest}),
            SimpleNamespace(get={"tray": manifest.suggestion}.get),
            evidence=Evidence(EvidenceSettings(dir=kept), Manifests({"tray": manifest}), self.health),
            encoder=encoder or Encoder(PLACE, "binary"),
            outbox=SimpleNamespace(put=self._put),
            metrics=self.metrics,
            health=self.health,
            settled=self.settled.append,
            graph_products=graph_products,
        )

    def _put(self, *events, final=None, otherwise=None):
        del otherwise  # for a disk that does not take them
        if final is not None:
            final()
        for event in events:
            self.told[event.topic].append(json.loads(event.value))

    def verdicts(self):
        return [(data["partId"], data["verdict"], data["reasonCodes"]) for data in self.told["verdict.v1"]]

    def wait_for(self, topic, count):
        wait_until(lambda: len(self.told[topic]) >= count, 60, f"{count} events on {topic}")


@pytest.fixture
def desk(make_manifest):
    """Give a running judge; closed at the end, when every part must have left."""
    made = []

    def make(**fields):
        made.append(Desk(make_manifest(), **fields))
        made[-1].judge.start()
        return made[-1]

    yield make
    for each in made:
        each.judge.close()
        assert each.judge.open_parts == 0


class Broken(Encoder):
    """An encoder that fails for one part."""

    def part(self, part, **about):
        if part.part.part_id == "part-2":
            raise RuntimeError("no such event")
        return super().part(part, **about)


def test_a_verdict_that_cannot_be_encoded_costs_that_part_alone(desk, make_frame):
    """It is counted as undelivered; the parts before and after it, and those released with it, leave."""
    line = desk(encoder=Broken(PLACE, "binary"))
    one, two, three, four = (
        line.judge.accept(make_frame(number=number, deadline_s=FAR_S))[0] for number in range(1, 5)
    )
    for frame in (two, three, one):  # the first one releases all three
        line.judge.put(Inference(frame, scores=Scores(1.0, 1.0, 1.0)))
    line.wait_for("verdict.v1", 2)
    line.judge.put(Inference(four, scores=Scores(9.0, 9.0, 9.0)))
    line.wait_for("verdict.v1", 3)
    assert [(part, verdict) for part, verdict, _ in line.verdicts()] == [
        ("part-1", "OK"),
        ("part-3", "OK"),
        ("part-4", "NG"),
    ]
    assert line.metrics.snapshot().undelivered == 1
    assert line.health.stalled() == []


def test_an_overdue_part_is_uninspected_and_its_late_answer_audited(desk, make_frame):
    """The verdict stands: scores that come after it are on the audit topic, and a late fault says nothing new."""
    line = desk()
    now_s = time.monotonic()
    late, fault = (
        line.judge.accept(make_frame(number=number, captured_s=now_s - 5.0, deadline_s=now_s))[0] for number in (1, 2)
    )
    line.wait_for("verdict.v1", 2)
    assert line.verdicts() == [(part, "UNINSPECTED", ["deadline"]) for part in ("part-1", "part-2")]
    line.judge.put(Inference(fault, cause=Cause.TRITON_UNAVAILABLE))
    line.judge.put(Inference(late, scores=Scores(9.0, 8.0, 7.0)))
    line.wait_for("audit.v1", 1)
    (audited,) = line.told["audit.v1"]
    assert (audited["partId"], audited["reason"], audited["late"]) == ("part-1", "late_result", True)
    assert audited["scores"] == {"fused": 9.0, "map": 8.0, "mahalanobis": 7.0}
    assert len(line.told["verdict.v1"]) == 2
    counted = {"station": "s1", "cause": "late_result"}
    assert line.metrics.registry.get_sample_value("inspection_strays_total", counted) == 2


def test_a_graph_s_answer_is_judged_as_the_client_s_is(desk, make_frame):
    """A frame without its picture is not to be inferred; what the graph says later gets the same verdict, NaN and
    causes included, and what it says too late is audited."""
    said = [{"scores": Scores(score, 1.0, 1.0)} for score in (0.5, 2.5, 3.0, 99.0, float("nan"))]
    said += [{"cause": Cause.TRITON_UNAVAILABLE}]
    lines = {"client": desk(), "graph": desk()}
    for number, about in enumerate(said, 1):
        frame = make_frame(number=number, deadline_s=FAR_S)
        lines["client"].judge.put(Inference(lines["client"].judge.accept(frame)[0], **about))
        bare = replace(frame, image=None)
        assert lines["graph"].judge.accept(bare) == []
        lines["graph"].judge.answer(Inference(bare, **about))
    for line in lines.values():
        line.wait_for("verdict.v1", len(said))
    assert lines["graph"].verdicts() == lines["client"].verdicts()
    assert [verdict for _, verdict, _ in lines["graph"].verdicts()] == [
        "OK",
        "REVIEW",
        "NG",
        "NG",
        *["UNINSPECTED"] * 2,
    ]
    lines["graph"].judge.answer(Inference(make_frame(image=None), scores=Scores(1.0, 1.0, 1.0)))
    lines["graph"].wait_for("audit.v1", 1)


def test_a_graph_s_product_is_not_judged_from_pictures_of_the_line(desk, make_frame):
    """A trigger may name any product: one whose limits are for a graph's pictures is not inferred, and never OK."""
    line = desk(graph_products=["tray"])
    assert line.judge.accept(make_frame(number=1, deadline_s=FAR_S)) == []
    line.wait_for("verdict.v1", 1)
    assert line.verdicts() == [("part-1", "UNINSPECTED", ["product_not_ready"])]


def test_a_part_of_two_views_may_be_seen_by_a_graph_and_by_the_line(desk, make_frame, tmp_path):
    """The graph's answer names its frame as the reader knows it; its part is found, and names its picture."""
    views = [StationView(camera="c1"), StationView(camera="c2")]
    line = desk(stations={"s1": Station(name="s1", views=views)}, kept=tmp_path)
    now_s = time.monotonic()
    (ours,) = line.judge.accept(
        make_frame(camera_id="c2", captured_s=now_s, part_id="c2-R-1", part_id_source="generated")
    )
    theirs = make_frame(image=None, captured_s=now_s + 0.1, part_id="c1-R-1", part_id_source="generated")
    assert line.judge.accept(theirs) == []
    anomaly_map = np.zeros((64, 64), np.float32)
    line.judge.answer(Inference(theirs, scores=Scores(9.0, 9.0, 9.0), anomaly_map=anomaly_map))
    line.judge.put(Inference(ours, scores=Scores(1.0, 1.0, 1.0)))
    line.wait_for("verdict.v1", 1)
    assert line.verdicts() == [("c2-R-1", "NG", ["score_above_ng", "anomaly_map"])]
    (verdict,) = line.told["verdict.v1"]
    assert {view["cameraId"]: view["imageRef"] for view in verdict["views"]} == {"c1": "c1/c2-R-1.NG.jpg", "c2": None}


def test_a_part_that_cannot_be_judged_is_left_to_its_deadline(desk, make_frame, monkeypatch):
    """A fault of ours while a view is judged: the part is UNINSPECTED on time, and the next one is judged."""

    line = desk()
    now_s = time.monotonic()
    first = line.judge.accept(make_frame(number=1, captured_s=now_s, deadline_s=now_s + 1.0))[0]
    second = line.judge.accept(make_frame(number=2, deadline_s=FAR_S))[0]
    monkeypatch.setattr("pipeline.judge.regions", None)
    line.judge.put(Inference(first, scores=Scores(1.0, 1.0, 1.0), anomaly_map=np.zeros((4, 4), np.float32)))
    line.judge.put(Inference(second, scores=Scores(1.0, 1.0, 1.0)))
    line.wait_for("verdict.v1", 2)
    assert line.verdicts() == [("part-1", "UNINSPECTED", ["deadline"]), ("part-2", "OK", [])]


def test_what_is_open_at_the_end_gets_its_verdict(make_manifest, make_frame):
    """`close` gives up whatever is open, and takes nothing after it."""
    line = Desk(make_manifest())
    line.judge.start()
    line.judge.accept(make_frame(number=1))
    line.judge.close()
    assert line.verdicts() == [("part-1", "UNINSPECTED", ["deadline"])]
    assert line.judge.accept(make_frame(number=2)) == []
    assert line.metrics.snapshot().triggered == 1
