"""The life of a version on the real Triton: model control behind a key, a trial, the switch, the way back.

Two servers of this module's own, in the mode `explicit`, serve a copy of the shipped product; a line's own client asks
them all the while.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import redis
from exported import PRODUCT, export, graph, heavier, shipped
from line_process import LineProcess, received, wait_until
from signers import make_keys

from pipeline.errors import CheckError, ConfigError, DependencyError
from pipeline.health import Health
from pipeline.inference import InferenceClient
from pipeline.manifest import Manifest, read_manifest
from pipeline.metrics import Metrics
from pipeline.model_control import ModelControl
from pipeline.model_repository import ModelRepository
from pipeline.promotion import promote, rollback, stop_trial, try_beside
from pipeline.servers import Triton
from pipeline.signatures import sign
from pipeline.types import Batch, Frame, Inference

pytestmark = pytest.mark.stack

STACK = Path(__file__).parents[2] / "deploy/local/stack.py"
NOW, NEXT, BROKEN = (shipped()["version"] + step for step in range(3))
BUDGET_S = 60.0
PICTURE = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Two servers of the product with a key, and a store beside what they serve."""
    folder = tmp_path_factory.mktemp("models")
    private, signer = make_keys(folder, "signer")
    sign(export(folder / "served", NOW, lambda _, content: content) / "manifest.json", private)
    (folder / "key").write_text("sesame\n")
    addresses = [start(folder, name) for name in ("first", "second")]
    settings = Triton(address=addresses, models_repo=folder / "served", control_key_file=folder / "key")
    repository = ModelRepository(folder / "served", folder / "store")
    yield SimpleNamespace(folder=folder, settings=settings, repository=repository, private=private, signer=signer)
    for name in ("first", "second"):
        stop(folder, name)


def start(folder: Path, name: str) -> str:
    """Start one of the two servers of the same folder; its address."""
    options = ["--only", "triton", "--free-ports", "--json", "--control-key-file", str(folder / "key")]
    options += ["--models", str(folder / "served"), "--state-dir", str(folder / name)]
    subprocess.run([sys.executable, str(STACK), "up", *options], check=True, timeout=150, stdout=subprocess.DEVNULL)
    return json.loads((folder / name / "state.json").read_text())["endpoints"]["triton"]


def stop(folder: Path, name: str) -> None:
    command = [sys.executable, str(STACK), "down", "--state-dir", str(folder / name)]
    subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)


class Worker:
    """A line's client, which has read the manifest when it was made; asks without a pause until `stop`."""

    def __init__(self, settings: Triton, manifest: Manifest | None = None) -> None:
        manifest = manifest or read_manifest(settings.models_repo, PRODUCT)
        self._client = InferenceClient(settings, {PRODUCT: manifest}, metrics=Metrics(), health=Health())
        self._client.start()
        self.answers: list[Inference] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.05):  # refused replicas answer at once
            done = threading.Event()

            def answered(inferences: list[Inference], done: threading.Event = done) -> None:
                self.answers += inferences
                done.set()

            self._client.submit(Batch(PRODUCT, (_frame(),)), answered)
            done.wait(70)

    def stop(self) -> list[Inference]:
        self._stop.set()
        self._thread.join(80)
        self._client.close()
        return self.answers


def _frame() -> Frame:
    now_s = time.monotonic()
    return Frame(
        "cam", "station", PRODUCT, 1, "part", "file", datetime.now(UTC), now_s, now_s + BUDGET_S, image=PICTURE
    )


def score(settings: Triton) -> tuple[str, float]:
    """Version and score of one picture, as a worker that starts now gets them."""
    worker = Worker(settings)
    wait_until(lambda: bool(worker.answers), 60, "an answer")
    first = worker.stop()[0]
    assert first.model is not None
    assert first.scores is not None
    return first.model.version, first.scores.fused


