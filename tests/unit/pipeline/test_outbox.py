"""The outbox on real files, with a Kafka that acknowledges when it is told to."""

import shutil
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from pipeline import outbox as outbox_module
from pipeline.config import Outbox as Settings
from pipeline.errors import ConfigError
from pipeline.events import Event, packed, unpacked
from pipeline.health import Health
from pipeline.journal import Journal
from pipeline.metrics import Metrics
from pipeline.outbox import Outbox, read_stored

WAIT_S = 30.0


def part(number, key=b"l1/s1", **fields):
    headers = (("ce_id", b"id-%d" % number),)
    return replace(Event("verdict.v1", key, b"part %d" % number, headers, is_part=True), **fields)


def uninspected(number):
    return part(number, value=b"uninspected %d" % number)


class Broker:
    """Takes what a sink takes, at most `most` at a time; nothing is acknowledged before `acknowledge`."""

    def __init__(self, most=10_000):
        self.most = most
        self.events = []
        self._acknowledged = 0

    @property
    def room(self):
        return self.most - (len(self.events) - self._acknowledged)

    def start(self):
        """Reach it."""

    def put(self, *events):
        self.events += events

    def acknowledge(self):
        events = self.events[self._acknowledged :]
        self._acknowledged += len(events)
        for event in events:
            event.done()

    def close(self, until_s):
        del until_s
        return self.events[self._acknowledged :]

    @property
    def values(self):
        return [event.value for event in self.events]


def wait(condition):
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def health():
    return Health()


@pytest.fixture
def start(tmp_path, metrics, health):
    """Start an outbox on a folder; all are closed at the end."""
    started = []

    def make(broker, *, folder=None, max_held=100, **settings):
        folder = folder or tmp_path / "outbox"
        made = Outbox(Settings(dir=folder, **settings), broker, max_held=max_held, metrics=metrics, health=health)
        made.start()
        started.append(made)
        return made

    yield make
    for outbox in started:
        outbox.close(time.monotonic())


@pytest.fixture
def full_disk(small_disk):
    """That disk, filled by somebody else; removing `other` frees it."""
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    assert shutil.disk_usage(small_disk).free == 0
    return small_disk


@given(
    topic=st.text(),
    key=st.binary(),
    value=st.binary(),
    headers=st.lists(st.tuples(st.text(), st.binary()), max_size=4),
    is_part=st.booleans(),
)
def test_an_event_comes_back_from_disk_as_it_was(topic, key, value, headers, is_part):
    """Any bytes in key, value and headers survive, those of a dead letter too."""
    event = Event(topic, key, value, tuple(headers), is_part=is_part)
    assert unpacked(packed(event)) == event


def test_an_event_is_done_once_it_is_on_disk(start, tmp_path):
    """With Kafka silent, `done` and `final` are called, and the folder holds the event."""
    broker, told = Broker(), []
    outbox = start(broker)
    outbox.put(part(1, done=partial(told.append, "done")), final=partial(told.append, "final"))
    wait(lambda: len(told) == 2)
    assert [event.value for event in read_stored(tmp_path / "outbox")] == [b"part 1"]
    wait(lambda: broker.values == [b"part 1"])


def test_a_killed_run_is_replayed_before_new_events_and_in_order(start, tmp_path, metrics):
    """What Kafka had not acknowledged goes first in the next run; what it had does not go again."""
    first = Broker()
    outbox = start(first)
    outbox.put(part(1), part(2))
    wait(lambda: len(first.events) == 2)
    first.acknowledge()
    outbox.put(part(3), part(4))
    wait(lambda: len(first.events) == 4)
    left = outbox.close(time.monotonic())
    assert (left.parts, left.lost_parts) == (2, 0)
    second = Broker()
    again = start(second)
    again.put(part(5))
    wait(lambda: second.values == [b"part 3", b"part 4", b"part 5"])
    assert metrics.snapshot().found == 2
    second.acknowledge()
    assert again.close(time.monotonic() + WAIT_S).events == 0
    assert list((tmp_path / "outbox").iterdir()) == []


