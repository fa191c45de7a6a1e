"""The live table: what an operator reads in it."""

import io

from rich.console import Console

from pipeline.metrics import Metrics
from pipeline.screen import draw, frame_rates, verdict_line
from pipeline.types import CameraState, Cause, Judgement


def text_of(metrics, rates=None):
    console = Console(width=200, file=io.StringIO())
    console.print(draw(metrics.snapshot(), rates or {}, elapsed_s=12.0))
    return console.file.getvalue()


def test_a_line_before_its_first_frame():
    """A camera is shown before it gave anything, without figures that are not there."""
    metrics = Metrics()
    metrics.camera("cam-1", product="tray", station="s1")
    text = text_of(metrics)
    assert "cam-1" in text
    assert "connecting" in text
    assert "p50 - ms" in text


def test_what_went_wrong_is_in_the_table(make_part):
    """A lost camera's reason, every kind of verdict, open parts and lost verdicts are all shown."""
    metrics = Metrics()
    metrics.camera("cam-1", product="tray", station="s1")
    metrics.camera_state("cam-1", CameraState.LOST, "timeout")
    for judgement, count in zip(Judgement, (11, 22, 33, 44), strict=True):
        for _ in range(count):
            metrics.triggered("s1", 1)
            metrics.view("cam-1", judgement, Cause.DEADLINE if judgement == "UNINSPECTED" else None, 0.1)
            metrics.verdict(make_part(judgement=judgement))
    metrics.triggered("s1", 1)
    metrics.queued("cam-1", 7)
    metrics.undelivered(2, parts=1)
    text = text_of(metrics, {"cam-1": 4.56})
    (row,) = [line.replace("│", " ").split() for line in text.splitlines() if "cam-1" in line]
    assert row == ["cam-1", "tray", "lost", "(timeout)", "4.6", "11", "22", "33", "44", "100", "100", "7"]
    assert "parts 111   open 1   acknowledged by Kafka 0   lost 1" in text


def test_rates_are_of_the_cameras_that_are_there():
    """Cameras that came or went between two looks have no rate, and do not disturb that of the others."""
    metrics = Metrics()
    for name in ("gone", "stays"):
        metrics.camera(name, product="tray", station="s1")
    before = metrics.snapshot()
    metrics.retire("gone")
    metrics.camera("new", product="tray", station="s1")
    for name in ("stays", "new", "new"):
        metrics.frame(name)
    assert frame_rates(before, metrics.snapshot(), 0.5) == {"stays": 2.0, "new": 0.0}


def test_a_verdict_names_its_missing_views():
    """One line tells part, verdict, reasons and the cameras whose view did not come."""
    data = {"partId": "p-7", "verdict": "UNINSPECTED", "reasonCodes": ["deadline"], "sequence": 3, "views": []}
    data |= {"threshold": None, "missingViews": [{"cameraId": "cam-2", "required": True, "cause": "deadline"}]}
    event = {"attributes": {"time": "2026-11-23T12:00:01.500Z"}, "data": data, "key": "l1/s1"}
    line = verdict_line(event)
    assert line.split() == [
        "12:00:01.500",
        "l1/s1",
        "#3",
        "UNINSPECTED",
        "p-7",
        "score",
        "-",
        "/",
        "-",
        "deadline,cam-2",
        "missing",
    ]
