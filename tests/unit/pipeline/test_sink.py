"""The way to Kafka, as far as it goes without a broker: the bound, the counts, and a broker that is not there."""

import time

import pytest

from pipeline.errors import DependencyError
from pipeline.events import Encoder, Event, Place
from pipeline.health import Health
from pipeline.metrics import Metrics
from pipeline.servers import Kafka as KafkaSettings
from pipeline.sink import Sink

VIEW = Event("view.v1", b"l1/s1", b"{}", ())
PART = Event("verdict.v1", b"l1/s1", b"{}", (), is_part=True)


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def health():
    return Health()


@pytest.fixture
def make_sink(metrics, health):
    """Give a sink whose broker refuses every connection; keywords are its settings."""

    def make(**settings):
        values = {"bootstrap": ["127.0.0.1:9"], "startup_timeout_s": 0.05} | settings
        encoder = Encoder(Place("site", "area", "l1", "w1", 1000.0), "binary")
        return Sink(KafkaSettings(**values), encoder=encoder, metrics=metrics, health=health)

    return make


@pytest.mark.usefixtures("failed_start")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_broker_that_is_not_there_is_named(make_sink):
    """A broker that does not answer stops the start with its address and what to do."""
    with pytest.raises(DependencyError, match=r"127\.0\.0\.1:9") as caught:
        make_sink().start()
    assert "kafka.bootstrap" in caught.value.hint


@pytest.mark.usefixtures("failed_start")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_broker_that_may_be_away_holds_no_start_up(make_sink, health):
    """Where Kafka is not required at the start, readiness waits for it; what was put is given back at the end."""
    sink = make_sink(required_at_start=False)
    sink.start()
    assert health.missing() == ["kafka"]
    sink.put(PART)
    assert sink.close(time.monotonic() + 0.1) == [PART]


def test_events_beyond_the_bound_are_refused_and_counted(make_sink, metrics):
    """What does not fit is lost at once, counted as the parts that it was, and `put` never blocks."""
    sink = make_sink(max_unacknowledged=3)
    for _ in range(3):
        sink.put(VIEW, PART)
    assert metrics.snapshot().undelivered == 2
    assert metrics.registry.get_sample_value("inspection_events_total", {"fate": "undelivered"}) == 3
    assert metrics.registry.get_sample_value("inspection_events_unacknowledged") == 3


def test_what_was_never_confirmed_is_given_back_at_the_end(make_sink, metrics):
    """`close` waits no longer than it may, and gives the events that Kafka has not confirmed, in order."""
    sink = make_sink()
    sink.put(VIEW, PART)
    sink.put(VIEW, PART)
    assert sink.close(time.monotonic() + 0.02) == [VIEW, PART, VIEW, PART]
    assert metrics.snapshot().acknowledged == 0


@pytest.mark.usefixtures("failed_start")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_empty_sink_closes_at_once(make_sink, metrics):
    """Nothing to deliver is nothing lost, also when the start had failed."""
    sink = make_sink()
    with pytest.raises(DependencyError):
        sink.start()
    assert sink.close(time.monotonic() + 60.0) == []
    assert metrics.snapshot().undelivered == 0
