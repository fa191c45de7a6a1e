"""The line's cameras, without its servers: they come and go, and leave nothing behind."""

import threading
import time

import cv2
import numpy as np
import pytest
from wire_events import AT, PARTS

from pipeline import config
from pipeline.app import Line, stored_inspections
from pipeline.cameras import FolderCamera
from pipeline.events import Encoder, Place, inspection_id, packed
from pipeline.journal import Journal
from pipeline.triggers import TriggerReader
from pipeline.types import Trigger


@pytest.fixture
def line(line_file, models_repo):
    """A line that reads a pool and was not started: nobody judges what it takes."""
    return Line(config.load(line_file(cameras=[], pool={}, triton={"models_repo": str(models_repo)})))


@pytest.fixture
def make_camera(tmp_path):
    cv2.imwrite(str(tmp_path / "0.png"), np.zeros((32, 32, 3), np.uint8))

    def make(number, product="tray"):
        keys = {"product": product, "station": f"s{number}", "path": tmp_path, "loop": True, "queue_frames": 2}
        return FolderCamera(id=f"c{number}", type="folder", **keys)

    return make


def await_frames(line, count):
    """Wait until each camera has given so many frames since the start."""
    until = time.monotonic() + 60
    while any(camera.frames < count for camera in line.snapshot().cameras):
        assert time.monotonic() < until
        time.sleep(0.01)


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("camera c")]


def test_thirty_cameras_come_and_go(line, make_camera):
    """Added and removed twice, 30 cameras leave no thread and no row; their frames are numbered on and stay counted.

    Their queues are full, so that each reader waits for room when it is let go.
    """
    cameras = [make_camera(number) for number in range(30)]
    triggered = 0
    for round_number in (1, 2):
        for camera in cameras:
            line.cameras.add_camera(camera)
        await_frames(line, 2 * round_number)
        assert len(readers()) == 30
        triggered = line.snapshot().triggered
        line.cameras.remove_cameras([camera.id for camera in cameras], "removed")
        assert readers() == []
        assert line.snapshot().cameras == ()
        assert line.snapshot().triggered == triggered
    assert triggered == 30 * 4
    assert line.health.stalled() == []


def test_a_camera_of_another_product_comes_again_under_its_name(line, make_camera):
    """What is changed is the product; the number of its frames goes on, so that no part gets an id twice."""
    line.cameras.add_camera(make_camera(1))
    await_frames(line, 2)
    line.cameras.remove_cameras(["c1"], "changed")
    line.cameras.add_camera(make_camera(1, product="cable-set"))
    await_frames(line, 4)
    (camera,) = line.snapshot().cameras
    assert (camera.product, camera.frames) == ("cable-set", 4)
    line.cameras.remove_cameras(["c1"], "removed")


def test_a_line_of_a_pool_knows_every_product_and_is_never_finished(line):
    """Its cameras are still to come: all products of the repository are ready for them."""
    assert sorted(line.cameras.products) == ["cable-set", "tray"]
    assert not line.finished


def test_a_camera_that_its_station_does_not_list_is_objected_to(line_file, models_repo, make_camera):
    """A station may name cameras of the pool; one that it does not name would make parts of its own."""
    stations = [{"name": "s1", "views": [{"camera": "c1"}, {"camera": "c9"}]}]
    keys = {"cameras": [], "pool": {}, "triton": {"models_repo": str(models_repo)}, "stations": stations}
    line = Line(config.load(line_file(**keys)))
    assert line.cameras.objection(make_camera(1)) == ""
    assert line.cameras.objection(make_camera(2)) == ""
    stray = make_camera(2).model_copy(update={"station": "s1"})
    assert "no view of this camera" in line.cameras.objection(stray)


@pytest.mark.parametrize("mode", ["binary", "structured"])
def test_what_an_earlier_run_left_in_the_outbox_is_known_by_its_inspection(tmp_path, mode):
    """So a trigger that is read again after a crash gets no second word; views and other events name no part."""
    encoder = Encoder(Place("s", "a", "l", "w", 2000.0), mode)
    events = encoder.part(PARTS["ok"], decided_at=AT)
    assert stored_inspections(None) == stored_inspections(tmp_path / "none") == frozenset()
    journal = Journal(tmp_path)
    journal.open()
    journal.append([(1, packed(event)) for event in events], 0)
    journal.close()
    part = PARTS["ok"].part
    assert stored_inspections(tmp_path) == {inspection_id("/s/a/l", part.station, part.part_id, part.camera_id)}


def test_a_trigger_whose_verdict_waits_in_the_outbox_opens_no_part(line_file, models_repo, monkeypatch):
    """Read again after a crash it is done with at once; one whose measurement is another opens its part."""
    stations = [{"name": "s1", "trigger": "message"}]
    cameras = [{"id": "c1", "type": "folder", "product": "tray", "path": "p", "station": "s1"}]
    keys = {"cameras": cameras, "stations": stations, "triton": {"models_repo": str(models_repo)}}
    settled = []
    monkeypatch.setattr(TriggerReader, "settled", lambda _, receipt: settled.append(receipt))
    line = Line(config.load(line_file(**keys)))
    told, new = (
        Trigger("s1", "p-1", measurement, None, None, AT, time.monotonic(), receipt=(0, number))
        for number, measurement in enumerate(("m1", "m2"))
    )
    monkeypatch.setattr(line, "_told", {inspection_id("/site/area/l1", "s1", "p-1", None, "m1")})
    line._triggered(told)
    assert (settled, line.snapshot().triggered) == ([(0, 0)], 0)
    line._triggered(new)
    assert (settled, line.snapshot().triggered) == ([(0, 0)], 1)
