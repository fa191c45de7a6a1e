"""Traces of parts, up to a collector that speaks OTLP."""

import socket
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import structlog
from line_process import wait_until
from otlp_receiver import receiver
from redis_server import make_certificates

from pipeline.errors import ConfigError
from pipeline.events import Encoder, Place, decode
from pipeline.metrics import Metrics
from pipeline.servers import Tracing as TracingSettings
from pipeline.tracing import Tracing, span_id_of, spans_of, trace_id_of
from pipeline.types import Cause, Inference, Judgement, Verdict

PLACE = Place("site", "area", "l1", worker="w1", budget_ms=2000.0)
AT = datetime(2026, 11, 23, 12, 0, 1, 500_000, tzinfo=UTC)


def traces(address="127.0.0.1:9", share=1.0):
    return Tracing(TracingSettings(address=address, share=share), PLACE, Metrics())


def exporting():
    return [thread for thread in threading.enumerate() if thread.name.startswith("Otel")]


@pytest.fixture
def traced(make_frame, make_view, make_part):
    """Give a part of now that went all the way: captured 0.2 s ago, asked for at 0.1 s."""

    def make(number=1, request=None):
        now_s = time.monotonic()
        frame = make_frame(number=number, captured_s=now_s - 0.2, ready_s=now_s - 0.18)
        whole = make_view(frame=frame)
        answer = replace(whole.inference, sent_s=now_s - 0.1, received_s=now_s - 0.02, request=request)
        return make_part(replace(whole, inference=answer, decided_s=now_s - 0.01), decided_s=now_s - 0.01)

    return make


def test_a_share_of_the_parts_is_traced_and_the_same_for_every_worker(make_part):
    """About a tenth of them, drawn by their inspection ids; none at 0, all at 1."""
    part = make_part().part
    tracing = traces(share=0.1)
    contexts = [tracing.of_part(replace(part, part_id=f"part-{number}")) for number in range(3000)]
    known = [context for context in contexts if context is not None]
    assert 200 < len(known) < 400
    assert contexts == [traces(share=0.1).of_part(replace(part, part_id=f"part-{number}")) for number in range(3000)]
    assert traces(share=0).of_part(part) is None
    assert traces(share=1).of_part(part) is not None


def test_a_part_becomes_a_trace_at_the_collector(traced):
    """By OTLP: the steps from camera to Kafka below one root, in the order and with the lengths of what happened."""
    part = traced()
    with receiver() as collector:
        tracing = traces(collector.address.replace("127.0.0.1", "localhost"))
        tracing.start()
        context = tracing.of_part(part.part)
        event = Encoder(PLACE, "binary").part(part, decided_at=AT, trace=context)[-1]
        tracing.stored(part)
        tracing.acknowledged(event, time.monotonic() - 0.005)
        tracing.close(10.0)
        trace = context.split("-")[1]
        assert trace == decode(event.value, dict(event.headers))["data"]["inspectionId"].replace("-", "")
        found = collector.of(trace)
    root = found["part"]
    assert found.keys() == {"part", "capture", "queue", "inference", "judge", "outbox", "kafka"}
    assert (root.parent, root.span, root.service) == ("", context.split("-")[2], "logicrd")
    assert {span.parent for span in found.values()} == {"", root.span}
    assert found["inference"].span == tracing.of_request(part.part, part.views[0].frame).split("-")[2]
    assert root.attributes["logicrd.part_id"] == "part-1"
    assert root.attributes["logicrd.causes"] == ["score_above_ng", "anomaly_map"]
    lengths = {name: (span.ended_ns - span.began_ns) / 1e6 for name, span in found.items()}
    expected = {"capture": 20, "queue": 80, "inference": 80, "judge": 10}
    assert {name: lengths[name] for name in expected} == pytest.approx(expected, abs=2)
    assert abs(root.began_ns / 1e9 + 0.2 - time.time()) < 30
    assert root.began_ns <= found["capture"].began_ns + 2e6