def change(place: SimpleNamespace, what: Any, *arguments: Any) -> None:
    with place.repository.locked(), ModelControl(place.settings) as control:
        what(place.repository, control, PRODUCT, *arguments, by="anna", reason="test")


def triton_of(place: SimpleNamespace) -> dict[str, Any]:
    """Triton in the line file of a worker that takes what is signed alone."""
    addresses, models = place.settings.address, place.settings.models_repo
    folders = {"models_repo": str(models), "model_store": str(place.folder / "store")}
    return {"address": addresses, **folders, "signer_file": str(place.signer)}


def push(place: SimpleNamespace, folder: Path) -> None:
    with place.repository.locked():
        place.repository.push(folder)


def pictures(folder: Path) -> Path:
    """A folder of soft random pictures."""
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        grain = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"pictures/part-{number}.png"), cv2.resize(grain, (320, 240)))
    return folder / "pictures"


def files_of(folder: Path) -> dict[Path, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path: path.read_bytes() for path in found}


def test_a_version_is_served_and_taken_back(place: SimpleNamespace) -> None:
    """A pushed version changes nothing; promoted, its scores are served; a worker of the old manifest, whether it was
    there before or comes just then, gets the old scores all the while; rolled back, they are served to all."""
    before = score(place.settings)
    assert before[0] == str(NOW)
    manifest = read_manifest(place.settings.models_repo, PRODUCT)
    push(place, heavier(place.folder / "export", NEXT))
    assert score(place.settings) == before
    worker = Worker(place.settings)
    change(place, promote, NEXT)
    late = Worker(place.settings, manifest)
    count = len(worker.answers)
    wait_until(lambda: len(worker.answers) > count + 3 and late.answers, 60, "answers after the switch")
    answers = worker.stop() + late.stop()
    after = score(place.settings)
    assert after[0] == str(NEXT)
    assert after[1] > before[1] + 1
    assert {each.cause for each in answers} == {None}
    scores = [each.scores.fused for each in answers if each.scores is not None]
    assert scores == pytest.approx([before[1]] * len(scores), abs=1e-3)
    change(place, rollback)
    version, again = score(place.settings)
    assert version == str(NOW)
    assert again == pytest.approx(before[1], abs=1e-3)


