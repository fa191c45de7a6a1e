"""Builders of the line's values for its unit tests: a frame, a manifest, a part verdict, each with telling defaults.

They are functions behind session fixtures, so that property tests may call them as often as they like.
"""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import yaml
from hypothesis import settings
from parts_bench import Bench

from pipeline.health import Health
from pipeline.inference import InferenceClient
from pipeline.manifest import Manifest
from pipeline.metrics import Metrics
from pipeline.servers import Triton as TritonSettings
from pipeline.stations import Station
from pipeline.types import (
    Frame,
    Inference,
    Judgement,
    Model,
    Part,
    PartVerdict,
    Scores,
    Threshold,
    ThresholdSource,
    Verdict,
    ViewVerdict,
)

# The gate gives the same answer twice: no random seed, no data base of earlier runs, no limit on a busy machine.
settings.register_profile("gate", derandomize=True, database=None, deadline=None)
settings.load_profile("gate")

SHA = "ab" * 32
WHEN = datetime(2026, 11, 23, 12, 0, 0, 123_000, tzinfo=UTC)


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    """Logs of expected faults go nowhere; what a test says of a log it captures itself."""
    structlog.configure(processors=[structlog.testing.LogCapture()])


@pytest.fixture(scope="session")
def manifest_document() -> Callable[..., dict[str, Any]]:
    """Give a manifest as JSON holds it; keywords replace its top keys."""

    def make(product: str = "tray", **keys: Any) -> dict[str, Any]:
        document: dict[str, Any] = {
            "schema_version": 1,
            "product": product,
            "method": "rd",
            "version": 1,
            "input": {"height": 256, "width": 256, "dtype": "uint8", "layout": "HWC", "colour": "RGB"},
            "preprocessing": "resize-area-v1",
            "map_shape": [64, 64],
            "calibration": {
                "fusion": {
                    "map_mean": 1.0,
                    "map_std": 0.5,
                    "mahalanobis_mean": 10.0,
                    "mahalanobis_std": 2.0,
                    "weight": 1.0,
                },
                "thresholds": {"ng": 3.0, "review": 2.0},
                "heatmap": {"limit": 1.0, "low": 0.0, "high": 2.0},
            },
            "model_sha256": SHA,
        }
        return document | keys

    return make


@pytest.fixture(scope="session")
def make_manifest(manifest_document: Callable[..., dict[str, Any]]) -> Callable[..., Manifest]:
    """Give a manifest; keywords replace its top keys."""
    return lambda product="tray", **keys: Manifest.model_validate_json(json.dumps(manifest_document(product, **keys)))


@pytest.fixture(scope="session")
def make_frame() -> Callable[..., Frame]:
    """Give a frame of camera `c1`; keywords replace its fields."""

    def make(**fields: Any) -> Frame:
        captured_s = fields.get("captured_s", time.monotonic())
        number = fields.get("number", 1)
        frame = Frame(
            camera_id="c1",
            station="s1",
            product="tray",
            number=number,
            part_id=f"part-{number}",
            part_id_source="sei",
            captured_at=WHEN,
            captured_s=captured_s,
            deadline_s=captured_s + 2.0,
            image=np.zeros((4, 4, 3), np.uint8),
        )
        return replace(frame, **fields)

    return make


@pytest.fixture(scope="session")
def make_view(make_frame: Callable[..., Frame]) -> Callable[..., ViewVerdict]:
    """Give an NG view of 150 ms; keywords replace fields of the view, `frame_fields` those of its frame."""

    def make(frame_fields: dict[str, Any] | None = None, **fields: Any) -> ViewVerdict:
        frame = make_frame(**(frame_fields or {}))
        inference = Inference(
            frame,
            scores=Scores(fused=3.5, map=2.0, mahalanobis=11.0),
            model=Model("tray", "1", SHA),
            sent_s=frame.captured_s + 0.02,
            received_s=frame.captured_s + 0.14,
        )
        threshold = Threshold(3.0, 2.0, 7, ThresholdSource.REDIS, SHA)
        verdict = Verdict(Judgement.NG, ("score_above_ng", "anomaly_map"), threshold)
        return replace(ViewVerdict(frame, inference, verdict, decided_s=frame.captured_s + 0.15), **fields)

    return make


@pytest.fixture(scope="session")
def make_part(make_view: Callable[..., ViewVerdict]) -> Callable[..., PartVerdict]:
    """Give the verdict of a part that is this one view (default: an NG view); keywords replace fields of the part."""

    def make(view: ViewVerdict | None = None, **fields: Any) -> PartVerdict:
        view = view or make_view()
        frame = view.frame
        part = Part(
            frame.station,
            frame.part_id,
            frame.part_id_source,
            frame.product,
            frame.captured_at,
            frame.captured_s,
            frame.deadline_s,
            camera_id=frame.camera_id,
        )
        verdict = view.verdict
        made = PartVerdict(part, 1, verdict.judgement, verdict.reasons, (view,), (), view.decided_s)
        return replace(made, **fields)

    return make


@pytest.fixture
def bench(make_frame: Callable[..., Frame], make_view: Callable[..., ViewVerdict]) -> Callable[..., Bench]:
    """Give the parts of station s1, set to these keys of a `Station`; without any, each frame is a part."""
    return lambda **plan: Bench(make_frame, make_view, Station(name="s1", **plan) if plan else None)


@pytest.fixture
def failed_start(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Collect the sockets that a Kafka client leaves behind, unclosed by the library, when its first connection fails.

    Its log stays off meanwhile, as in the line: the records kept for a test's report would hold on to those sockets.
    A test that uses this also ignores ResourceWarning, in case they are collected while it runs.
    """
    with caplog.at_level(logging.CRITICAL, logger="kafka"):
        yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def models_repo(tmp_path: Path, manifest_document: Callable[..., dict[str, Any]]) -> Path:
    """A model repository of two products that holds their manifests only."""
    for product in ("tray", "cable-set"):
        folder = tmp_path / "models_repo" / product
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps(manifest_document(product)))
    return tmp_path / "models_repo"


@pytest.fixture
def line_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a line file of one folder camera; keywords replace its top keys. Its servers are ports that refuse."""

    def write(**keys: Any) -> Path:
        document = {
            "line": "l1",
            "cameras": [{"id": "c1", "type": "folder", "product": "tray", "path": "pictures"}],
            "triton": {"address": "127.0.0.1:9", "startup_timeout_s": 0.01},
            "kafka": {"bootstrap": ["127.0.0.1:9"], "startup_timeout_s": 0.01},
            "redis": {"url": "redis://127.0.0.1:9/0"},
        } | keys
        path = tmp_path / "line.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    return write


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB of its own, in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def client(make_manifest: Callable[..., Manifest]) -> Iterator[InferenceClient]:
    """A client of a server that refuses every connection."""
    settings = TritonSettings(address="127.0.0.1:9", startup_timeout_s=0.01)
    client = InferenceClient(settings, {"tray": make_manifest()}, metrics=Metrics(), health=Health())
    yield client
    client.close()
