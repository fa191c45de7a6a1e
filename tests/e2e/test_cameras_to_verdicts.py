"""From a camera's H.264 to the MES: every frame sent is one verdict, in order, with the model's own score."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from line_process import LineProcess, received

pytestmark = [pytest.mark.stack, pytest.mark.camera]

ROOT = Path(__file__).resolve().parents[2]
PARTS = ROOT / "deploy/local/parts"
TRAIN = ROOT / ".venv-training/bin/logicrd-train"
FRAMES = 24
RATE = 4
TOLERANCE = 1e-3


@pytest.fixture
def cameras(products, tmp_path):
    """Two RTSP cameras, one a product; gives their addresses, the server's process and where its report will be."""
    command = [sys.executable, str(ROOT / "deploy/local/simulate.py"), "--rate", str(RATE)]
    command += ["--report", str(tmp_path / "sent.json")]
    for number, product in enumerate(products[:2]):
        pictures = sorted((PARTS / product).glob("*.jpg"))[:: 64 // FRAMES][:FRAMES]
        playlist = [{"path": str(path), "part_id": f"{product}-{path.stem}"} for path in pictures]
        (tmp_path / f"{number}.json").write_text(json.dumps(playlist))
        command += ["--camera", f"cam-{number + 1}={tmp_path / f'{number}.json'}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield json.loads(server.stdout.readline())["cameras"], server, tmp_path / "sent.json"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(10)
        server.stdout.close()


def test_every_frame_of_every_camera_gets_the_models_own_score(stack, line_file, products, cameras, tmp_path):
    """Count, order per key, no loss, no repeat; and each fused score equals the torch model's within 1e-3."""
    addresses, server, report = cameras
    made = line_file(stack, evidence={"dir": str(tmp_path / "kept"), "keep": "all"})
    for product, (name, address) in zip(products, addresses.items(), strict=False):
        made.camera(type="rtsp", url=address, product=product, station=name, picture_size=[640, 480])
    with LineProcess(made.write()) as line:
        server.wait(60)
        summary = line.stop()
    sent = {part for camera in json.loads(report.read_text())["cameras"].values() for part in camera["sent"]}
    verdicts = received(stack.endpoints["kafka"], made.name, at_least=len(sent))
    assert len(sent) == 2 * FRAMES
    assert set(verdicts.parts) == sent
    assert (len(verdicts.events), verdicts.duplicates, summary["undelivered"]) == (len(sent), 0, 0)
    assert verdicts.in_order()
    assert verdicts.causes == {}
    ours = {event["data"]["partId"]: event["data"]["views"][0]["scores"] for event in verdicts.events}
    theirs = {}
    for number, product in enumerate(products[:2]):
        theirs |= torch_scores(product, tmp_path / "kept" / f"cam-{number + 1}")
    assert set(theirs) == set(ours)
    worst = max(abs(ours[part]["fused"] - theirs[part]["score"]) for part in ours)
    assert worst < TOLERANCE


def torch_scores(product: str, frames: Path) -> dict[str, dict[str, float]]:
    """Score the frames that went to the model with the torch model, rebuilt from the exported weights."""
    command = [
        str(TRAIN),
        "evaluate",
        "--model",
        str(ROOT / "models_repo" / product),
        "--images",
        str(frames),
        "--json",
    ]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    records = json.loads(answer.stdout)["scores"]
    return {Path(record["file"]).name.split(".")[0]: record for record in records if record["file"].endswith(".png")}
