"""Gathering across cameras: by count, by age, fairly, and nothing lost."""

import threading
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from pipeline.batcher import Batcher
from pipeline.metrics import Metrics
from pipeline.types import Cause, Frame, Inference

LONG_S = 60.0
OLD_S = 100.0


@pytest.fixture
def make_batcher():
    """Give a batcher with cameras named `<product>/<anything>`, each holding four frames."""

    def make(*cameras, max_size=4, max_age_s=LONG_S, capacity=4, overflow="drop_oldest"):
        return batcher_of(cameras, max_size=max_size, max_age_s=max_age_s, capacity=capacity, overflow=overflow)

    return make


def batcher_of(cameras, *, max_size, max_age_s, capacity, overflow="drop_oldest"):
    metrics = Metrics()
    batcher = Batcher(metrics, max_size=max_size, max_age_s=max_age_s)
    for camera in cameras:
        product = camera.split("/")[0]
        metrics.camera(camera, product=product, station="s1")
        batcher.add_camera(camera, product=product, capacity=capacity, overflow=overflow)
    return batcher


def frame_of(make_frame, camera, number, *, age_s=0.0):
    captured_s = time.monotonic() - age_s
    return make_frame(camera_id=camera, product=camera.split("/")[0], number=number, captured_s=captured_s)


def numbers(batch):
    return [(frame.camera_id, frame.number) for frame in batch.frames]


def test_a_full_batch_goes_at_once(make_batcher, make_frame):
    """`max_size` frames of a product are a batch, however young they are."""
    batcher = make_batcher("a/1", "a/2", max_size=3)
    for camera, number in (("a/1", 1), ("a/2", 1)):
        batcher.put(frame_of(make_frame, camera, number))
    assert batcher.take(0.0) is None
    batcher.put(frame_of(make_frame, "a/1", 2))
    batch = batcher.take(0.0)
    assert batch is not None
    assert numbers(batch) == [("a/1", 1), ("a/2", 1), ("a/1", 2)]


def test_a_batch_has_no_more_frames_than_there_is_room_for(make_batcher, make_frame):
    """As many as the server has room for are a batch at once; more room than `max_size` makes none larger."""
    batcher = make_batcher("a/1", "a/2", max_size=3)
    for number in range(1, 4):
        for camera in ("a/1", "a/2"):
            batcher.put(frame_of(make_frame, camera, number))
    assert [len(batcher.take(0.0, most=most).frames) for most in (1, 2, 100)] == [1, 2, 3]


def test_a_camera_whose_frames_give_way_before_they_are_old_is_read_all_the_same(make_batcher, make_frame):
    """Faster than `max_age_s` with room for one: the frame that drove another out goes at once, the next one waits."""
    batcher = make_batcher("a/1", capacity=1, max_size=8, max_age_s=60.0)
    batcher.put(frame_of(make_frame, "a/1", 1))
    assert batcher.take(0.0) is None
    assert batcher.put(frame_of(make_frame, "a/1", 2)).number == 1
    assert numbers(batcher.take(0.0)) == [("a/1", 2)]
    batcher.put(frame_of(make_frame, "a/1", 3))
    assert batcher.take(0.0) is None


def test_what_a_batch_takes_is_an_average_that_one_hang_does_not_spoil(make_batcher, make_frame):
    """Answers count by a fifth; a batch that was given up after a minute no more than doubles what is known."""
    batcher, frame = make_batcher("a/1"), make_frame()
    for _ in range(40):
        batcher.learn(Inference(frame, sent_s=5.0, received_s=5.1))
    assert batcher.service_s == pytest.approx(0.1, rel=1e-3)
    batcher.learn(Inference(frame, cause=Cause.DEADLINE, sent_s=time.monotonic() - 60.0))
    assert 0.1 < batcher.service_s < 0.2
    known_s = batcher.service_s
    batcher.learn(Inference(frame, cause=Cause.DEADLINE))  # never sent
    batcher.learn(Inference(frame, cause=Cause.TRITON_UNAVAILABLE, sent_s=time.monotonic() - 60.0))
    assert batcher.service_s == known_s
    for _ in range(20):
        batcher.learn(Inference(frame, cause=Cause.DEADLINE, sent_s=time.monotonic() - 1.0))
    assert batcher.service_s > 0.9


