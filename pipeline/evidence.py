"""Pictures kept for review: overlays of what was not OK, and, when asked, every frame as it went to the model.

Where a graph keeps the picture, its heat map alone is drawn, on grey. Written by one thread from a bounded queue; a
full queue or disk costs pictures, never verdicts, and is counted and said. The name of a picture is known before it is
written, so that the verdict can point to it.
"""

from __future__ import annotations

import queue
import re
import threading
from collections import deque
from pathlib import Path
from zlib import crc32

import cv2
import numpy as np
import structlog

from pipeline.config import Evidence as EvidenceSettings
from pipeline.health import Health
from pipeline.heatmap import overlay
from pipeline.manifest import Manifests
from pipeline.region import upright_size
from pipeline.types import Image, Inference, Judgement, View, ViewVerdict

_STAGE = "evidence"
_QUEUE_LENGTH = 64
_PANEL_HEIGHT = 320
_TITLE_WIDTH = 2 * round(_PANEL_HEIGHT * 4 / 3)
_GREY = np.full((_PANEL_HEIGHT, round(_PANEL_HEIGHT * 4 / 3), 3), 96, np.uint8)

log = structlog.get_logger(__name__)


class Evidence:
    """The picture store; `keep` from one thread, never blocking."""

    def __init__(self, settings: EvidenceSettings, manifests: Manifests, health: Health) -> None:
        self._settings = settings
        self._manifests = manifests
        self._health = health
        self._queue: queue.Queue[tuple[Path, Inference, str]] = queue.Queue(_QUEUE_LENGTH)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=_STAGE, daemon=True)
        self._written: deque[Path] = deque()
        self.dropped = 0

    def start(self) -> None:
        """Make the folder and begin to write; does nothing when no folder is set. Raises OSError."""
        if self._settings.dir is None:
            return
        self._settings.dir.mkdir(parents=True, exist_ok=True)
        known = (path for path in self._settings.dir.glob("*/*") if path.is_file())
        self._written.extend(sorted(known, key=lambda path: path.stat().st_mtime))
        self._health.beat(_STAGE)
        self._thread.start()

    def reference(self, inference: Inference, judgement: Judgement) -> str | None:
        """Name the picture that will be kept of a frame, relative to the folder; None when none is."""
        frame = inference.frame
        shown = judgement in {Judgement.NG, Judgement.REVIEW}
        if frame.image is None:
            wanted = shown and inference.anomaly_map is not None
        else:
            wanted = shown or self._settings.keep == "all"
        if self._settings.dir is None or not wanted:
            return None
        part_id = f"{frame.part_id}.{frame.meas_id}" if frame.meas_id else frame.part_id
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", part_id)[:100]
        if name != part_id:  # two parts must not share a name that was made fit
            name += f".{crc32(part_id.encode()):08x}"
        kind = "jpg" if shown else "png"
        return f"{frame.camera_id}/{name}.{judgement.value}.{kind}"

    def keep(self, view: ViewVerdict) -> None:
        """Hand a view's picture over, if one is kept of it."""
        if view.image_ref is None or self._settings.dir is None:
            return
        try:
            self._queue.put_nowait((self._settings.dir / view.image_ref, view.inference, _title(view)))
        except queue.Full:
            self.dropped += 1
            log.warning("picture not kept: the disk is slower than the line", dropped=self.dropped)

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is queued, then end."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not (self._stop.is_set() and self._queue.empty()):
            self._health.beat(_STAGE)
            try:
                path, inference, title = self._queue.get(timeout=0.25)
            except queue.Empty:
                continue
            try:
                self._write(path, inference, title)
            except OSError as error:
                self.dropped += 1
                log.error("picture not written", path=str(path), error=str(error), dropped=self.dropped)
            except Exception:  # the thread's top frame: one picture must not stop the others
                log.exception("picture not drawn", path=str(path))
        self._health.retire(_STAGE)

    def _write(self, path: Path, inference: Inference, title: str) -> None:
        image = inference.frame.image
        if path.suffix == ".jpg":
            self._save(path, self._panel(_GREY if image is None else image, inference, title))
        if image is not None and self._settings.keep == "all":
            self._save(path.with_suffix(".png"), image)
        while len(self._written) > self._settings.max_files:
            self._written.popleft().unlink(missing_ok=True)

    def _save(self, path: Path, picture: Image) -> None:
        """Write a picture whole or not at all. Raises OSError."""
        encoded, data = cv2.imencode(path.suffix, picture[..., ::-1])
        if not encoded:
            raise OSError("the picture cannot be encoded")
        path.parent.mkdir(exist_ok=True)
        fresh = path.with_suffix(path.suffix + ".new")
        fresh.write_bytes(data.tobytes())
        fresh.replace(path)
        self._written.append(path)

    def _panel(self, image: Image, inference: Inference, title: str) -> Image:
        """Put what the model saw, its heat map and one line of text side by side, in the camera's proportions."""
        manifest, heat = self._manifests.of(inference.frame.product, inference.model), image
        if inference.anomaly_map is not None and manifest is not None:
            heat = overlay(image, inference.anomaly_map, manifest.calibration.heatmap)
        width, height = _panel_size(inference.frame.view)
        pair = [cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR) for part in (image, heat)]
        shown = np.concatenate(pair, axis=1)
        panel = np.full((height + 28, max(_TITLE_WIDTH, 2 * width), 3), 32, np.uint8)
        panel[:height, : 2 * width] = shown
        place = (8, height + 19)
        cv2.putText(panel, title, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (230, 230, 230), 1, cv2.LINE_AA)
        return panel


def _panel_size(view: View | None) -> tuple[int, int]:
    """Give the width and height of a picture in the panel: of a region its own shape, of whole pictures 4:3."""
    if view is None:
        return round(_PANEL_HEIGHT * 4 / 3), _PANEL_HEIGHT
    width, height = upright_size(view)
    share = _PANEL_HEIGHT / max(height, width / 2)  # no wider than two squares
    return max(1, round(width * share)), max(1, round(height * share))


def _title(view: ViewVerdict) -> str:
    scores, threshold = view.inference.scores, view.verdict.threshold
    score = f"score {scores.fused:.2f}" if scores is not None else "no score"
    limit = f"ng {threshold.ng:.2f} v{threshold.version}" if threshold is not None else "no threshold"
    why = ", ".join(view.verdict.reasons)
    return f"{view.verdict.judgement}  {view.frame.product}  {view.frame.part_id}   {score} / {limit}   {why}"