def test_the_end_waits_for_all_that_is_stored(start):
    """A run that ends at once still delivers what an earlier one left, and what was put a moment before."""
    outbox = start(Broker(most=0))
    outbox.put(*(part(number) for number in range(50)))
    assert outbox.close(time.monotonic()).parts == 50
    broker = Broker(most=20)
    again = start(broker)
    again.put(part(50))
    over = threading.Event()
    kafka = threading.Thread(target=lambda: [broker.acknowledge() for _ in iter(lambda: over.wait(0.01), True)])
    kafka.start()
    assert again.close(time.monotonic() + WAIT_S) == outbox_module.Left()
    over.set()
    kafka.join()
    assert broker.values == [b"part %d" % number for number in range(51)]


@pytest.mark.parametrize("data", [b"", b"{}\n", b"[1,2,3,4]\n", b'["t","k",true,[["h",1]]]\n', b"[]", b"\xff"])
def test_a_record_of_another_version_is_left_out_and_holds_up_nobody(start, tmp_path, metrics, data):
    """What makes no sense is counted and gone; the events around it are delivered."""
    (tmp_path / "outbox").mkdir()
    journal = Journal(tmp_path / "outbox")
    journal.open()
    journal.append([(2, packed(part(1))), (2, data), (2, packed(part(2)))], 0)
    journal.close()
    broker = Broker()
    outbox = start(broker, max_age_h=1e9)
    wait(lambda: broker.values == [b"part 1", b"part 2"])
    broker.acknowledge()
    assert outbox.close(time.monotonic() + WAIT_S).events == 0
    assert metrics.snapshot().undelivered == 1


def test_no_more_is_under_way_than_kafka_has_room_for(start):
    """A backlog is read from disk piece by piece, in order."""
    broker = Broker(most=3)
    outbox = start(broker)
    outbox.put(*(part(number) for number in range(10)))
    for expected in (3, 6, 9, 10):
        wait(lambda many=expected: len(broker.events) == many)
        time.sleep(0.2)
        assert len(broker.events) == expected
        broker.acknowledge()
    assert broker.values == [b"part %d" % number for number in range(10)]


def test_on_a_full_disk_no_verdict_leaves_as_ok(full_disk, start, metrics, health):
    """Kafka is up: what goes out is the verdict that could not be stored, as UNINSPECTED, and readiness says why."""
    broker, told = Broker(), []
    outbox = start(broker, folder=full_disk)

    def otherwise():
        told.append("otherwise")
        return (uninspected(1),)

    outbox.put(part(1), final=partial(told.append, "final"), otherwise=otherwise)
    wait(lambda: broker.values == [b"uninspected 1"])
    assert told == ["otherwise"]
    assert health.missing() == ["outbox"]
    assert metrics.registry.get_sample_value("inspection_outbox_up") == 0
    assert metrics.registry.get_sample_value("inspection_outbox_failures_total") >= 1


def test_a_disk_that_is_freed_takes_what_was_held_and_is_ready_again(full_disk, start, health):
    """Both away, then room: what was held is stored as it is, done, and the next verdict leaves as it was given."""
    broker, told = Broker(most=0), []
    outbox = start(broker, folder=full_disk)
    for number in (1, 2):
        event = part(number)
        outbox.put(event, otherwise=lambda n=number: (part(n, value=b"uninspected %d" % n, done=told.clear),))
        wait(lambda: health.missing() == ["outbox"])
    (full_disk / "other").unlink()
    wait(lambda: health.missing() == [])
    outbox.put(part(3), otherwise=lambda: (uninspected(3),))
    wait(lambda: [event.value for event in read_stored(full_disk)] == [b"uninspected 1", b"uninspected 2", b"part 3"])
    broker.most = 10
    wait(lambda: broker.values == [b"uninspected 1", b"uninspected 2", b"part 3"])


def test_what_is_under_way_when_the_disk_is_freed_is_stored_and_not_sent_again(full_disk, start, health):
    """Events that were handed to Kafka from memory become durable, and Kafka gets each once."""
    broker = Broker()
    outbox = start(broker, folder=full_disk)
    outbox.put(part(1), otherwise=lambda: (uninspected(1),))
    wait(lambda: len(broker.events) == 1)
    (full_disk / "other").unlink()
    wait(lambda: health.missing() == [])
    assert [event.value for event in read_stored(full_disk)] == [b"uninspected 1"]
    outbox.put(part(2))
    wait(lambda: broker.values == [b"uninspected 1", b"part 2"])
    broker.acknowledge()
    assert outbox.close(time.monotonic() + WAIT_S) == outbox_module.Left()