def test_an_old_frame_goes_with_those_that_are_there(make_batcher, make_frame):
    """A frame of `max_age_s` waits no longer for company."""
    batcher = make_batcher("a/1", "a/2", max_size=8, max_age_s=0.05)
    batcher.put(frame_of(make_frame, "a/1", 1))
    batcher.put(frame_of(make_frame, "a/2", 1))
    before = time.monotonic()
    batch = batcher.take(30.0)
    assert batch is not None
    assert len(batch.frames) == 2
    assert 0.03 <= time.monotonic() - before < 15


def test_nothing_to_take_ends_with_the_timeout(make_batcher):
    """An empty batcher gives None when the time is up."""
    before = time.monotonic()
    assert make_batcher("a/1").take(0.05) is None
    assert 0.04 <= time.monotonic() - before < 15


@pytest.mark.parametrize("cameras", [("a/1", "b/1"), ("b/1", "a/1")])
def test_products_are_never_mixed(make_batcher, make_frame, cameras):
    """A batch holds one product, and the product that waits longest comes first, whatever the order of the file."""
    batcher = make_batcher(*cameras, max_size=2)
    for camera, number, age_s in (("a/1", 1, OLD_S), ("b/1", 1, 2 * OLD_S), ("a/1", 2, OLD_S), ("b/1", 2, OLD_S)):
        batcher.put(frame_of(make_frame, camera, number, age_s=age_s))
    batches = [batcher.take(0.0), batcher.take(0.0)]
    assert [batch.product for batch in batches] == ["b", "a"]
    assert all({frame.product for frame in batch.frames} == {batch.product} for batch in batches)


def test_a_busy_camera_leaves_room_for_the_others(make_batcher, make_frame):
    """Cameras of a product take turns, also from one batch to the next."""
    batcher = make_batcher("a/busy", "a/2", "a/3", max_size=2)
    for number in range(1, 5):
        batcher.put(frame_of(make_frame, "a/busy", number))
    batcher.put(frame_of(make_frame, "a/2", 1))
    batcher.put(frame_of(make_frame, "a/3", 1))
    taken = [numbers(batcher.take(0.0)) for _ in range(3)]
    assert taken == [[("a/busy", 1), ("a/2", 1)], [("a/3", 1), ("a/busy", 2)], [("a/busy", 3), ("a/busy", 4)]]


def test_a_full_queue_gives_its_oldest_frame_back(make_batcher, make_frame):
    """With `drop_oldest` there is always room, and the frame that gives way is the oldest one of that camera."""
    batcher = make_batcher("a/1", "a/2", capacity=2, max_size=8)
    batcher.put(frame_of(make_frame, "a/2", 1))
    assert [batcher.put(frame_of(make_frame, "a/1", number)) for number in (1, 2)] == [None, None]
    assert batcher.wait_for_room("a/1", 0.0)
    evicted = batcher.put(frame_of(make_frame, "a/1", 3))
    assert isinstance(evicted, Frame)
    assert (evicted.camera_id, evicted.number) == ("a/1", 1)


def test_wait_holds_the_reader_back_until_there_is_room(make_batcher, make_frame):
    """With `wait` a full queue has no room until a batch was taken; the reader then wakes at once."""
    batcher = make_batcher("a/1", capacity=2, max_size=2, overflow="wait")
    for number in (1, 2):
        assert batcher.wait_for_room("a/1", 0.0)
        batcher.put(frame_of(make_frame, "a/1", number))
    assert not batcher.wait_for_room("a/1", 0.02)
    woken = []
    reader = threading.Thread(target=lambda: woken.append(batcher.wait_for_room("a/1", 5.0)))
    reader.start()
    batcher.take(0.0)
    reader.join(2.0)
    assert woken == [True]


def test_close_sends_what_is_there(make_batcher, make_frame):
    """After `close` nothing waits for company, and nobody waits for room."""
    batcher = make_batcher("a/1", "b/1", capacity=1, overflow="wait")
    batcher.put(frame_of(make_frame, "a/1", 1))
    batcher.put(frame_of(make_frame, "b/1", 1))
    assert batcher.take(0.0) is None
    batcher.close()
    assert batcher.wait_for_room("a/1", 0.0)
    assert {batcher.take(0.0).product for _ in range(2)} == {"a", "b"}
    assert batcher.take(0.0) is None


