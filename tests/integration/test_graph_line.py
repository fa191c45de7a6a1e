"""A line whose graph scores (`inference: graph`), with a stand-in for DeepStream and the real rest: what leaves it.

The stand-in (`graph_stand_in.py`) sits below our own graph process and asks the real Triton.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from line_process import LineProcess, children, received, wait_until

from pipeline.servers import Kafka
from pipeline.tail import VerdictReader

pytestmark = pytest.mark.stack

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [str(ROOT / "tests/graph_line.py")]
PICTURES = 8
TOLERANCE = 1e-4
"""Of a fused score: the client's batches have other sizes."""


@pytest.fixture
def pictures(products, tmp_path):
    """A folder of PNG files for each of two products, good parts and bad ones."""
    folders = {}
    for product in products[:2]:
        folders[product] = tmp_path / product
        folders[product].mkdir()
        parts = sorted((ROOT / "deploy/local/parts" / product).glob("*.jpg"))
        for number, path in enumerate(parts[:: len(parts) // PICTURES][:PICTURES]):
            cv2.imwrite(str(folders[product] / f"{number}.png"), cv2.imread(str(path)))
    return folders


def graph_camera(made, product, folder, **keys):
    url = f"rtsp://127.0.0.1{folder}"
    about = {"type": "rtsp", "decoder": "deepstream", "inference": "graph", "url": url, "connect_timeout_s": 30}
    return made.camera(product=product, **about | {"station": product} | keys)


def losses(kafka, made, camera):
    """The reasons for which a camera was lost, in order."""
    with VerdictReader(Kafka(bootstrap=[kafka]), topic="status.v1", start="first") as reader:
        events = [event for event in reader.read_to_end() if event["attributes"]["source"].endswith(f"/{made.name}")]
    told = (event["data"] for event in events if event["data"].get("cameraId") == camera)
    return [data["reason"] for data in told if data["state"] == "lost"]


def told(verdicts, station):
    """What each part of a station was given: verdict, reasons, scores, regions; in order."""
    parts = [event["data"] for event in verdicts.events if event["data"]["station"] == station]
    return [
        (part["verdict"], part["reasonCodes"], part["views"][0]["scores"], part["views"][0]["regions"])
        for part in sorted(parts, key=lambda part: part["sequence"])
    ]


def graph_process(line):
    """The graph's process of a line; None while there is none."""
    found = [pid for pid in children(line.pid) if b"graph_stand_in" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found[0] if found else None


def test_a_graph_gives_the_verdicts_that_the_client_gives(stack, line_file, pictures, tmp_path):
    """The same pictures of two products through graphs and through Triton's client: verdict, reasons, score and regions
    are the same part by part; every frame is one verdict, those in a graph at the end included; NG parts have their
    heat map. A camera that sends nothing is lost by itself, with a reason.
    """
    kafka, silent = stack.endpoints["kafka"], tmp_path / "silent"
    silent.mkdir()
    made = line_file(stack, evidence={"dir": str(tmp_path / "kept"), "keep": "all"})
    for product, folder in pictures.items():
        graph_camera(made, product, folder, picture_size=[640, 480])
    graph_camera(made, product, silent, station="silent", connect_timeout_s=4, read_timeout_s=1)
    with LineProcess(made.write(), program=PROGRAM) as line:
        wait_until(lambda: losses(kafka, made, "cam-3"), 60, "a loss of the silent camera")
        wait_until(lambda: len(received(kafka, made.name).events) >= 3 * PICTURES, 60, "verdicts of both graphs")
        summary = line.stop()
    graphs = received(kafka, made.name, at_least=summary["triggered"])
    assert (len(graphs.events), graphs.duplicates, graphs.in_order()) == (summary["triggered"], 0, True)
    assert (graphs.causes, summary["undelivered"], line.exit_code) == ({}, 0, 0)
    assert [losses(kafka, made, f"cam-{number}") for number in (1, 2, 3)] == [[], [], ["timeout"]]

    made.name, made.cameras = f"{made.name[:50]}-client", []
    for product, folder in pictures.items():
        made.camera(type="folder", path=str(folder), product=product, station=product)
    with LineProcess(made.write()) as line:
        line.wait()
    client = received(kafka, made.name, at_least=2 * PICTURES)
    for product in pictures:
        expected, given = told(client, product), told(graphs, product)
        assert len(expected) == PICTURES
        assert len(given) >= PICTURES
        for number, (verdict, reasons, scores, regions) in enumerate(given):
            same = expected[number % PICTURES]
            assert (verdict, reasons) == same[:2]
            assert scores == pytest.approx(same[2], abs=TOLERANCE)
            assert [region["bbox"] for region in regions] == [region["bbox"] for region in same[3]]
    kinds = {verdict for product in pictures for verdict, *_ in told(client, product)}
    assert kinds >= {"OK", "NG"}
    views = [event["data"]["views"][0] | event["data"] for event in graphs.events]
    assert {view["partIdSource"] for view in views} == {"generated"}
    assert {view["imageRef"] is not None for view in views if view["verdict"] == "NG"} == {True}
    shown = next(tmp_path / "kept" / view["imageRef"] for view in views if view["verdict"] == "NG" and view["regions"])
    assert np.ptp(cv2.imread(str(shown))[:300]) > 50


def test_a_graph_that_dies_or_hangs_says_so_and_starts_anew(stack, line_file, products, pictures):
    """kill -9 is `capture_died`, a stopped process is `timeout`; each time another process scores again, and every
    frame that had gone in has one verdict with a cause.
    """
    kafka = stack.endpoints["kafka"]
    made = line_file(stack, budget_ms=4000)
    graph_camera(made, products[0], pictures[products[0]], read_timeout_s=3)
    with LineProcess(made.write(), program=PROGRAM) as line:
        for fault in (signal.SIGKILL, signal.SIGSTOP, None):
            before = len(received(kafka, made.name).events)
            wait_until(lambda seen=before: len(received(kafka, made.name).events) > seen + 3, 60, f"before {fault}")
            if fault is not None:
                pid = graph_process(line)
                os.kill(pid, fault)
                wait_until(lambda old=pid: graph_process(line) not in (None, old), 60, "another process")
        summary = line.stop()
    verdicts = received(kafka, made.name, at_least=summary["triggered"])
    assert (len(verdicts.events), verdicts.duplicates, verdicts.in_order()) == (summary["triggered"], 0, True)
    assert set(verdicts.causes) <= {"triton_unavailable", "deadline"}
    assert verdicts.events[-1]["data"]["verdict"] != "UNINSPECTED"
    assert losses(kafka, made, "cam-1") == ["capture_died", "timeout"], line.log()


def test_check_says_that_deepstream_is_there_and_where_limits_come_from(stack, line_file, products, pictures):
    """Where DeepStream's Python finds all it needs, that is good; that the graph's limits are its own is to look at."""
    made = line_file(stack)
    graph_camera(made, products[0], pictures[products[0]])
    program = (
        "import sys; from pathlib import Path; from pipeline import cli, deepstream;"
        "deepstream.PYTHON = Path('/bin/true'); cli.main()"
    )
    command = [sys.executable, "-c", program, "check", "--json", "-c", str(made.write())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert "DeepStream (pyservicemaker), CuPy and the GPU's driver" in answer["checked"]
    assert [doubt for doubt in answer["doubts"] if f"suggest {products[0]} --reviewed" in doubt]
