"""A worker's word on itself, and its budget: heartbeats on the real topic, verdicts on time beside a hung Triton."""

from __future__ import annotations

import queue
import sys
import time
from typing import Any
from uuid import uuid4

import cv2
import numpy as np
import pytest
from line_process import LineProcess, received, stopped, wait_until
from tritonclient.grpc import InferenceServerClient, InferInput

from pipeline.servers import Kafka
from pipeline.tail import VerdictReader, camera_states

pytestmark = pytest.mark.stack


def heartbeats(kafka: str, line: str) -> list[dict[str, Any]]:
    """The heartbeats of a line, oldest first, with their keys."""
    with VerdictReader(Kafka(bootstrap=[kafka]), topic="status.v1", start="first") as reader:
        events = [event for event in reader.read_to_end() if event["attributes"]["type"].endswith(".heartbeat.v1")]
    return [{**event["data"], "key": event["key"]} for event in events if event["data"]["line"] == line]


@pytest.fixture
def made(stack, line_file, products, tmp_path) -> Any:
    """A line with one folder camera at 5 frames/s, a budget of 1 s, a heartbeat every 0.5 s."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(20):
        grain = np.random.default_rng(number).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        cv2.imwrite(str(pictures / f"part-{number:02d}.png"), cv2.resize(grain, (640, 480)))
    made = line_file(stack, budget_ms=1000, monitoring={"heartbeat_s": 0.5})
    made.name = f"line-{uuid4().hex[:12]}"
    return made.camera(
        type="folder",
        path=str(pictures),
        product=products[0],
        rate=5,
        loop=True,
        overflow="drop_oldest",
        queue_frames=64,
    )


def test_uninspected_goes_out_on_time_while_triton_hangs(made, stack):
    """Triton stopped (SIGSTOP): every part captured meanwhile is told as UNINSPECTED, each within its budget and half a
    second, in order, none twice; heartbeats go on meanwhile and the last one says that the worker ended on purpose."""
    kafka = stack.endpoints["kafka"]
    with LineProcess(made.write()) as line:
        wait_until(lambda: len(received(kafka, made.name).events) > 5, 90, "a running line")
        with stopped(stack.pid("triton")):
            before = len(heartbeats(kafka, made.name))
            time.sleep(6)
            during = len(heartbeats(kafka, made.name))
        summary = line.stop()
    verdicts = received(kafka, made.name, at_least=summary["triggered"])
    assert (len(verdicts.events), verdicts.duplicates, verdicts.in_order()) == (summary["triggered"], 0, True)
    late = [event["data"] for event in verdicts.events if "deadline" in event["data"]["reasonCodes"]]
    assert len(late) >= 10
    overrun_ms = sorted(data["timing"]["decidedMs"] - data["timing"]["budgetMs"] for data in late)
    told = f"after it by p50 {overrun_ms[len(late) // 2]:.0f} ms, max {overrun_ms[-1]:.0f} ms"
    sys.stdout.write(f"{len(late)} verdicts at their deadline, {told}\n")
    assert overrun_ms[-1] < 500
    assert during > before
    said = heartbeats(kafka, made.name)
    assert said[-1]["state"] == "stopping"
    assert len({each["key"] for each in said}) == 1
    running = said[len(said) // 2]
    assert {"judge", "dispatcher", "publisher", "thresholds", "camera cam-1"} <= {
        each["name"] for each in running["stages"]
    }
    assert [camera["state"] for camera in running["cameras"]] == ["streaming"]
    assert all(model["thresholdSource"] for model in running["models"])
    assert camera_states(Kafka(bootstrap=[kafka]), f"/site/area/{made.name}").keys() == {"cam-1"}


def test_calls_that_are_given_up_go_no_further_in_triton(stack, products):
    """Of 24 batches whose caller gives up after 0.3 s most are never computed to the end."""
    client = InferenceServerClient(stack.endpoints["triton"])
    metadata = client.get_model_metadata(products[0], as_json=True)
    height, width = (int(size) for size in metadata["inputs"][0]["shape"][1:3])
    picture = np.zeros((8, height, width, 3), np.uint8)
    tensor = InferInput("image", list(picture.shape), "UINT8")
    tensor.set_data_from_numpy(picture)
    answers: queue.Queue[Any] = queue.Queue()

    def answered(result: Any, error: Any) -> None:
        del result
        answers.put(error)

    before = computed(client, f"{products[0]}.map")
    for _ in range(24):
        client.async_infer(products[0], [tensor], answered, client_timeout=0.3)
    errors = [error for error in (answers.get(timeout=120) for _ in range(24)) if error is not None]
    assert len(errors) > 12
    client.infer(products[0], [tensor])  # waits behind what is still computed
    assert computed(client, f"{products[0]}.map") - before < 12
    client.close()


def computed(client: InferenceServerClient, model: str) -> int:
    """Batches that a model has computed since the server's start."""
    stats = client.get_inference_statistics(model, as_json=True)["model_stats"]
    return sum(int(one.get("execution_count", 0)) for one in stats)