def test_a_waiting_taker_wakes_at_close(make_batcher, make_frame):
    """`close` wakes the one who waits for a batch."""
    batcher = make_batcher("a/1")
    batcher.put(frame_of(make_frame, "a/1", 1))
    taken = []
    taker = threading.Thread(target=lambda: taken.append(batcher.take(5.0)))
    taker.start()
    batcher.close()
    taker.join(2.0)
    assert len(taken[0].frames) == 1


CAMERAS = ("a/1", "a/2", "b/1", "b/2")


class NothingLost(RuleBasedStateMachine):
    """Puts and takes in any order: a frame comes out once, by a batch or as the one that gave way, in order."""

    make_frame = None  # set by the test below

    def __init__(self) -> None:
        super().__init__()
        self.batcher = batcher_of(CAMERAS, max_size=3, max_age_s=LONG_S, capacity=2)
        self.put_in, self.out = [], []

    @rule(camera=st.sampled_from(CAMERAS), old=st.booleans())
    def put(self, camera, old):
        number = sum(name == camera for name, _ in self.put_in) + 1
        self.put_in.append((camera, number))
        evicted = self.batcher.put(frame_of(NothingLost.make_frame, camera, number, age_s=OLD_S if old else 0.0))
        if evicted is not None:
            self.out.append((evicted.camera_id, evicted.number))

    @rule()
    def take(self):
        self._take()

    def _take(self):
        batch = self.batcher.take(0.0)
        if batch is not None:
            assert 1 <= len(batch.frames) <= 3
            assert {frame.product for frame in batch.frames} == {batch.product}
            self.out.extend(numbers(batch))
        return batch

    def teardown(self):
        self.batcher.close()
        while self._take() is not None:
            pass
        assert Counter(self.out) == Counter(self.put_in)
        for camera in CAMERAS:
            order = [number for name, number in self.out if name == camera]
            assert order == sorted(order)


def test_no_frame_is_lost_or_doubled(make_frame):
    """Whatever the order of puts and takes, every frame leaves exactly once, in the order of its camera."""
    NothingLost.make_frame = staticmethod(make_frame)
    machine = NothingLost.TestCase()
    machine.settings = settings(max_examples=60, stateful_step_count=25)
    machine.runTest()


@settings(max_examples=60)
@given(backlog=st.lists(st.integers(0, 6), min_size=2, max_size=5), size=st.integers(1, 6))
def test_turns_are_fair(make_frame, backlog, size):
    """While cameras have frames waiting, none is ever served two frames more than another."""
    cameras = [f"a/{index}" for index in range(len(backlog))]
    batcher = batcher_of(cameras, max_size=size, max_age_s=LONG_S, capacity=10)
    for camera, frames in zip(cameras, backlog, strict=True):
        for number in range(1, frames + 1):
            batcher.put(frame_of(make_frame, camera, number, age_s=OLD_S))
    served: Counter[str] = Counter()
    while (batch := batcher.take(0.0)) is not None:
        for frame in batch.frames:
            served[frame.camera_id] += 1
            hungry = [camera for camera, frames in zip(cameras, backlog, strict=True) if served[camera] < frames]
            assert all(served[frame.camera_id] - served[camera] <= 1 for camera in hungry)
    assert sum(served.values()) == sum(backlog)


def test_a_removed_camera_leaves_nothing_behind(make_batcher, make_frame):
    """What it had queued still goes out, once; it takes no more, and comes again as a new one."""
    batcher = make_batcher("a/1", "a/2")
    for number in (1, 2):
        batcher.put(frame_of(make_frame, "a/1", number, age_s=OLD_S))
    batcher.remove_camera("a/1")
    late = frame_of(make_frame, "a/1", 3)
    returned = batcher.put(late)
    assert (returned.number, returned.cause, returned.image) == (3, Cause.CAMERA_LOST, None)
    batcher.add_camera("a/1", product="a", capacity=4, overflow="drop_oldest")
    batcher.put(frame_of(make_frame, "a/1", 4))
    assert numbers(batcher.take(0.0)) == [("a/1", 1), ("a/1", 4), ("a/1", 2)]
    assert batcher.take(0.0) is None


