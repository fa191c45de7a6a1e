"""The Triton client: sends batches asynchronously, each under a deadline, and says how good a replica of Triton is.

Knows the ensemble's tensor names. A batch gives one `Inference` a frame, whatever happens: scores, or the cause why
there are none. A batch whose replica is gone, busy or faulty is tried once more, on another one, while the deadline
allows. No answer of another version than the manifest's is taken: once `logicrd models promote` has given a product's
name to another one, its own is asked for by a name of its own. Never judges, and never blocks the caller beyond handing
the request to gRPC.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException

from pipeline import replicas
from pipeline.balance import Fault, Finding, Replica, fault_of, is_unknown
from pipeline.health import Health
from pipeline.manifest import Manifest, ensemble_of
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


@dataclass(slots=True, eq=False)
class _Version:
    """A version of a product, and the name of the ensemble that serves it now."""

    manifest: Manifest
    ensemble: str
    model: Model


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
        self._versions = {name: _version(manifest) for name, manifest in manifests.items()}
        # Of the start: products that a replica may lack, those that one has, and what is wrong with the others.
        self._optional: frozenset[str] = frozenset()
        self._served: set[str] = set()
        self._faults: dict[str, str] = {}
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
        self._versions = {name: version for name, version in self._versions.items() if name not in lacking}
        self._optional = frozenset()
        if optional:  # one that was asked before another showed what it serves has to show the same
            self._pool.probe_again()
        return lacking

    def check(self, manifest: Manifest) -> str:
        """Say why a version cannot be taken, '' when every replica in use serves it and has judged a black picture of
        it. Blocks for the probes."""
        in_use, version = self._pool.in_use(), _version(manifest)
        for replica, client in in_use:
            for look in (self._signature, self._canary):
                finding, words = look(client, version)
                if finding is not Finding.GOOD:
                    return f"Triton at {replica.address}: {words}"
        return "" if in_use else "no replica of Triton is in use"

    def take(self, manifest: Manifest) -> None:
        """Send a product's batches to this version from now on; every replica has to serve it."""
        self._versions = {**self._versions, manifest.product: _version(manifest)}

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
        self._send(batch, self._versions[batch.product], tensor, done)

    def _send(
        self, batch: Batch, version: _Version, tensor: InferInput, done: Done, failed: Replica | None = None
    ) -> None:
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
        ensemble = version.ensemble

        def answered(result: InferResult | None, error: InferenceServerException | None) -> None:
            inferences, fault, words = self._read(batch, version, result, error, sent_s)
            moved = failed is None and fault is Fault.SICK and self._moved(version, ensemble, result, words)
            again = self._pool.give_back(replica, None if moved else fault, words, first_try=failed is None) or moved
            if fault is not None:
                mismatch = result is not None and not again
                tell = log.error if mismatch else log.debug
                tell("inference failed", product=batch.product, replica=replica.address, error=words)
            if again:
                self._send(batch, version, tensor, done, failed=replica)
            else:
                done(inferences)

        try:
            client.async_infer(
                ensemble,
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
        self,
        batch: Batch,
        version: _Version,
        result: InferResult | None,
        error: InferenceServerException | None,
        sent_s: float,
    ) -> tuple[list[Inference], Fault | None, str]:
        """Turn an answer into inferences, and say what is wrong with it."""
        if result is None or error is not None:
            words = "no answer" if error is None else error.message() or _status(error)
            fault = Fault.SICK if error is None else fault_of(_status(error), words)
            cause = Cause.DEADLINE if fault is Fault.LATE else Cause.TRITON_UNAVAILABLE
            return [Inference(frame, cause=cause, sent_s=sent_s) for frame in batch.frames], fault, words
        if mismatch := _mismatch(version.manifest, len(batch.frames), result):
            inferences = [Inference(frame, cause=Cause.MODEL_MISMATCH, sent_s=sent_s) for frame in batch.frames]
            return inferences, Fault.SICK, mismatch
        return self._scores(batch, version, result, sent_s), None, ""

    def _moved(self, version: _Version, asked: str, result: InferResult | None, words: str) -> bool:
        """Whether the ensemble that was asked serves another version now, or none; then the other name is asked from
        here on: a promotion leaves the version before under a name of its own."""
        manifest = version.manifest
        answers = None if result is None else result.get_response().model_version
        if answers == str(manifest.version) or (answers is None and not is_unknown(words)):
            return False
        other = manifest.product if asked != manifest.product else ensemble_of(manifest.product, manifest.version)
        if version.ensemble == asked:
            version.ensemble = other
            log.debug("version asked for by another name", version=manifest.version, ensemble=other, was=asked)
        return True

    def _scores(self, batch: Batch, version: _Version, result: InferResult, sent_s: float) -> list[Inference]:
        received_s = time.monotonic()
        score, map_score, distance, anomaly_map = (_tensor(result, name) for name in OUTPUTS)
        request = _request(batch)
        return [
            Inference(
                frame,
                scores=Scores(float(score[i, 0]), float(map_score[i, 0]), float(distance[i, 0])),
                anomaly_map=anomaly_map[i],
                model=version.model,
                sent_s=sent_s,
                received_s=received_s,
                request=request,
            )
            for i, frame in enumerate(batch.frames)
        ]

    def _probe(self, client: InferenceServerClient) -> tuple[Finding, str]:
        """Say whether a replica is ready, serves what the manifests say, and answers: a server whose backend process
        has died still calls itself ready. A good one is warm afterwards."""
        versions, lacking = self._versions, set[str]()
        if (finding := _readiness(client))[0] is not Finding.GOOD:
            return finding
        for look in (self._signature, self._canary):
            for product in [name for name in versions if name not in lacking]:
                self._health.beat(replicas.PROBES)  # each look is bounded in time, the sum of them is not
                finding = look(client, versions[product])
                if finding[0] in (Finding.FAILED, Finding.REFUSED) and product in self._optional - self._served:
                    lacking.add(product)
                    self._faults[product] = finding[1]
                elif finding[0] is not Finding.GOOD:
                    return finding
        if lacking and (finding := _readiness(client))[0] is not Finding.GOOD:  # it died meanwhile: it lacks nothing
            return finding
        self._served |= versions.keys() - lacking
        return Finding.GOOD, ""

    def _signature(self, client: InferenceServerClient, version: _Version) -> tuple[Finding, str]:
        """Find the ensemble of a version: that of the product, or where it serves another one, the version's own."""
        manifest = version.manifest
        finding, words, other = self._signature_at(client, manifest, manifest.product)
        ensemble = manifest.product
        if other:
            ensemble = ensemble_of(manifest.product, manifest.version)
            if self._signature_at(client, manifest, ensemble)[0] is Finding.GOOD:
                finding, words = Finding.GOOD, ""
        if finding is Finding.GOOD:
            version.ensemble = ensemble
        return finding, words

    def _signature_at(
        self, client: InferenceServerClient, manifest: Manifest, ensemble: str
    ) -> tuple[Finding, str, bool]:
        """Compare an ensemble with a manifest; says as well whether it may be another version's, or none."""
        product = manifest.product
        try:
            metadata = client.get_model_metadata(ensemble, as_json=True, client_timeout=_METADATA_TIMEOUT_S)
        except (InferenceServerException, ValueError) as error:  # ValueError: the channel is closed
            remedy = f"let it serve {self._settings.models_repo}"
            words = f"does not serve product {product!r} ({_words(error) or 'does not answer'}): {remedy}"
            return Finding.FAILED, words, is_unknown(words)
        if faults := signature_faults(metadata, manifest):
            words = f"product {product!r}: its signature is not the manifest's: {'; '.join(faults)}"
            return Finding.REFUSED, words, True
        return Finding.GOOD, "", False

    def _canary(self, client: InferenceServerClient, version: _Version) -> tuple[Finding, str]:
        """Let a replica judge a black picture; one that is only late or full is not at fault."""
        manifest = version.manifest
        picture = np.zeros((1, manifest.input.height, manifest.input.width, 3), np.uint8)
        try:
            client.infer(version.ensemble, [_input(picture)], outputs=self._outputs, client_timeout=_CANARY_TIMEOUT_S)
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


def _version(manifest: Manifest) -> _Version:
    model = Model(manifest.product, str(manifest.version), manifest.model_sha256)
    return _Version(manifest, manifest.product, model)


def _mismatch(manifest: Manifest, count: int, result: InferResult) -> str:
    """Compare an answer's version and shapes with the manifest's; '' when they fit.

    A replica that was started anew behind the same address may serve another version from one batch to the next.
    """
    version = result.get_response().model_version
    if version != str(manifest.version):
        return f"version {version} answers, not {manifest.version}"
    shapes = [_tensor(result, name).shape for name in OUTPUTS]
    if shapes != [(count, 1)] * 3 + [(count, *manifest.map_shape)]:
        return f"tensors of the shapes {shapes}"
    return ""


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
