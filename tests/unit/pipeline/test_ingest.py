"""One reader a camera: what it hands over, and what it says of itself."""

import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import pytest
import structlog
from PIL import Image

from pipeline.cameras import FolderCamera, GenicamCamera, RtspCamera
from pipeline.errors import FrameError, SourceError
from pipeline.health import Health
from pipeline.ingest import CameraReader, Handover, to_model_size
from pipeline.metrics import Metrics
from pipeline.sources import open_source
from pipeline.types import IDLE, CameraState, Cause, Picture, Scored, Scores, Seen


@dataclass
class Line:
    """What a reader needs of the line, remembering what it was told."""

    frames: list = field(default_factory=list)
    states: list = field(default_factory=list)
    answers: list = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)
    health: Health = field(default_factory=Health)
    on_frame: object = None
    room: bool = True
    open: object = open_source

    def accept(self, frame):
        self.frames.append(frame)
        if self.on_frame is not None:
            self.on_frame(frame)

    def wait_for_room(self, camera_id, timeout_s):
        del camera_id
        if not self.room:
            time.sleep(min(timeout_s, 0.01))
        return self.room

    def announce(self, camera_id, state, reason):
        self.states.append((camera_id, state, reason))

    def reader(self, camera, size=(32, 32)):
        self.metrics.camera(camera.id, product=camera.product, station=camera.station)
        handover = Handover(
            accept=self.accept,
            answer=self.answers.append,
            wait_for_room=self.wait_for_room,
            announce=self.announce,
            metrics=self.metrics,
            health=self.health,
            run="run1",
            budget_s=2.0,
            open=self.open,
        )
        return CameraReader(camera, size, handover)


@pytest.fixture
def line():
    return Line()


@pytest.fixture
def folder(tmp_path):
    """A folder camera of three pictures, `a` to `c`."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    for name in "abc":
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return FolderCamera(id="c1", type="folder", product="tray", path=tmp_path)


def run_to_end(reader):
    reader.start()
    assert reader.join(60.0)
    assert reader.finished


def test_a_folder_becomes_frames_at_model_size(line, folder):
    """Each picture is a frame at the model's size, numbered from 1, with its part id and its deadline."""
    run_to_end(line.reader(folder, size=(16, 24)))
    assert [(frame.number, frame.part_id, frame.part_id_source) for frame in line.frames] == [
        (1, "a.png", "file"),
        (2, "b.png", "file"),
        (3, "c.png", "file"),
    ]
    assert all(frame.image.shape == (16, 24, 3) and frame.cause is None for frame in line.frames)
    assert all(frame.deadline_s == frame.captured_s + 2.0 for frame in line.frames)
    assert line.states == [("c1", CameraState.STREAMING, ""), ("c1", CameraState.ENDED, "")]