def test_a_part_that_was_not_judged_says_so(traced, make_part):
    """Of a view that never got to Triton there is what happened to it, and the root is an error."""
    part = traced()
    view = part.views[0]
    lost = replace(
        view,
        inference=Inference(view.frame, cause=Cause.QUEUE_FULL),
        verdict=Verdict(Judgement.UNINSPECTED, ("queue_full",)),
    )
    part = make_part(lost, judgement=Judgement.UNINSPECTED, reasons=("queue_full",))
    spans = {span.name: span for span in spans_of(part, 7, part.decided_s)}
    assert spans.keys() == {"part", "capture", "outbox"}
    assert [span.name for span in spans.values() if span.is_error] == ["part"]


def test_a_frame_whose_batch_carries_another_trace_names_it(traced):
    """Triton's spans hang below the first traced frame of a batch; the others link to that one's request."""
    first = traced(1)
    request = traces().of_request(first.part, first.views[0].frame)
    same, other = (
        next(span for span in spans_of(traced(number, request), trace_id_of(trace), 0.0) if span.name == "inference")
        for number, trace in ((1, request.split("-")[1]), (2, "ff" * 16))
    )
    assert (same.link, other.link) == (None, request)


@pytest.mark.parametrize("mode", ["binary", "structured"])
def test_the_context_goes_with_the_verdict(traced, mode):
    """As CloudEvents' attribute and as the header that tracers look for; without a trace, neither is there."""
    context = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
    for event in Encoder(PLACE, mode).part(traced(), decided_at=AT, trace=context):
        assert decode(event.value, dict(event.headers))["attributes"]["traceparent"] == context
        assert dict(event.headers)["traceparent"] == context.encode()
    for event in Encoder(PLACE, mode).part(traced(), decided_at=AT):
        assert "traceparent" not in decode(event.value, dict(event.headers))["attributes"]
        assert "traceparent" not in dict(event.headers)


def test_the_collector_is_known_by_its_certificate(traced, tmp_path):
    """By TLS with the authority of the line file; one of another authority gets nothing."""
    made = make_certificates(tmp_path)
    with receiver((made.server_key.read_bytes(), made.server_crt.read_bytes())) as collector:
        for authority, came in ((made.other_crt, 0), (made.ca_crt, 6)):
            settings = TracingSettings(address=collector.address, tls={"ca_file": authority}, share=1)
            tracing = Tracing(settings, PLACE, Metrics())
            tracing.start()
            tracing.stored(traced())
            tracing.close(10.0 if came else 1.0)
            assert len(collector.spans) == came
    with pytest.raises(ConfigError, match=r"tracing\.tls"):
        Tracing(TracingSettings(address="h:1", tls={"ca_file": tmp_path / "none"}), PLACE, Metrics()).start()


def test_a_collector_that_is_away_costs_spans_and_nothing_else(traced):
    """Nobody waits for it, the log says it once, the spans are counted, and the end is bounded."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    tracing = traces(f"127.0.0.1:{port}")
    with structlog.testing.capture_logs() as said:
        tracing.start()
        for number in range(1, 200):
            tracing.stored(traced(number))
        lost = {"fate": "lost"}
        count = tracing._metrics.registry.get_sample_value
        wait_until(lambda: count("inspection_spans_total", lost), 60, "spans counted as lost")
        began_s = time.monotonic()
        tracing.close(0.2)
        assert time.monotonic() - began_s < 5
        wait_until(lambda: not exporting(), 30, "the end of its thread")
    assert [each["log_level"] for each in said if "collector" in each["event"]] == ["warning"]


def test_without_the_packages_the_line_does_not_start(monkeypatch):
    """The message names what to install."""
    monkeypatch.delitem(sys.modules, "pipeline.otlp", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match="opentelemetry") as caught:
        traces().start()
    assert "logicrd[tracing]" in caught.value.hint


def test_names_of_spans_differ_and_stay():
    """A span's id follows from its trace and its name."""
    ids = {span_id_of(trace, name) for trace in (1, 2) for name in ("part", "kafka", "judge/c1/1", "judge/c1/2")}
    assert len(ids) == 8
    assert ids == {
        span_id_of(trace, name) for trace in (1, 2) for name in ("part", "kafka", "judge/c1/1", "judge/c1/2")
    }
