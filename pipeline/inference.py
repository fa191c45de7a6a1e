"""The Triton client: checks the signature once, then sends batches asynchronously, each under a deadline.

Knows the ensemble's tensor names. A batch gives one `Inference` a frame, whatever happens: scores, or the cause why
there are none. An UNAVAILABLE or CANCELLED answer is tried once more while the deadline allows. Never judges, and never
blocks the caller beyond handing the request to gRPC.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog
from tritonclient.grpc import (
    InferenceServerClient,
    InferInput,
    InferRequestedOutput,
    InferResult,
    KeepAliveOptions,
)
from tritonclient.utils import InferenceServerException

from pipeline.config import Triton as TritonSettings
from pipeline.errors import DependencyError, ModelMismatchError
from pipeline.manifest import Manifest
from pipeline.types import Batch, Cause, Inference, Model, Scores

INPUT = "image"
OUTPUTS = ("score", "map_score", "mahalanobis", "anomaly_map")
# A ping every 20 s notices a dead host; Triton's default tolerates that many while requests flow.
_KEEPALIVE = KeepAliveOptions(keepalive_time_ms=20_000, keepalive_timeout_ms=5_000, http2_max_pings_without_data=0)
_AGAIN = ("UNAVAILABLE", "CANCELLED")
_SHORTEST_CALL_S = 0.02

Done = Callable[[list[Inference]], None]

log = structlog.get_logger(__name__)


class InferenceClient:
    """One connection to Triton; `submit` from one thread, answers on gRPC's threads."""

    def __init__(self, settings: TritonSettings, manifests: Mapping[str, Manifest]) -> None:
        self._settings = settings
        self._manifests = manifests
        self._models = {
            name: Model(manifest.product, str(manifest.version), manifest.model_sha256)
            for name, manifest in manifests.items()
        }
        self._outputs = [InferRequestedOutput(name) for name in OUTPUTS]
        self._client: InferenceServerClient | None = None

    def start(self, *, optional: Collection[str] = ()) -> list[str]:
        """Connect and compare each product's signature; gives the `optional` products that cannot be judged.

        Raises DependencyError when the server does not answer or lacks a model, ModelMismatchError for another one.
        """
        self._client = InferenceServerClient(self._settings.address, keepalive_options=_KEEPALIVE)
        self._await_ready()
        unfit = []
        for product, manifest in self._manifests.items():
            try:
                self._check(manifest)
            except (DependencyError, ModelMismatchError) as error:
                if product not in optional:
                    raise
                log.error("product left out", product=product, error=str(error), hint=error.hint)
                unfit.append(product)
        return unfit

    def close(self) -> None:
        """Close the connection; answers under way come back as `triton_unavailable`."""
        if self._client is not None:
            self._client.close()

    def submit(self, batch: Batch, done: Done) -> None:
        """Send a batch; `done` gets one inference a frame, later, on another thread.

        The call's deadline is that of the youngest frame; an older one is given up by whoever watches deadlines.
        """
        images = np.stack([frame.image for frame in batch.frames if frame.image is not None])
        tensor = InferInput(INPUT, list(images.shape), "UINT8")
        tensor.set_data_from_numpy(images)
        self._send(batch, tensor, done, retries=1)

    def _send(self, batch: Batch, tensor: InferInput, done: Done, retries: int) -> None:
        sent_s = time.monotonic()
        remaining_s = max(frame.deadline_s for frame in batch.frames) - sent_s
        if remaining_s < _SHORTEST_CALL_S:
            done([Inference(frame, cause=Cause.DEADLINE) for frame in batch.frames])
            return

        def answered(result: InferResult | None, error: InferenceServerException | None) -> None:
            if error is not None and retries and _status(error) in _AGAIN:
                self._send(batch, tensor, done, retries - 1)
            elif result is None or error is not None:
                log.debug("inference failed", product=batch.product, error=str(error))
                done([Inference(frame, cause=_cause(error), sent_s=sent_s) for frame in batch.frames])
            else:
                done(self._read(batch, result, sent_s))

        assert self._client is not None  # noqa: S101 (set by start)
        try:
            self._client.async_infer(
                batch.product, [tensor], answered, outputs=self._outputs, client_timeout=remaining_s
            )
        except (InferenceServerException, ValueError) as error:  # ValueError: the channel is closed
            log.debug("inference not sent", product=batch.product, error=str(error))
            done([Inference(frame, cause=Cause.TRITON_UNAVAILABLE, sent_s=sent_s) for frame in batch.frames])

    def _read(self, batch: Batch, result: InferResult, sent_s: float) -> list[Inference]:
        """Turn an answer's tensors into inferences; tensors of another shape than the manifest's are a mismatch."""
        received_s = time.monotonic()
        tensors = [_tensor(result, name) for name in OUTPUTS]
        count = len(batch.frames)
        expected = [(count, 1)] * 3 + [(count, *self._manifests[batch.product].map_shape)]
        if [tensor.shape for tensor in tensors] != expected:
            log.error("answer of another shape than the manifest's", product=batch.product)
            return [Inference(frame, cause=Cause.MODEL_MISMATCH, sent_s=sent_s) for frame in batch.frames]
        score, map_score, distance, anomaly_map = tensors
        return [
            Inference(
                frame,
                scores=Scores(float(score[i, 0]), float(map_score[i, 0]), float(distance[i, 0])),
                anomaly_map=anomaly_map[i],
                model=self._models[batch.product],
                sent_s=sent_s,
                received_s=received_s,
            )
            for i, frame in enumerate(batch.frames)
        ]

    def _await_ready(self) -> None:
        assert self._client is not None  # noqa: S101 (set by start)
        until = time.monotonic() + self._settings.startup_timeout_s
        while True:
            try:
                if self._client.is_server_ready(client_timeout=2.0):
                    return
                fault = "is not ready"
            except InferenceServerException as error:
                fault = error.message() or "does not answer"
            if time.monotonic() >= until:
                raise DependencyError(
                    f"Triton at {self._settings.address}: {fault}",
                    hint="start it (`logicrd stack up`), or correct triton.address in the line file",
                )
            time.sleep(0.25)

    def _check(self, manifest: Manifest) -> None:
        assert self._client is not None  # noqa: S101 (set by start)
        try:
            metadata = self._client.get_model_metadata(manifest.product, as_json=True, client_timeout=5.0)
        except InferenceServerException as error:
            raise DependencyError(
                f"Triton at {self._settings.address} does not serve product {manifest.product!r}: {error.message()}",
                hint=f"let it serve {self._settings.models_repo}",
            ) from None
        if faults := signature_faults(metadata, manifest):
            raise ModelMismatchError(
                f"product {manifest.product!r}: Triton's signature is not the manifest's: {'; '.join(faults)}",
                hint="export the product again, and let Triton load that version",
            )