def test_a_running_line_takes_over_what_is_promoted(
    place: SimpleNamespace, stack: Any, line_file: Any, tmp_path: Path
) -> None:
    """No part is lost or UNINSPECTED while versions come and go: each verdict names the version that judged it, and
    meets its limits, which for the next one were set before its promotion. A version that the line's signer did not
    sign gets no part although every replica serves it; a manifest that nobody serves is refused. Both cost nothing."""
    made = line_file(stack, triton=triton_of(place))
    made.camera(type="folder", path=str(pictures(tmp_path)), product=PRODUCT, rate=4, loop=True)
    path = made.write()
    manifest = place.settings.models_repo / PRODUCT / "manifest.json"
    if NEXT not in place.repository.pushed(PRODUCT):
        push(place, heavier(place.folder / "export", NEXT))
    for limits in (["--ng", "1e9"], ["--ng", "2e9", "--model-version", str(NEXT)]):
        command = [sys.executable, "-m", "pipeline.cli", "thresholds", "set", PRODUCT, *limits, "-c", str(path)]
        subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)

    def judged(version: int, times: int) -> bool:
        """Whether the versions changed so often, and the last verdict is of this one."""
        versions = runs(made.name)
        return len(versions) == times and versions[-1][0] == str(version)

    def runs(name: str) -> list[tuple[str, str, float]]:
        parts = [event["data"] for event in received(stack.endpoints["kafka"], name).events]
        met = [(part["model"]["version"], part["threshold"]["source"], part["threshold"]["ng"]) for part in parts]
        return [one for one, _ in itertools.groupby(met)]

    with LineProcess(path) as line:
        wait_until(lambda: judged(NOW, 1), 60, "verdicts of the first version")
        change(place, promote, NEXT)
        wait_until(lambda: "not signed by a key of" in line.log(), 60, "the next one to be refused")
        count = len(received(stack.endpoints["kafka"], made.name).events)
        wait_until(lambda: len(received(stack.endpoints["kafka"], made.name).events) > count + 8, 60, "more verdicts")
        assert judged(NOW, 1)
        sign(manifest, place.private)
        wait_until(lambda: line.log().count('"new version"') == 1, 60, "the next one to be taken")
        wait_until(lambda: judged(NEXT, 2), 60, "verdicts of the next one")
        change(place, rollback)
        wait_until(lambda: line.log().count('"new version"') == 2, 60, "the first one to be taken again")
        wait_until(lambda: judged(NOW, 3), 60, "verdicts of the first one again")
        good = manifest.read_bytes()
        manifest.write_text(json.dumps(json.loads(good) | {"version": 99, "model_sha256": "0" * 64}))
        sign(manifest, place.private)
        wait_until(lambda: line.log().count("new version not judged with") == 2, 60, "the refusal")
        count = len(received(stack.endpoints["kafka"], made.name).events)
        wait_until(lambda: len(received(stack.endpoints["kafka"], made.name).events) > count + 8, 60, "more verdicts")
        manifest.write_bytes(good)
        sign(manifest, place.private)
        summary = line.stop()
        assert line.log().count("new version not judged with") == 2
    with redis.Redis.from_url(stack.endpoints["redis"]) as admin:
        admin.delete(*admin.scan_iter(f"logicrd:threshold:{PRODUCT}*"))
    verdicts = received(stack.endpoints["kafka"], made.name, at_least=summary["triggered"])
    assert verdicts.causes == {}
    assert verdicts.in_order()
    assert verdicts.duplicates == 0
    now, following = (str(NOW), "redis", 1e9), (str(NEXT), "redis", 2e9)
    assert runs(made.name) == [now, following, now]


def test_a_running_line_tries_a_version(place: SimpleNamespace, stack: Any, line_file: Any, tmp_path: Path) -> None:
    """As canary it judges the parts whose ids say so and no others, until it fails, from where the version in force
    judges them all; as shadow it is counted and gives no verdict. No part is lost or UNINSPECTED meanwhile; unsigned it
    is neither, as the heartbeat says."""
    made = line_file(stack, triton=triton_of(place))
    made.settings |= {"monitoring": {"heartbeat_s": 1.0}}
    made.camera(type="folder", path=str(pictures(tmp_path)), product=PRODUCT, rate=4, loop=True)
    path = made.write()
    if NEXT not in place.repository.pushed(PRODUCT):
        push(place, heavier(place.folder / "export", NEXT))

    def judged_by(version: int) -> dict[int, str]:
        """The parts that a version judged, by their place in the line's sequence."""
        parts = (event["data"] for event in received(stack.endpoints["kafka"], made.name).events)
        return {each["sequence"]: each["partId"] for each in parts if each["model"]["version"] == str(version)}

    def figures() -> dict[str, Any]:
        command = [sys.executable, "-m", "pipeline.cli", "models", "shadow", PRODUCT, "--json", "-c", str(path)]
        run = subprocess.run(command, check=True, timeout=60, capture_output=True)
        return json.loads(run.stdout)

    with LineProcess(path) as line:
        wait_until(lambda: judged_by(NOW), 60, "verdicts")
        change(place, partial(try_beside, mode="canary", percent=50.0), NEXT)
        wait_until(lambda: "signed" in str(figures()["workers"]), 60, "the canary to be refused")
        assert judged_by(NEXT) == {}
        sign(place.repository.tree(PRODUCT, NEXT) / "manifest.json", place.private)
        change(place, partial(try_beside, mode="canary", percent=50.0), NEXT)
        rollout = place.repository.rollout(PRODUCT)
        wait_until(lambda: '"version on trial"' in line.log(), 60, "the canary to begin")
        wait_until(lambda: len(judged_by(NEXT)) > 5, 60, "verdicts of the canary")
        canary, before = judged_by(NEXT), judged_by(NOW)
        assert all(map(rollout.takes, canary.values()))
        began, last = min(canary) + 5, max(canary)  # what was sent just before it began may be told just after
        assert not any(rollout.takes(part) for order, part in before.items() if began < order < last)
        wait_until(lambda: figures()["judged"] > 5, 60, "figures of the canary")
        with ModelControl(place.settings) as control:
            control.unload(f"{PRODUCT}.v{NEXT}")
        wait_until(lambda: "version on trial given up" in line.log(), 60, "the canary to be given up")
        count = len(judged_by(NEXT))
        wait_until(lambda: len(judged_by(NOW)) > len(before) + 10, 60, "verdicts of the version in force")
        assert len(judged_by(NEXT)) == count
        change(place, rollback)
        change(place, partial(try_beside, mode="shadow", percent=100.0), NEXT)
        wait_until(lambda: line.log().count('"version on trial"') == 2, 60, "the shadow to begin")
        wait_until(lambda: figures()["agreed"] + figures()["disagreed"] > 5, 60, "figures of the shadow")
        change(place, stop_trial)
        summary = line.stop()
    assert len(judged_by(NEXT)) == count
    verdicts = received(stack.endpoints["kafka"], made.name, at_least=summary["triggered"])
    assert verdicts.causes == {}
    assert verdicts.in_order()
    assert place.repository.addressed(PRODUCT) == [f"{PRODUCT}.v{NOW}"]
    assert score(place.settings)[0] == str(NOW)


