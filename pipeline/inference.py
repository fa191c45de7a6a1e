"""The Triton client: sends batches asynchronously, each under a deadline, and says how good a replica of Triton is.

Knows the ensemble's tensor names. A batch gives one `Inference` a frame, whatever happens: scores, or the cause why
there are none. A batch whose replica is gone, busy or faulty is tried once more, on another one, while the deadline
allows. Never judges, and never blocks the caller beyond handing the request to gRPC.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException

from pipeline import replicas
from pipeline.balance import Fault, Finding, Replica, fault_of
from pipeline.health import Health
from pipeline.manifest import Manifest
from pipeline.metrics import Metrics
from pipeline.replicas import ReplicaPool, Resolve
from pipeline.servers import Triton as TritonSettings
from pipeline.types import Batch, Cause, Image, Inference, Model, Scores

INPUT = "image"
OUTPUTS = ("score", "map_score", "mahalanobis", "anomaly_map")
_SHORTEST_CALL_S = 0.02
_READY_TIMEOUT_S = 2.0
_METADATA_TIMEOUT_S = 5.0
_CANARY_TIMEOUT_S = 5.0

Done = Callable[[list[Inference]], None]

log = structlog.get_logger(__name__)


class InferenceClient:
    """The replicas of one Triton service; `submit` from one thread, answers on gRPC's threads."""

    def __init__(
        self,
        settings: TritonSettings,
        manifests: Mapping[str, Manifest],
        *,
        metrics: Metrics,
        health: Health,
        resolve: Resolve = replicas.resolve,
    ) -> None:
        self._settings = settings
        self._manifests = dict(manifests)
        # Of the start: products that a replica may lack, those that one has, and what is wrong with the others.
        self._optional: frozenset[str] = frozenset()
        self._served: set[str] = set()
        self._faults: dict[str, str] = {}
        self._models = {
            name: Model(manifest.product, str(manifest.version), manifest.model_sha256)
            for name, manifest in manifests.items()
        }
        self._outputs = [InferRequestedOutput(name) for name in OUTPUTS]
        self._health = health
        self._pool = ReplicaPool(settings, self._probe, metrics=metrics, health=health, resolve=resolve)

    def start(self, *, optional: Collection[str] = ()) -> list[str]:
        """Reach every replica, compare each product's signature, and let it judge a black picture of each.

        One good replica is enough; another one is named in the log and asked again. Raises DependencyError when no
        replica answers or serves every product, ModelMismatchError when one serves another model and none is good.
        Of the `optional` products those that no replica can judge are left out, and given by name; a replica that
        lacks what another has is not used.
        """
        self._optional = frozenset(optional)
        self._pool.start()
        lacking = sorted(self._optional - self._served)
        for product in lacking:
            log.error("product left out", product=product, error=self._faults.get(product, "not served"))
        self._manifests = {name: manifest for name, manifest in self._manifests.items() if name not in lacking}
        self._optional = frozenset()
        if optional:  # one that was asked before another showed what it serves has to show the same
            self._pool.probe_again()
        return lacking

    def learn(self, manifest: Manifest) -> str:
        """Take one more product, once every replica in use serves it and has judged a black picture of it.

        Gives why that is not so, '' when the product is taken; from then on every replica has to serve it. Blocks for
        the probes.
        """
        in_use = self._pool.in_use()
        for replica, client in in_use:
            for look in (self._signature, self._canary):
                finding, words = look(client, manifest)
                if finding is not Finding.GOOD:
                    return f"Triton at {replica.address}: {words}"
        if not in_use:
            return "no replica of Triton is in use"
        model = Model(manifest.product, str(manifest.version), manifest.model_sha256)
        self._models = {**self._models, manifest.product: model}
        self._manifests = {**self._manifests, manifest.product: manifest}
        return ""

    def require_all(self) -> list[str]:
        """Give the address of every replica; raises as `start` does when one of them is not good."""
        return self._pool.require_all()

    def close(self) -> None:
        """Close every connection; answers under way come back as `triton_unavailable`."""
        self._pool.close()

    def wait_for_room(self, timeout_s: float) -> bool:
        """Wait until a replica has room for a batch; True at once when none is in use, which `submit` then says."""
        return self._pool.wait_for_room(timeout_s)

    def submit(self, batch: Batch, done: Done) -> None:
        """Send a batch; `done` gets one inference a frame, later, on another thread.

        The call's deadline is that of the youngest frame; an older one is given up by whoever watches deadlines.
        """
        tensor = _input(np.stack([frame.image for frame in batch.frames if frame.image is not None]))
        self._send(batch, tensor, done)

    def _send(self, batch: Batch, tensor: InferInput, done: Done, failed: Replica | None = None) -> None:
        """Send a batch to the next replica; `failed` is the one that did not answer the first time."""
        sent_s = time.monotonic()
        remaining_s = max(frame.deadline_s for frame in batch.frames) - sent_s
        if remaining_s < _SHORTEST_CALL_S:
            done([Inference(frame, cause=Cause.DEADLINE) for frame in batch.frames])
            return
        if (taken := self._pool.take(avoid=failed)) is None:
            done([Inference(frame, cause=Cause.TRITON_UNAVAILABLE) for frame in batch.frames])
            return
        replica, client = taken

        def answered(result: InferResult | None, error: InferenceServerException | None) -> None:
            inferences, fault, words = self._read(batch, result, error, sent_s)
            again = self._pool.give_back(replica, fault, words, first_try=failed is None)
            if fault is not None:
                log.debug("inference failed", product=batch.product, replica=replica.address, error=words)
            if again:
                self._send(batch, tensor, done, failed=replica)
            else:
                done(inferences)

        try:
            client.async_infer(
                batch.product,
                [tensor],
                answered,
                outputs=self._outputs,
                client_timeout=remaining_s,
                timeout=int(remaining_s * 1e6),  # in the server's queues, which a cancelled call may stay in
                headers=None if (request := _request(batch)) is None else {"traceparent": request},
            )
        except (InferenceServerException, ValueError) as error:  # ValueError: the channel is closed
            log.debug("inference not sent", product=batch.product, replica=replica.address, error=str(error))
            self._pool.give_back(replica, Fault.GONE, str(error), first_try=False)
            done([Inference(frame, cause=Cause.TRITON_UNAVAILABLE, sent_s=sent_s) for frame in batch.frames])

    def _read(
        self, batch: Batch, result: InferResult | None, error: InferenceServerException | None, sent_s: float
    ) -> tuple[list[Inference], Fault | None, str]:
        """Turn an answer into inferences, and say what is wrong with it."""
        if result is None or error is not None:
            words = "no answer" if error is None else error.message() or _status(error)
            fault = Fault.SICK if error is None else fault_of(_status(error), words)
            cause = Cause.DEADLINE if fault is Fault.LATE else Cause.TRITON_UNAVAILABLE
            return [Inference(frame, cause=cause, sent_s=sent_s) for frame in batch.frames], fault, words
        if mismatch := self._mismatch(batch, result):
            log.error("answer of another model than the manifest's", product=batch.product, error=mismatch)
            inferences = [Inference(frame, cause=Cause.MODEL_MISMATCH, sent_s=sent_s) for frame in batch.frames]
            return inferences, Fault.SICK, mismatch
        return self._scores(batch, result, sent_s), None, ""

    def _mismatch(self, batch: Batch, result: InferResult) -> str:
        """Compare an answer's version and shapes with the manifest's; '' when they fit.

        A replica that was started anew behind the same address may serve another version from one batch to the next.
        """
        manifest = self._manifests[batch.product]
        version, count = result.get_response().model_version, len(batch.frames)
        if version != str(manifest.version):
            return f"version {version} answers, not {manifest.version}"
        shapes = [_tensor(result, name).shape for name in OUTPUTS]
        if shapes != [(count, 1)] * 3 + [(count, *manifest.map_shape)]:
            return f"tensors of the shapes {shapes}"
        return ""

    def _scores(self, batch: Batch, result: InferResult, sent_s: float) -> list[Inference]:
        received_s = time.monotonic()
        score, map_score, distance, anomaly_map = (_tensor(result, name) for name in OUTPUTS)
        request = _request(batch)
        return [
            Inference(
                frame,
                scores=Scores(float(score[i, 0]), float(map_score[i, 0]), float(distance[i, 0])),
                anomaly_map=anomaly_map[i],
                model=self._models[batch.product],
                sent_s=sent_s,
                received_s=received_s,
                request=request,
            )
            for i, frame in enumerate(batch.frames)
        ]

    def _probe(self, client: InferenceServerClient) -> tuple[Finding, str]:
        """Say whether a replica is ready, serves what the manifests say, and answers: a server whose backend process
        has died still calls itself ready. A good one is warm afterwards."""
        manifests, lacking = self._manifests, set[str]()
        if (finding := _readiness(client))[0] is not Finding.GOOD:
            return finding
        for look in (self._signature, self._canary):
            for product in [name for name in manifests if name not in lacking]:
                self._health.beat(replicas.PROBES)  # each look is bounded in time, the sum of them is not
                finding = look(client, manifests[product])
                if finding[0] in (Finding.FAILED, Finding.REFUSED) and product in self._optional - self._served:
                    lacking.add(product)
                    self._faults[product] = finding[1]
                elif finding[0] is not Finding.GOOD:
                    return finding
        if lacking and (finding := _readiness(client))[0] is not Finding.GOOD:  # it died meanwhile: it lacks nothing
            return finding
        self._served |= manifests.keys() - lacking
        return Finding.GOOD, ""

    def _signature(self, client: InferenceServerClient, manifest: Manifest) -> tuple[Finding, str]:
        try:
            faults = self._signature_faults(client, manifest)
        except (InferenceServerException, ValueError) as error:  # ValueError: the channel is closed
            return Finding.FAILED, _words(error) or "does not answer"
        if faults:
            words = f"product {manifest.product!r}: its signature is not the manifest's: {'; '.join(faults)}"
            return Finding.REFUSED, words
        return Finding.GOOD, ""

    def _signature_faults(self, client: InferenceServerClient, manifest: Manifest) -> list[str]:
        try:
            metadata = client.get_model_metadata(manifest.product, as_json=True, client_timeout=_METADATA_TIMEOUT_S)
        except InferenceServerException as error:
            remedy = f"let it serve {self._settings.models_repo}"
            raise InferenceServerException(
                f"does not serve product {manifest.product!r} ({error.message()}): {remedy}"
            ) from None
        return signature_faults(metadata, manifest)

    def _canary(self, client: InferenceServerClient, manifest: Manifest) -> tuple[Finding, str]:
        """Let a replica judge a black picture; one that is only late or full is not at fault."""
        picture = np.zeros((1, manifest.input.height, manifest.input.width, 3), np.uint8)
        try:
            client.infer(manifest.product, [_input(picture)], outputs=self._outputs, client_timeout=_CANARY_TIMEOUT_S)
        except (InferenceServerException, ValueError) as error:
            words = f"a black picture of product {manifest.product!r} failed: {_words(error)}"
            known = isinstance(error, InferenceServerException)
            slow = known and fault_of(_status(error), _words(error)) in (Fault.LATE, Fault.BUSY)
            return Finding.LATE if slow else Finding.FAILED, words
        return Finding.GOOD, ""


def _request(batch: Batch) -> str | None:
    """Give the trace context of a batch's request: a request has one, so that of the first traced frame."""
    return next((frame.request for frame in batch.frames if frame.request is not None), None)


def _readiness(client: InferenceServerClient) -> tuple[Finding, str]:
    try:
        ready = client.is_server_ready(client_timeout=_READY_TIMEOUT_S)
    except (InferenceServerException, ValueError) as error:  # ValueError: the channel is closed
        return Finding.FAILED, _words(error) or "does not answer"
    return (Finding.GOOD, "") if ready else (Finding.FAILED, "is not ready")


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


def _words(error: InferenceServerException | ValueError) -> str:
    return str(error.message() or "") if isinstance(error, InferenceServerException) else str(error)


def _input(images: Image) -> InferInput:
    tensor = InferInput(INPUT, list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images)
    return tensor
