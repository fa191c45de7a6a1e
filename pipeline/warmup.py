"""Makes a product ready before its first part: one canary picture through its whole ensemble.

A server calls a model ready that has not run yet, or whose backend process is dead; the first answer is the proof, and
takes the time that the first part would have lost. Called by `app` before the cameras start.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping
from datetime import UTC, datetime

import numpy as np
import structlog

from pipeline.errors import DependencyError
from pipeline.health import Health
from pipeline.inference import InferenceClient
from pipeline.manifest import Manifest
from pipeline.types import Batch, Frame, Inference

_PAUSE_S = 0.5

log = structlog.get_logger(__name__)


def warm_up(client: InferenceClient, manifests: Mapping[str, Manifest], health: Health, *, timeout_s: float) -> None:
    """Wait until each product has given scores; `timeout_s` holds for each. Raises DependencyError naming the product.

    The client must be started. `/readyz` names the products that are not ready yet.
    """
    for product in manifests:
        health.ready(f"product {product}", state=False)
    for product, manifest in manifests.items():
        began_s = time.monotonic()
        until_s = began_s + timeout_s
        while (answer := _canary(client, manifest, until_s)).scores is None:
            if time.monotonic() + _PAUSE_S > until_s:
                fault = answer.cause.value if answer.cause is not None else "no scores"
                raise DependencyError(
                    f"Triton serves product {product!r} but gives no scores for a picture: {fault}",
                    hint="look at Triton's log, or raise triton.startup_timeout_s",
                )
            time.sleep(_PAUSE_S)
        health.ready(f"product {product}", state=True)
        log.info("product ready", product=product, first_answer_ms=round((time.monotonic() - began_s) * 1e3))


def _canary(client: InferenceClient, manifest: Manifest, until_s: float) -> Inference:
    """Send one grey picture and wait for what comes back, no longer than until `until_s` and a little."""
    size = manifest.input
    frame = Frame(
        camera_id="canary",
        station="",
        product=manifest.product,
        number=1,
        part_id="canary",
        part_id_source="generated",
        captured_at=datetime.now(UTC),
        captured_s=time.monotonic(),
        deadline_s=until_s,
        image=np.full((size.height, size.width, 3), 127, np.uint8),
    )
    answers: queue.Queue[list[Inference]] = queue.Queue()
    client.submit(Batch(manifest.product, (frame,)), answers.put)
    try:
        return answers.get(timeout=max(0.0, until_s - time.monotonic()) + 1.0)[0]
    except queue.Empty:
        return Inference(frame)