def signature_faults(metadata: Mapping[str, Any], manifest: Manifest) -> list[str]:
    """Compare Triton's model metadata with a manifest; gives one sentence a difference, none when it fits."""
    size = [manifest.input.height, manifest.input.width, 3]
    expected = {f"input {INPUT}": ("UINT8", size)}
    expected |= {f"output {name}": ("FP32", [1]) for name in OUTPUTS[:3]}
    expected[f"output {OUTPUTS[3]}"] = ("FP32", list(manifest.map_shape))
    actual = {
        f"{side[:-1]} {tensor['name']}": (tensor["datatype"], [int(size) for size in tensor["shape"]][1:])
        for side in ("inputs", "outputs")
        for tensor in metadata.get(side, [])
    }
    faults = [
        f"{name} is {_shown(actual.get(name))}, not {_shown(kind)}"
        for name, kind in expected.items()
        if actual.get(name) != kind
    ]
    faults += [f"{name} is asked for" for name in actual if name.startswith("input") and name not in expected]
    if (versions := metadata.get("versions")) and str(manifest.version) not in versions:
        faults.append(f"version {', '.join(versions)} is loaded, not {manifest.version}")
    return faults


def _tensor(result: InferResult, name: str) -> npt.NDArray[np.float32]:
    tensor: npt.NDArray[np.float32] | None = result.as_numpy(name)
    return tensor if tensor is not None else np.empty(0, np.float32)


def _shown(kind: tuple[str, list[int]] | None) -> str:
    return "absent" if kind is None else f"{kind[0]} {kind[1]}"


def _status(error: InferenceServerException) -> str:
    return str(error.status()).removeprefix("StatusCode.")


def _cause(error: InferenceServerException | None) -> Cause:
    if error is not None and _status(error) == "DEADLINE_EXCEEDED":
        return Cause.DEADLINE
    return Cause.TRITON_UNAVAILABLE
