"""A part's trace through the real line, Triton and Kafka, as a collector gets it by OTLP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from line_process import LineProcess, received, wait_until
from otlp_receiver import ReceivedSpan, Receiver, receiver

pytestmark = pytest.mark.stack
PRODUCT = "fastener-tray"
PARTS = 6
STEPS = {"part", "capture", "queue", "inference", "judge", "outbox", "kafka"}


def pictures(folder: Path) -> Path:
    """Write soft random pictures."""
    folder.mkdir()
    rng = np.random.default_rng(3)
    for number in range(PARTS):
        grain = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"part-{number}.png"), cv2.resize(grain, (640, 480)))
    return folder


def test_one_trace_goes_from_camera_to_kafka_and_through_triton(
    stack: Any, make_stack: Callable[..., Any], line_file: Callable[..., Any], tmp_path: Path
) -> None:
    """Each part is a trace of the line's steps, which its verdict carries on; Triton's spans hang below its request.

    Triton sends its spans once: on a busy machine they do not all come, so the line may run thrice.
    """
    with receiver() as collector:
        triton = make_stack("--only", "triton", "--trace-url", collector.url)
        traced = set()
        for turn in range(3):
            made = line_file(
                stack,
                triton={"address": triton.endpoints["triton"]},
                batching={"max_size": 1},
                tracing={"address": collector.address, "share": 1},
                monitoring={"log_parts": True},
            )
            made.camera(type="folder", path=str(pictures(tmp_path / f"pictures-{turn}")), product=PRODUCT)
            calls = traced_requests(stack, made, collector)
            traced |= {call.trace for call in calls}
            with contextlib.suppress(AssertionError):
                wait_until(lambda calls=calls: heads(collector, calls), 15, "Triton's spans of a request")
                break
        found = heads(collector, calls)
        assert found
        assert {span.trace for span in collector.spans} == traced  # no probe of the server is traced
        for call, head in found:
            assert call.began_ns - 2_000_000 <= head.began_ns <= call.ended_ns


def traced_requests(stack: Any, made: Any, collector: Receiver) -> list[ReceivedSpan]:
    """Run the line and see its own steps in each part's trace; gives the spans of the requests to Triton."""
    with LineProcess(made.write()) as line:
        line.wait()
    assert line.exit_code == 0, line.log()
    events = received(stack.endpoints["kafka"], made.name, at_least=PARTS).events
    assert len(events) == PARTS
    calls = []
    for event in events:
        _, trace, parent, _ = event["attributes"]["traceparent"].split("-")
        assert trace == event["data"]["inspectionId"].replace("-", "")
        assert trace in line.log()
        steps = collector.of(trace)
        assert steps.keys() >= STEPS
        assert steps["part"].span == parent
        assert steps["part"].attributes["logicrd.part_id"] == event["data"]["partId"]
        within(steps)
        calls.append(steps["inference"])
    return calls


def tritons(collector: Receiver, call: ReceivedSpan) -> list[ReceivedSpan]:
    """The spans of a request's trace that the line did not send."""
    return [span for span in list(collector.spans) if span.trace == call.trace and span.service != "logicrd"]


def heads(collector: Receiver, calls: list[ReceivedSpan]) -> list[tuple[ReceivedSpan, ReceivedSpan]]:
    """Requests with the span that Triton made of each, where a request and a computation for each model hang below."""
    found = [(call, tritons(collector, call)) for call in calls]
    return [(call, span) for call, spans in found for span in spans if span.parent == call.span and len(spans) > 5]


def within(steps: dict[str, ReceivedSpan]) -> None:
    """Each step follows the one before, to the millisecond of the clocks' reading."""
    order = ["capture", "queue", "inference", "judge", "outbox"]
    for before, after in pairwise(order):
        assert steps[before].ended_ns <= steps[after].began_ns + 2_000_000, (before, after)
