"""Products and versions that come while the line runs: exported or promoted, and served by every replica of Triton.

One thread looks every few seconds. A version is the line's only once its manifest can be read and, where the line file
names a signer, is signed by it, every replica in use serves it with those tensors and has judged a black picture of it,
and its threshold is known. Until then, and for good if that never comes, parts are judged by the version before; the
log, a metric and the heartbeat say so. The same holds for a version on trial, canary or shadow. A new product is taken
by a worker of a pool alone, for the cameras that wait for it. Judges nothing. Owned by `app`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection

import structlog

from pipeline.errors import CheckError, ConfigError, DependencyError
from pipeline.inference import InferenceClient
from pipeline.manifest import Manifest, Manifests, other_pictures, products_in, read_manifest
from pipeline.metrics import Metrics
from pipeline.places import S3Address
from pipeline.rollouts import Rollout, read_candidate, read_rollout
from pipeline.servers import Triton
from pipeline.thresholds import ThresholdCache

LOOK_EVERY_S = 2.0
AGAIN_EVERY_S = 10.0
"""While something is refused, for each look probes every replica with it; and in S3, where each look is paid for."""
_VERSIONS = 4
_STAGE = "new versions"

log = structlog.get_logger(__name__)


class Newcomers:
    """Changes `manifests`, which all stages share; nobody else does while this is at work."""

    def __init__(
        self,
        settings: Triton,
        manifests: Manifests,
        inference: InferenceClient,
        thresholds: ThresholdCache,
        *,
        new_products: bool,
        graph_products: Collection[str],
        metrics: Metrics,
    ) -> None:
        self._models_repo = settings.models_repo
        self._signer = settings.signer_file
        self._manifests = manifests
        self._inference = inference
        self._thresholds = thresholds
        self._new_products = new_products
        self._graph_products = graph_products
        self._metrics = metrics
        # Why what the repository has of a product is not the line's yet, as last said.
        self._faults: dict[str, str] = {}
        # What is tried, and why it is not; and the versions that were judged with: their answers may come yet.
        self._rollouts: dict[str, Rollout] = {}
        self._unfit: dict[str, str] = {}
        self._versions: dict[str, deque[Manifest]] = {}
        self._unread = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=_STAGE, daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; a look under way ends with its probe."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def fault(self, product: str) -> str:
        """Say why the version that the repository has of a product is not judged with; '' when it is."""
        return self._faults.get(product, "")

    def candidate(self, product: str) -> tuple[Rollout, str] | None:
        """Give what is tried of a product, and why this worker does not try it ('' when it does); None for nothing."""
        if (rollout := self._rollouts.get(product)) is None:
            return None
        return rollout, self._unfit.get(product) or self._inference.candidate_fault(product)

    def look(self) -> None:
        """Take everything that can be judged from now on; of the rest say why not, once. While the repository's own
        server is away, all stays as it is."""
        try:
            self._look()
        except DependencyError as error:
            if not self._unread:
                log.warning("model repository not read; the versions in force go on", error=str(error), hint=error.hint)
            self._unread = str(error)
        else:
            if self._unread:
                log.info("model repository read again")
            self._unread = ""

    def _look(self) -> None:
        there = products_in(self._models_repo)
        for product in self._faults.keys() - there:
            self._settle(product)
        for product in there:
            if (product in self._manifests or self._new_products) and not self._stop.is_set():
                self._look_at(product)
            if product in self._manifests and not self._stop.is_set():
                self._look_at_candidate(product)

    def _look_at(self, product: str) -> None:
        current = self._manifests.get(product)
        try:
            manifest = read_manifest(self._models_repo, product)
            is_new = current is None or manifest.model_sha256 != current.model_sha256
            if is_new:  # that in force was checked; what is used of this one is what was signed
                manifest = read_manifest(self._models_repo, product, self._signer)
        except (CheckError, ConfigError) as error:
            self._refuse(product, str(error))
            return
        if not is_new:
            self._settle(product)
        elif fault := self._take(manifest, current):
            self._refuse(product, f"version {manifest.version}: {fault}")
        else:
            self._settle(product)
            before = None if current is None else current.version
            log.info("new version", product=product, version=manifest.version, before=before)

    def _take(self, manifest: Manifest, current: Manifest | None) -> str:
        """Judge with a version from now on; gives what is wrong with it, '' when that is so."""
        if fault := self._learn(manifest, current):
            return fault
        self._thresholds.take(manifest)
        self._inference.take(manifest)
        self._manifests[manifest.product] = manifest
        return ""

    def _look_at_candidate(self, product: str) -> None:
        """Begin, change or end what is tried of a product; a version that is unfit is looked at again."""
        fault, before, current = "", self._rollouts.get(product), self._manifests[product]
        rollout = before
        try:
            rollout = read_rollout(self._models_repo, product)
            if rollout is not None and rollout.model_sha256 == current.model_sha256:  # promoted since
                rollout = None
            if rollout == before and not self._unfit.get(product):
                return
            self._inference.withdraw(product)
            if rollout is not None:
                manifest = read_candidate(self._models_repo, product, rollout, self._signer)
                if product in self._graph_products:
                    fault = "its cameras have `inference: graph`, which asks for the version in force alone"
                elif not (fault := self._learn(manifest, current)):
                    self._inference.offer(manifest, rollout)
        except (CheckError, ConfigError) as error:
            fault = str(error)
            self._inference.withdraw(product)
        self._note_candidate(product, rollout, fault)

    def _note_candidate(self, product: str, rollout: Rollout | None, fault: str) -> None:
        self._rollouts.pop(product, None)
        if rollout is not None:
            self._rollouts[product] = rollout
        if fault and fault != self._unfit.get(product):
            log.warning("version on trial not tried", product=product, error=fault)
        elif not fault and rollout is None:
            log.info("no version on trial any more", product=product)
        elif not fault and rollout is not None:
            log.info("version on trial", product=product, **rollout.model_dump(include={"version", "mode", "percent"}))
        self._unfit[product] = fault

    def _learn(self, manifest: Manifest, current: Manifest | None) -> str:
        """Make a version known to all stages, so that whoever gets an answer of it finds the limits and the scale that
        belong to it; gives what is wrong with it. Those before stay known, for the answers that are under way."""
        product = manifest.product
        known = self._versions.setdefault(product, deque(maxlen=_VERSIONS))
        if current is not None and (others := other_pictures(manifest, current)):
            return f"takes other pictures ({others}): restart this worker"
        if fault := self._inference.check(manifest):
            return fault
        if not self._thresholds.learn(manifest):
            self._thresholds.keep(product, *known)
            return "its threshold is not known yet"
        for version in (current, manifest):
            if version is not None:
                if version in known:
                    known.remove(version)
                known.append(version)
        self._manifests.keep(product, *known)
        self._thresholds.keep(product, *known)
        return ""

    def _refuse(self, product: str, fault: str) -> None:
        if fault == self._faults.get(product):
            return
        self._faults[product] = fault
        self._metrics.versions_refused.labels(product).set(1)
        current = self._manifests.get(product)
        judged_by = "nothing" if current is None else f"version {current.version}"
        log.warning("new version not judged with", product=product, error=fault, judged_by=judged_by)

    def _settle(self, product: str) -> None:
        if self._faults.pop(product, ""):
            self._metrics.versions_refused.labels(product).set(0)

    def _run(self) -> None:
        in_s3 = isinstance(self._models_repo, S3Address)
        while not self._stop.wait(
            AGAIN_EVERY_S if in_s3 or self._faults or any(self._unfit.values()) else LOOK_EVERY_S
        ):
            try:
                self.look()
            except Exception:  # the thread's top frame: the line goes on with what it knows, and the fault is seen
                log.exception("looking for new versions failed")