def test_a_reader_that_waits_for_room_is_let_go_when_its_camera_is_removed(make_batcher, make_frame):
    """A full `wait` queue does not hold the reader of a removed camera back."""
    batcher = make_batcher("a/1", capacity=1, overflow="wait")
    batcher.put(frame_of(make_frame, "a/1", 1))
    assert not batcher.wait_for_room("a/1", 0.01)
    threading.Timer(0.05, batcher.remove_camera, ["a/1"]).start()
    before = time.monotonic()
    batcher.wait_for_room("a/1", 30.0)
    assert time.monotonic() - before < 15
    assert not batcher.wait_for_room("a/1", 0.0)


def test_a_frame_of_another_product_goes_with_its_own(make_batcher, make_frame):
    """Across a changeover a camera's frames of two products are two batches, and its bound holds for each."""
    batcher = make_batcher("a/1", "b/1", max_size=2, capacity=2)
    for number, product in ((1, "a"), (2, "b"), (3, "b"), (4, "c")):
        assert batcher.put(make_frame(camera_id="a/1", product=product, number=number)) is None
    assert batcher.put(make_frame(camera_id="a/1", product="b", number=5)).number == 2
    batcher.close()
    taken = {batch.product: numbers(batch) for batch in (batcher.take(0.0) for _ in range(3))}
    assert taken == {"a": [("a/1", 1)], "b": [("a/1", 3), ("a/1", 5)], "c": [("a/1", 4)]}
    assert batcher.take(0.0) is None


def test_a_camera_waits_for_room_whatever_its_frames_are(make_batcher, make_frame):
    """A full camera makes its reader wait, also when its frames are of several products."""
    batcher = make_batcher("a/1", capacity=2, overflow="wait")
    batcher.put(make_frame(camera_id="a/1", product="a", number=1))
    assert batcher.wait_for_room("a/1", 0.0)
    batcher.put(make_frame(camera_id="a/1", product="b", number=2))
    assert not batcher.wait_for_room("a/1", 0.0)


def test_drop_late_gives_up_only_what_can_no_longer_be_judged(make_batcher, make_frame):
    """With `drop_late` a full queue holds the reader back until its oldest frame is late; that one gives way as
    `deadline`, and is counted."""
    batcher = make_batcher("a/1", capacity=2, max_size=8, overflow="drop_late")
    now = time.monotonic()
    for number, left_s in ((1, 1.0), (2, 50.0)):
        batcher.put(make_frame(camera_id="a/1", product="a", number=number, captured_s=now, deadline_s=now + left_s))
    assert not batcher.wait_for_room("a/1", 0.0)
    assert batcher.wait_for_room("a/1", 60.0)
    assert time.monotonic() - now >= 1.0
    evicted = batcher.put(make_frame(camera_id="a/1", product="a", number=3))
    assert (evicted.number, evicted.cause, evicted.image) == (1, Cause.DEADLINE, None)
    assert not batcher.wait_for_room("a/1", 0.0)
    batcher.service_s = 60.0  # the server has become slow: number 2 has not that much time left
    assert batcher.wait_for_room("a/1", 0.0)
    assert batcher._metrics.snapshot().cameras[0].dropped == {"deadline": 1}


def test_a_frame_that_gives_way_says_why(make_batcher, make_frame):
    """With `drop_oldest` the cause is `queue_full`, and the drop is counted for its camera."""
    batcher = make_batcher("a/1", capacity=1)
    batcher.put(frame_of(make_frame, "a/1", 1))
    evicted = batcher.put(frame_of(make_frame, "a/1", 2))
    assert (evicted.cause, evicted.image) == (Cause.QUEUE_FULL, None)
    assert batcher._metrics.snapshot().cameras[0].dropped == {"queue_full": 1}


def test_a_removed_camera_leaves_no_queue_of_any_product(make_batcher, make_frame):
    """Also its frames of other products still go out, and then nothing of it is left."""
    batcher = make_batcher("a/1", max_size=4)
    for number, product in ((1, "a"), (2, "b")):
        batcher.put(make_frame(camera_id="a/1", product=product, number=number))
    batcher.remove_camera("a/1")
    batcher.close()
    assert sorted(numbers(batcher.take(0.0))[0] for _ in range(2)) == [("a/1", 1), ("a/1", 2)]
    assert not any(batcher._products.values())
