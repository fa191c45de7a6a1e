"""Pictures kept for review: which, where, how many, and never at the cost of the line."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from pipeline import config
from pipeline.evidence import Evidence
from pipeline.health import Health
from pipeline.manifest import Manifests
from pipeline.types import Inference, Judgement


@pytest.fixture
def make_evidence(tmp_path, make_manifest):
    """Give a picture store in a folder of its own; keywords are its settings."""

    def make(**settings):
        values = {"dir": tmp_path / "kept"} | settings
        return Evidence(config.Evidence(**values), Manifests({"tray": make_manifest()}), Health())

    return make


def judged(make_view, evidence, judgement, **frame_fields):
    """Give a part as the judge would: with the name of its picture."""
    image = np.full((256, 256, 3), 120, np.uint8)
    part = make_view({"image": image} | frame_fields)
    anomaly_map = np.zeros((64, 64), np.float32)
    anomaly_map[:8, :8] = 3.0
    inference = replace(part.inference, anomaly_map=anomaly_map)
    verdict = replace(part.verdict, judgement=judgement)
    return replace(part, inference=inference, verdict=verdict, image_ref=evidence.reference(inference, judgement))


def test_an_ng_part_leaves_its_overlay_where_the_verdict_says(make_evidence, make_view, tmp_path):
    """The picture that the event points to is there after `close`, and shows picture and heat map side by side."""
    evidence = make_evidence()
    evidence.start()
    part = judged(make_view, evidence, Judgement.NG)
    evidence.keep(part)
    evidence.close()
    kept = cv2.imread(str(tmp_path / "kept" / part.image_ref))
    assert kept.shape[1] > kept.shape[0] > 0
    left, right = kept[:320, :426], kept[:320, 427:853]
    assert np.abs(left.astype(int) - right.astype(int)).max() > 30
    assert [path.name for path in (tmp_path / "kept").rglob("*") if path.is_file()] == ["part-1.NG.jpg"]


def test_a_good_part_leaves_nothing_unless_asked(make_evidence, make_view, make_frame):
    """OK and UNINSPECTED parts have a picture only with `keep: all`, and no part without an image has one."""
    inference = make_view({"image": np.zeros((8, 8, 3), np.uint8)}).inference
    for judgement in (Judgement.OK, Judgement.UNINSPECTED):
        assert make_evidence().reference(inference, judgement) is None
        assert make_evidence(keep="all").reference(inference, judgement).endswith(f".{judgement.value}.png")
        assert make_evidence(dir=None, keep="all").reference(inference, judgement) is None
    assert make_evidence(keep="all").reference(Inference(make_frame(image=None)), Judgement.NG) is None


def test_of_a_graph_s_part_the_heat_map_is_kept(make_evidence, make_view, tmp_path):
    """Where the picture stayed on the GPU the overlay lies on grey; an OK part leaves nothing, whatever is kept."""
    evidence = make_evidence(keep="all")
    evidence.start()
    part = judged(make_view, evidence, Judgement.NG, image=None)
    evidence.keep(part)
    assert judged(make_view, evidence, Judgement.OK, image=None).image_ref is None
    evidence.close()
    kept = cv2.imread(str(tmp_path / "kept" / part.image_ref)).astype(int)
    left, right = kept[:320, :426], kept[:320, 427:853]
    assert np.ptp(left[10:300, 10:400]) < 5
    assert np.abs(right - left).max() > 30
    assert [path.name for path in (tmp_path / "kept").rglob("*") if path.is_file()] == ["part-1.NG.jpg"]


def test_keeping_all_keeps_the_frame_without_loss(make_evidence, make_view, tmp_path):
    """With `keep: all` the frame is kept pixel by pixel as it went to the model."""
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    evidence = make_evidence(keep="all")
    evidence.start()
    part = judged(make_view, evidence, Judgement.OK, image=image)
    evidence.keep(part)
    evidence.close()
    assert np.array_equal(cv2.imread(str(tmp_path / "kept" / part.image_ref))[..., ::-1], image)


def test_a_part_id_never_leads_out_of_the_folder(make_evidence, make_view, tmp_path):
    """Whatever a camera claims as part id, its picture lies in the camera's folder."""
    evidence = make_evidence()
    for part_id in ("../../etc/passwd", "/etc/passwd", "..", ".", "a\nb", "x" * 5000, "ü/\\:*?", "\0"):
        reference = evidence.reference(make_view({"part_id": part_id}).inference, Judgement.NG)
        place = (tmp_path / "kept" / reference).resolve()
        assert place.parent == (tmp_path / "kept" / "c1").resolve()
        assert len(place.name) < 200


@pytest.mark.parametrize(("one", "other"), [("a/b", "a-b"), ("x" * 100 + "1", "x" * 100 + "2"), ("p#1", "p-1")])
def test_two_parts_never_share_a_picture(make_evidence, make_view, one, other):
    """Parts of different names have pictures of different names: a reviewer is never shown the wrong one."""
    names = {make_evidence().reference(make_view({"part_id": name}).inference, Judgement.NG) for name in (one, other)}
    assert len(names) == 2


def test_the_oldest_pictures_give_way(make_evidence, make_view, tmp_path):
    """No more than `max_files` stay, those of an earlier run included, and the newest are the ones that stay."""
    for numbers in ((1, 2, 3), (4, 5)):
        evidence = make_evidence(max_files=3)
        evidence.start()
        for number in numbers:
            evidence.keep(judged(make_view, evidence, Judgement.NG, number=number, part_id=f"part-{number}"))
        evidence.close()
    kept = sorted(path.name[:6] for path in (tmp_path / "kept").rglob("*.jpg"))
    assert kept == ["part-3", "part-4", "part-5"]


def test_a_full_queue_costs_a_picture_and_no_wait(make_evidence, make_view):
    """A disk slower than the line loses pictures, counted; `keep` never blocks."""
    evidence = make_evidence()  # not started: nothing is written
    for number in range(70):
        evidence.keep(judged(make_view, evidence, Judgement.NG, number=number))
    assert evidence.dropped == 70 - 64


def test_a_broken_disk_costs_pictures_only(make_evidence, make_view, tmp_path):
    """A picture that cannot be written is counted, and the next one is tried."""
    evidence = make_evidence()
    evidence.start()
    (tmp_path / "kept" / "c1").write_text("a file where a folder should be")
    evidence.keep(judged(make_view, evidence, Judgement.NG))
    evidence.keep(judged(make_view, evidence, Judgement.NG, camera_id="c2"))
    evidence.close()
    assert evidence.dropped == 1
    assert [path.parent.name for path in (tmp_path / "kept").rglob("*.jpg")] == ["c2"]