def test_a_version_that_cannot_be_loaded_is_never_served(place: SimpleNamespace) -> None:
    """A graph that passes every check of a file, and that ONNX Runtime refuses: named, while the old one answers."""

    def empty(path: str, content: bytes) -> bytes:
        return graph() if path.startswith(f"{PRODUCT}.map/") else content

    push(place, export(place.folder / "broken", BROKEN, empty))
    files = files_of(place.repository.models)
    worker = Worker(place.settings)
    with pytest.raises(CheckError, match=rf"{PRODUCT}\.map"):
        change(place, promote, BROKEN)
    answers = worker.stop()
    assert answers
    assert {each.cause for each in answers} == {None}
    assert files_of(place.repository.models) == files
    assert score(place.settings)[0] == str(NOW)  # the server is as ready as before


def test_without_the_key_nothing_is_changed(place: SimpleNamespace) -> None:
    """A wrong key and none are refused before anything is tried, with the name of the setting."""
    (place.folder / "wrong").write_text("open\n")
    for key in (place.folder / "wrong", None):
        settings = place.settings.model_copy(update={"control_key_file": key})
        with pytest.raises(ConfigError, match="behind a key") as caught, ModelControl(settings):
            raise AssertionError
        assert "triton.control_key_file" in caught.value.hint


def test_a_server_without_model_control_says_so(place: SimpleNamespace, stack: Any) -> None:
    """A Triton that loads its models at the start alone: the remedy is named."""
    settings = Triton(address=stack.endpoints["triton"], models_repo=place.repository.models)
    with ModelControl(settings) as control, pytest.raises(ConfigError) as caught:
        control.load(PRODUCT)
    assert "--model-control-mode=explicit" in caught.value.hint


def test_all_replicas_are_told_or_none(place: SimpleNamespace) -> None:
    """With one replica gone nothing is promoted; the other one, started anew, serves what it served."""
    files = files_of(place.repository.models)
    stop(place.folder, "second")
    with pytest.raises(DependencyError, match="does not answer"):
        change(place, promote, NEXT)
    assert files_of(place.repository.models) == files
    stop(place.folder, "first")
    addresses = [start(place.folder, name) for name in ("first", "second")]
    version, _ = score(place.settings.model_copy(update={"address": addresses}))
    assert version == str(NOW)