def test_a_bad_picture_is_a_frame_with_a_cause(line, folder):
    """A cut picture costs its own part only: it goes on as `frame_corrupt`, and the next ones follow."""
    whole = (folder.path / "b.png").read_bytes()
    (folder.path / "b.png").write_bytes(whole[: len(whole) // 2])
    run_to_end(line.reader(folder))
    assert [(frame.part_id, frame.cause) for frame in line.frames] == [
        ("a.png", None),
        ("b.png", Cause.FRAME_CORRUPT),
        ("c.png", None),
    ]
    assert line.frames[1].image is None
    assert line.states[-1][1] is CameraState.ENDED


def test_a_picture_of_another_size_is_a_frame_with_a_cause(line, folder):
    """Where `picture_size` is set, another size is `frame_corrupt` with its part id; the camera goes on."""
    Image.new("RGB", (48, 64)).save(folder.path / "b.png")
    run_to_end(line.reader(folder.model_copy(update={"picture_size": [64, 48]})))
    assert [(frame.part_id, frame.cause) for frame in line.frames] == [
        ("a.png", None),
        ("b.png", Cause.FRAME_CORRUPT),
        ("c.png", None),
    ]


def test_a_fault_of_every_frame_is_said_once_a_spell(line, folder):
    """All pictures of the wrong size are one line of the log, not one each; each is a frame with its cause."""
    with structlog.testing.capture_logs() as said:
        run_to_end(line.reader(folder.model_copy(update={"picture_size": [640, 480]})))
    assert [each["event"] for each in said].count("frame not usable") == 1
    assert [frame.cause for frame in line.frames] == [Cause.FRAME_CORRUPT] * 3


def test_a_repeated_part_has_a_name_of_its_own(line, folder):
    """A looping folder gives its parts new names in each round, so that no two inspections share an id."""
    reader = line.reader(folder.model_copy(update={"loop": True}))
    line.on_frame = lambda frame: reader.stop() if frame.number == 5 else None
    reader.start()
    assert reader.join(60.0)
    assert [frame.part_id for frame in line.frames] == ["a.png", "b.png", "c.png", "a.png#1", "b.png#1"]


def test_rate_spreads_the_pictures(line, folder):
    """`rate` is pictures a second: three at 50 take two steps of 20 ms."""
    before = time.monotonic()
    run_to_end(line.reader(folder.model_copy(update={"rate": 50.0})))
    assert time.monotonic() - before >= 0.035
    assert len(line.frames) == 3


def test_without_room_nothing_is_read(line, folder):
    """A reader that has to wait for room reads nothing, keeps beating, and ends when it is told to."""
    line.room = False
    reader = line.reader(folder)
    reader.start()
    time.sleep(0.05)
    reader.stop()
    assert reader.join(30.0)
    assert line.frames == []
    assert line.health.stalled() == []


def test_a_folder_that_is_not_there_fails_once(line, folder):
    """A camera that can never work says so once, with the reason, and is not tried again."""
    run_to_end(line.reader(folder.model_copy(update={"path": folder.path / "absent"})))
    assert line.states == [("c1", CameraState.FAILED, "not_found")]
    assert line.metrics.snapshot().cameras[0].reason == "not_found"


def test_an_unreachable_camera_is_lost_and_tried_again(line):
    """A camera that refuses is LOST with its reason, stays in its retries, and stops at once when told to."""
    camera = RtspCamera(id="c1", type="rtsp", product="tray", url="rtsp://127.0.0.1:9/c1", connect_timeout_s=0.5)
    reader = line.reader(camera)
    lost = threading.Event()
    line.announce = lambda *state: (line.states.append(state), lost.set())
    reader = line.reader(camera)
    reader.start()
    assert lost.wait(60.0)
    assert not reader.finished
    reader.stop()
    assert reader.join(30.0)
    assert line.states == [("c1", CameraState.LOST, "unreachable")]


def test_a_fault_of_ours_ends_this_camera_and_says_so(line, folder):
    """An exception nobody foresaw fails the camera with `internal`; its thread ends instead of dying unseen."""

    def break_down(frame):
        raise RuntimeError(frame.part_id)

    line.on_frame = break_down
    run_to_end(line.reader(folder))
    assert line.states[-1] == ("c1", CameraState.FAILED, "internal")


def test_the_resize_averages_areas():
    """Halving takes the mean of each 2 × 2 block: no pixel of a fine pattern is skipped."""
    board = np.zeros((8, 8, 3), np.uint8)
    board[::2, ::2] = board[1::2, 1::2] = 200
    small = to_model_size(board, 4, 2)
    assert small.shape == (4, 2, 3)
    assert small.dtype == np.uint8
    assert np.all(small == 100)


class Scripted:
    """A source that gives these, one a read; an exception is raised."""

    def __init__(self, *items):
        self._items = list(items)

    @property
    def left(self):
        return len(self._items)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def read(self):
        item = self._items.pop(0)
        if isinstance(item, Exception):
            raise item
        return item


def test_a_gap_in_the_camera_s_count_is_counted(line):
    """Frames 3, 4 and 7 never came: three are `missed`; the damaged frame 5 came, and a new opening starts anew."""

    def picture(count):
        return Picture(np.zeros((8, 8, 3), np.uint8), datetime.now(UTC), time.monotonic(), trigger_count=count)

    damaged = FrameError("cut", trigger_count=5)
    lost = SourceError("away", reason="timeout")
    sources = [Scripted(picture(1), picture(2), damaged, picture(6), IDLE, picture(8), lost)]
    sources.append(Scripted(picture(1), SourceError("gone", reason="setting_refused", final=True)))
    line.open = lambda *_: sources.pop(0)
    camera = GenicamCamera(id="c1", type="genicam", product="tray", trigger="Line0")
    run_to_end(line.reader(camera))
    assert line.metrics.snapshot().cameras[0].dropped == {"missed": 3}
    assert [frame.cause for frame in line.frames] == [None, None, Cause.FRAME_CORRUPT, None, None, None]


def test_frames_before_a_key_frame_are_counted_and_those_that_name_a_part_are_due(line):
    """Of three such frames one names its part, which is `frame_corrupt`; the others are counted by their cause."""
    faults = [FrameError("early", reason="no_key_frame", part_id=part_id) for part_id in (None, "p-1", None)]
    sources = [Scripted(*faults, SourceError("x", reason="too_large", final=True))]
    line.open = lambda *_: sources.pop(0)
    run_to_end(line.reader(RtspCamera(id="c1", type="rtsp", product="tray", url="rtsp://127.0.0.1:9/c1")))
    assert [(frame.part_id, frame.cause) for frame in line.frames] == [("p-1", Cause.FRAME_CORRUPT)]
    assert line.metrics.snapshot().cameras[0].dropped == {"no_key_frame": 2}


def test_a_stream_that_has_ended_is_called_so_until_something_else_is_known(line):
    """A camera that answers without a stream has `no_frames`, or `stream_ended` as long as that was its last word."""
    again = [SourceError("x", reason=reason) for reason in ("no_frames", "timeout", "no_frames")]
    sources = [Scripted(None), *map(Scripted, again)]
    sources.append(Scripted(SourceError("x", reason="too_large", final=True)))
    line.open = lambda *_: sources.pop(0)
    camera = RtspCamera(id="c1", type="rtsp", product="tray", url="rtsp://127.0.0.1:9/c1", retry_max_s=0.01)
    run_to_end(line.reader(camera))
    assert [reason for _, _, reason in line.states] == ["stream_ended", "timeout", "no_frames", "too_large"]


def test_another_reason_is_another_state(line):
    """A camera that was unreachable and then refuses the password says both, each once."""
    faults = ["unreachable", "unreachable", "auth_failed", "auth_failed"]
    sources = [Scripted(SourceError("x", reason=reason)) for reason in faults]
    sources.append(Scripted(SourceError("x", reason="too_large", final=True)))
    line.open = lambda *_: sources.pop(0)
    camera = RtspCamera(id="c1", type="rtsp", product="tray", url="rtsp://127.0.0.1:9/c1", retry_max_s=0.01)
    run_to_end(line.reader(camera))
    assert [reason for _, _, reason in line.states] == ["unreachable", "auth_failed", "too_large"]


def seen(number, size=(64, 48)):
    return Seen(number, size, datetime.now(UTC), time.monotonic())


GRAPH = RtspCamera(
    id="c1", type="rtsp", product="tray", url="rtsp://127.0.0.1:9/c1", decoder="deepstream", inference="graph"
)
GONE = SourceError("gone", reason="capture_died")
LAST = SourceError("x", reason="too_large", final=True)


def test_a_graph_s_frames_are_handed_over_and_answered_by_its_numbers(line):
    """Answers come later and find their own frame; one of an unknown number, or a second one, counts for nothing."""
    scores, other = Scores(3.5, 2.0, 11.0), Scores(0.5, 0.1, 1.0)
    answers = [
        Scored(8, 5.0, scores=other),
        Scored(7, 4.0, scores=scores),
        Scored(7, 6.0, scores=other),
        Scored(3, 6.0),
    ]
    source = Scripted(seen(7), seen(8), *answers, LAST)
    line.open = lambda *_: source
    run_to_end(line.reader(GRAPH))
    assert [(frame.image, frame.cause, frame.number) for frame in line.frames] == [(None, None, 1), (None, None, 2)]
    assert all(frame.deadline_s == frame.captured_s + 2.0 for frame in line.frames)
    assert [(each.frame.number, each.scores, each.received_s) for each in line.answers] == [
        (2, other, 5.0),
        (1, scores, 4.0),
    ]
    assert all(each.sent_s == each.frame.captured_s == each.frame.ready_s for each in line.answers)


def test_frames_in_a_graph_that_is_lost_are_told_at_once(line):
    """What a graph took with it is `triton_unavailable`; the next one numbers anew and is not mistaken for it."""
    sources = [Scripted(seen(1), GONE), Scripted(seen(1), Scored(1, 1.0, scores=Scores(1, 1, 1)), LAST)]
    line.open = lambda *_: sources.pop(0)
    run_to_end(line.reader(GRAPH))
    assert [(each.frame.number, each.cause) for each in line.answers] == [(1, Cause.TRITON_UNAVAILABLE), (2, None)]
    assert [reason for _, _, reason in line.states] == ["", "capture_died", "", "too_large"]


def test_a_graph_s_picture_of_another_size_is_a_frame_with_a_cause(line):
    """Where `picture_size` is set another size is `frame_corrupt`, whatever the graph says of it afterwards."""
    source = Scripted(seen(1, (48, 64)), Scored(1, 1.0, scores=Scores(1, 1, 1)), LAST)
    line.open = lambda *_: source
    run_to_end(line.reader(GRAPH.model_copy(update={"picture_size": [64, 48]})))
    assert [frame.cause for frame in line.frames] == [Cause.FRAME_CORRUPT]
    assert line.answers == []


def test_a_reader_that_is_stopped_waits_for_what_its_graph_was_asked(line):
    """After the order to stop no new frame is taken; the answers that are due still come, and then it ends."""
    source = Scripted(seen(1), seen(2), Scored(1, 1.0, scores=Scores(1, 1, 1)), seen(3), LAST)
    line.open = lambda *_: source
    reader = line.reader(GRAPH)
    line.on_frame = lambda _: reader.stop()
    reader.start()
    assert reader.join(30.0)
    assert [frame.number for frame in line.frames] == [1]
    assert [(each.frame.number, each.cause) for each in line.answers] == [(1, None)]
    assert source.left == 2
