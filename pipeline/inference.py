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
from dataclasses import dataclass, replace

import numpy as np
import structlog
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException

from pipeline import replicas
from pipeline.balance import Fault, Finding, Replica, fault_of, is_unknown
from pipeline.health import Health
from pipeline.manifest import Manifest, ensemble_of
from pipeline.metrics import Metrics
from pipeline.replicas import ReplicaPool, Resolve
from pipeline.rollouts import Rollout
from pipeline.servers import Triton as TritonSettings
from pipeline.tensors import OUTPUTS, input_of, mismatch, pictures_of, signature_faults, tensor
from pipeline.types import Batch, Cause, Inference, Scores
from pipeline.verdict import finite
from pipeline.versions import Version, version_of

_SHORTEST_CALL_S = 0.02
_READY_TIMEOUT_S = 2.0
_METADATA_TIMEOUT_S = 5.0
_CANARY_TIMEOUT_S = 5.0
_MOST_FAILURES = 3

Done = Callable[[list[Inference]], None]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Request:
    """A batch on its way; `failed` is the replica that did not answer the first time."""

    batch: Batch
    version: Version
    tensor: InferInput
    done: Done
    failed: Replica | None = None


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
        self._versions = {name: version_of(manifest) for name, manifest in manifests.items()}
        # Of the start: products that a replica may lack, those that one has, and what is wrong with the others.
        self._optional: frozenset[str] = frozenset()
        self._served: set[str] = set()
        self._faults: dict[str, str] = {}
        self._candidates: dict[str, Version] = {}
        self._metrics = metrics
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
        in_use, version = self._pool.in_use(), version_of(manifest)
        for replica, client in in_use:
            for look in (self._signature, self._canary):
                finding, words = look(client, version)
                if finding is not Finding.GOOD:
                    return f"Triton at {replica.address}: {words}"
        return "" if in_use else "no replica of Triton is in use"

    def take(self, manifest: Manifest) -> None:
        """Send a product's batches to this version from now on; every replica has to serve it."""
        self._versions = {**self._versions, manifest.product: version_of(manifest)}

    def offer(self, manifest: Manifest, rollout: Rollout) -> None:
        """Let a version that was checked be tried on a share of its product's parts."""
        version = replace(version_of(manifest), rollout=rollout)
        self._candidates = {**self._candidates, manifest.product: version}

    def withdraw(self, product: str) -> None:
        """Try no version of a product any more."""
        self._candidates = {name: version for name, version in self._candidates.items() if name != product}

    def candidate_fault(self, product: str) -> str:
        """Say why the version on trial is tried no longer; '' while it is."""
        version = self._candidates.get(product)
        return "" if version is None else version.fault

    def shadow(self, product: str) -> Rollout | None:
        """Give what is tried of a product without giving verdicts; None when nothing is."""
        return None if (version := self._tried(product, "shadow")) is None else version.rollout

    def require_all(self) -> list[str]:
        """Give the address of every replica; raises as `start` does when one of them is not good."""
        return self._pool.require_all()

    def close(self) -> None:
        """Close every connection; answers under way come back as `triton_unavailable`."""
        self._pool.close()

    def wait_for_room(self, timeout_s: float) -> int:
        """Wait until a replica has room, and give for how many frames; any number at once when none is in use, which
        `submit` then says; 0 after `timeout_s`."""
        return self._pool.wait_for_room(timeout_s)

    def submit(self, batch: Batch, done: Done) -> None:
        """Send a batch; `done` gets one inference a frame, later, on another thread.

        The call's deadline is that of the youngest frame; an older one is given up by whoever watches deadlines. Parts
        of a canary go to the candidate, in a request of their own: then `done` is called twice.
        """
        stable, canary = self._versions[batch.product], self._tried(batch.product, "canary")
        if canary is None or canary.rollout is None:
            self._send(_Request(batch, stable, pictures_of(batch), done))
            return
        takes = canary.rollout.takes
        for version, is_canary in ((stable, False), (canary, True)):
            frames = tuple(frame for frame in batch.frames if takes(frame.part_id) is is_canary)
            if frames:
                part = Batch(batch.product, frames)
                self._send(_Request(part, version, pictures_of(part), done))

    def submit_beside(self, batch: Batch, done: Done) -> bool:
        """Let the shadow judge a batch, if a replica has nothing else to do; says whether it will."""
        version = self._tried(batch.product, "shadow")
        if version is None or not self._pool.is_idle():
            return False
        self._send(_Request(batch, version, pictures_of(batch), done))
        return True

    def _tried(self, product: str, mode: str) -> Version | None:
        version = self._candidates.get(product)
        return version if version is not None and version.mode == mode and not version.fault else None

    def _send(self, request: _Request) -> None:
        """Send a batch to the next replica."""
        frames = request.batch.frames
        if max(frame.deadline_s for frame in frames) - time.monotonic() < _SHORTEST_CALL_S:
            request.done([Inference(frame, cause=Cause.DEADLINE) for frame in frames])
        elif (taken := self._pool.take(len(frames), request.failed)) is None:
            request.done([Inference(frame, cause=Cause.TRITON_UNAVAILABLE) for frame in frames])
        else:
            self._ask(request, *taken)

    def _ask(
        self,
        request: _Request,
        replica: Replica,
        client: InferenceServerClient,
        first: list[Inference] | None = None,
    ) -> None:
        """Ask a replica, and again where it may serve the version by its other name; `first` is what it said then."""
        batch, version, ensemble = request.batch, request.version, request.version.ensemble_at(client)
        sent_s = time.monotonic()
        remaining_s = max(_SHORTEST_CALL_S, max(frame.deadline_s for frame in batch.frames) - sent_s)
        if version.rollout is not None:  # what is left is for the version in force, if this one is too slow
            remaining_s /= 2

        def answered(result: InferResult | None, error: InferenceServerException | None) -> None:
            inferences, fault, words = self._read(batch, version, result, error, sent_s)
            answers = None if result is None else str(result.get_response().model_version)
            if version.rollout is not None and self._failed(version, inferences, fault, words):
                self._give_up(request, replica, inferences)
            elif first is None and fault is Fault.SICK and version.has_moved(client, ensemble, answers, words):
                self._ask(request, replica, client, inferences)
            elif first is not None and is_unknown(words):
                self._finish(request, replica, first, fault, words)
            else:
                self._finish(request, replica, inferences, fault, words)

        try:
            client.async_infer(
                ensemble,
                [request.tensor],
                answered,
                outputs=self._outputs,
                client_timeout=remaining_s,
                headers=None if (trace := _request(batch)) is None else {"traceparent": trace},
            )
        except (InferenceServerException, ValueError) as error:  # ValueError: the channel is closed
            log.debug("inference not sent", product=batch.product, replica=replica.address, error=str(error))
            self._pool.give_back(replica, len(batch.frames), Fault.GONE, str(error), first_try=False)
            request.done([Inference(frame, cause=Cause.TRITON_UNAVAILABLE, sent_s=sent_s) for frame in batch.frames])

    def _finish(
        self, request: _Request, replica: Replica, inferences: list[Inference], fault: Fault | None, words: str
    ) -> None:
        """Hand the answers over, or send the batch once more."""
        frames = len(request.batch.frames)
        again = self._pool.give_back(replica, frames, fault, words, first_try=request.failed is None)
        if fault is not None:
            tell = log.error if inferences[0].cause is Cause.MODEL_MISMATCH else log.debug
            tell("inference failed", product=request.batch.product, replica=replica.address, error=words)
        if again:
            self._send(replace(request, failed=replica))
        else:
            request.done(inferences)

    def _give_up(self, request: _Request, replica: Replica, inferences: list[Inference]) -> None:
        """Let the version in force judge what a canary could not; a shadow is not missed."""
        frames = len(request.batch.frames)
        self._pool.give_back(replica, frames, None, "", first_try=False)  # it is not the replica's fault
        if request.version.mode == "canary":
            self._send(replace(request, version=self._versions[request.batch.product], failed=None))
        else:
            request.done(inferences)

    def _failed(self, version: Version, inferences: list[Inference], fault: Fault | None, words: str) -> bool:
        """Count what a version on trial did with a batch; says whether it failed it. After some in a row it is tried no
        longer by this worker."""
        product = version.manifest.product
        if fault in (Fault.GONE, Fault.BUSY):  # of the replica, which is any version's
            return False
        if fault is None and not all(finite(each.scores) for each in inferences if each.scores is not None):
            fault, words = Fault.SICK, "a score is not finite"
        is_canary = version.mode == "canary"
        if fault is None:
            version.failures = 0
            if is_canary:
                self._count(version, "judged", inferences)
            return False
        version.failures += 1
        if is_canary:
            self._count(version, "failed", inferences)
        if version.failures >= _MOST_FAILURES and not version.fault:
            version.fault = f"failed {_MOST_FAILURES} batches in a row: {words}"
            log.error("version on trial given up", product=product, version=version.manifest.version, error=words)
        return True

    def _count(self, version: Version, outcome: str, inferences: list[Inference]) -> None:
        labels = (version.manifest.product, str(version.manifest.version), outcome)
        self._metrics.candidates.labels(*labels).inc(len(inferences))

    def _read(
        self,
        batch: Batch,
        version: Version,
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
        if why := mismatch(version.manifest, len(batch.frames), result):
            inferences = [Inference(frame, cause=Cause.MODEL_MISMATCH, sent_s=sent_s) for frame in batch.frames]
            return inferences, Fault.SICK, why
        return self._scores(batch, version, result, sent_s), None, ""

    def _scores(self, batch: Batch, version: Version, result: InferResult, sent_s: float) -> list[Inference]:
        received_s = time.monotonic()
        score, map_score, distance, anomaly_map = (tensor(result, name) for name in OUTPUTS)
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

    def _signature(self, client: InferenceServerClient, version: Version) -> tuple[Finding, str]:
        """Find the ensemble of a version: that of the product, or where it serves another one, the version's own."""
        manifest = version.manifest
        finding, words, other = self._signature_at(client, manifest, manifest.product)
        own = ensemble_of(manifest.product, manifest.version)
        if other and self._signature_at(client, manifest, own)[0] is Finding.GOOD:
            version.moved.add(client)
            return Finding.GOOD, ""
        version.moved.discard(client)
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

    def _canary(self, client: InferenceServerClient, version: Version) -> tuple[Finding, str]:
        """Let a replica judge a black picture; one that is only late or full is not at fault."""
        manifest = version.manifest
        picture = np.zeros((1, manifest.input.height, manifest.input.width, 3), np.uint8)
        try:
            client.infer(
                version.ensemble_at(client),
                [input_of(picture)],
                outputs=self._outputs,
                client_timeout=_CANARY_TIMEOUT_S,
            )
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


def _status(error: InferenceServerException) -> str:
    return str(error.status()).removeprefix("StatusCode.")


def _words(error: InferenceServerException | ValueError) -> str:
    return str(error.message() or "") if isinstance(error, InferenceServerException) else str(error)
