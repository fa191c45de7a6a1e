"""The whole way, once: a grey picture of each product through Triton, and its verdict back from Kafka.

For `logicrd check --verdict`. The pictures go by a line of their own, `<line>-check`, so that nobody takes their
verdicts for those of parts; no camera is read and no evidence kept. Called by the command line.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from pipeline.app import Line
from pipeline.cameras import FolderCamera
from pipeline.config import Evidence, LineConfig, Monitoring, Outbox
from pipeline.errors import CheckError
from pipeline.manifest import Manifest
from pipeline.tail import VerdictReader

_GREY = (128, 128, 128)
_TICK_S = 0.05
_MARGIN_S = 15.0


def try_verdicts(settings: LineConfig, manifests: Mapping[str, Manifest]) -> list[str]:
    """Give one line for each product's verdict, as a MES would read it.

    Raises CheckError when one does not come back, or says that its picture was not inspected; blocks for the budget and
    some seconds at most.
    """
    with TemporaryDirectory(prefix="logicrd-check-") as folder:
        names = {f"{secrets.token_hex(8)}.png": manifest for manifest in manifests.values()}
        config = _trial_line(settings, Path(folder), names)
        with VerdictReader(settings.kafka, start="now") as reader:
            until = time.monotonic() + settings.budget_ms / 1e3 + settings.kafka.startup_timeout_s + _MARGIN_S
            _run(config, until)
            verdicts = _read(reader, set(names), until)
    return [_told(manifest.product, verdicts.get(name)) for name, manifest in names.items()]


def _trial_line(settings: LineConfig, folder: Path, names: Mapping[str, Manifest]) -> LineConfig:
    cameras = []
    for name, manifest in names.items():
        path = folder / manifest.product
        path.mkdir()
        size = manifest.region.picture_size if manifest.region else (manifest.input.width, manifest.input.height)
        Image.new("RGB", (size[0], size[1]), _GREY).save(path / name)
        camera = {"id": f"check-{manifest.product}", "type": "folder", "path": path, "product": manifest.product}
        cameras.append(FolderCamera.model_validate(camera))
    return settings.model_copy(
        update={
            "line": f"{settings.line[:58]}-check",
            "cameras": cameras,
            "stations": [],
            "pool": None,
            "evidence": Evidence(),
            "monitoring": Monitoring(),
            "outbox": Outbox(dir=None),
        }
    )


def _run(config: LineConfig, until: float) -> None:
    line = Line(config)
    line.start()
    try:
        while not line.finished and time.monotonic() < until:
            time.sleep(_TICK_S)
    finally:
        line.close()


def _read(reader: VerdictReader, parts: Iterable[str], until: float) -> dict[str, tuple[str, list[str]]]:
    """Read until every part has its verdict, or the time is up."""
    missing = set(parts)
    found: dict[str, tuple[str, list[str]]] = {}
    while missing and time.monotonic() < until:
        for event in reader.read(idle_s=0.5):
            data = event.get("data", {})
            if data.get("partId") in missing:
                missing.discard(data["partId"])
                found[data["partId"]] = (data["verdict"], data["reasonCodes"])
    return found


def _told(product: str, verdict: tuple[str, list[str]] | None) -> str:
    if verdict is None:
        raise CheckError(f"product {product!r}: no verdict came back from Kafka", hint="see the log for the reason")
    said, reasons = verdict
    if said == "UNINSPECTED":
        raise CheckError(f"product {product!r}: UNINSPECTED ({', '.join(reasons)})", hint="see the log for the reason")
    return f"verdict of product {product!r} on a grey picture, by way of Kafka: {said}"