def test_with_both_away_memory_is_bounded_and_what_it_cannot_hold_is_counted(full_disk, start, metrics, health):
    """Beyond the bound events are refused, counted as lost, and not done: their triggers are told to the next run."""
    told = []
    outbox = start(Broker(most=0), folder=full_disk, max_held=2)
    outbox.put(part(0))
    wait(lambda: health.missing() == ["outbox"])
    for number in range(1, 5):
        outbox.put(part(number, done=partial(told.append, number)))
    assert metrics.snapshot().undelivered == 3
    assert outbox.close(time.monotonic()).lost_parts == 2
    assert metrics.snapshot().undelivered == 5
    assert told == []


def test_the_bound_on_size_is_a_full_disk(start, tmp_path, health, metrics):
    """At `max_mb` verdicts are UNINSPECTED, nothing stored is thrown away, and it is over once Kafka has taken some."""
    broker = Broker(most=0)
    outbox = start(broker, max_mb=1, max_held=1000)
    count = 0
    while count < 110 or health.missing() != ["outbox"]:  # what goes to the disk as one may pass the bound unseen
        outbox.put(part(count, value=b"%d" % count + bytes(10_000)), otherwise=lambda n=count: (uninspected(n),))
        count += 1
        time.sleep(0.002 if count < 110 else 0.05)
        assert count < 500
    wait(lambda: metrics.registry.get_sample_value("inspection_outbox_fill_ratio") >= 1)
    stored = len(list(read_stored(tmp_path / "outbox")))
    broker.most = 1000
    wait(lambda: len(broker.events) == count)
    assert not any(value.startswith(b"uninspected") for value in broker.values[:stored])
    assert all(value.startswith(b"uninspected") for value in broker.values[stored:])
    broker.acknowledge()
    wait(lambda: health.missing() == [])


def test_the_alarm_comes_once_at_half_of_the_bound(start, metrics):
    """One line at 50 % of the bound, and a metric."""
    said = structlog.get_config()["processors"][0].entries
    said.clear()
    outbox = start(Broker(most=0), max_mb=1)
    for number in range(60):
        outbox.put(part(number, value=bytes(10_000)))
    wait(lambda: (metrics.registry.get_sample_value("inspection_outbox_fill_ratio") or 0) > 0.5)
    time.sleep(1.2)
    assert [entry["event"] for entry in said].count("outbox half full: Kafka does not take events") == 1


def test_a_clock_that_is_set_anew_makes_nothing_old(start, monkeypatch, health):
    """The clock jumps by a year: the bound on age is not reached by that."""
    outbox = start(Broker(most=0))
    outbox.put(part(1))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 365 * 86400)
    outbox.put(part(2))
    time.sleep(0.3)
    assert health.missing() == []


def test_a_folder_that_cannot_be_made_is_named_with_what_to_do(start, tmp_path):
    """A place that is a file is a fault of the line file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"outbox\.dir") as caught:
        start(Broker(), folder=tmp_path / "file" / "outbox")
    assert "null" in caught.value.hint


def test_without_a_folder_events_go_straight_to_kafka(metrics, health):
    """`dir: null`: the sink gets them at once, done when it says so, and what it has not confirmed is lost."""
    broker, told = Broker(), []
    outbox = Outbox(Settings(dir=None), broker, max_held=1, metrics=metrics, health=health)
    outbox.start()
    outbox.put(part(1, done=partial(told.append, 1)), part(2, done=partial(told.append, 2)), final=told.clear)
    assert broker.values == [b"part 1", b"part 2"]
    assert told == []
    broker.acknowledge()
    assert told == [1, 2]
    outbox.put(part(3))
    assert outbox.close(time.monotonic()).lost_parts == 1
    assert metrics.snapshot().undelivered == 1
