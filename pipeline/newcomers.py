"""Products that come while the line runs: exported to the model repository, and served by every replica of Triton.

One thread looks every few seconds. A product is the line's only once its manifest can be read, every replica in use
serves it with that signature and has judged a black picture of it, and its threshold is known; then the cameras of the
pool that wait for it are read. A product that the line knows already is not looked at: a new version of it takes a
restart. Judges nothing. Owned by `app`.
"""

from __future__ import annotations

import threading
from pathlib import Path

import structlog

from pipeline.errors import ConfigError
from pipeline.inference import InferenceClient
from pipeline.manifest import Manifest, products_in, read_manifest
from pipeline.thresholds import ThresholdCache

LOOK_EVERY_S = 10.0
_STAGE = "new products"

log = structlog.get_logger(__name__)


class Newcomers:
    """Adds to `manifests`, which all stages share; nobody else changes it while this is at work."""

    def __init__(
        self,
        models_repo: Path,
        manifests: dict[str, Manifest],
        inference: InferenceClient,
        thresholds: ThresholdCache,
    ) -> None:
        self._models_repo = models_repo
        self._manifests = manifests
        self._inference = inference
        self._thresholds = thresholds
        # Why a product is not the line's yet, as last said.
        self._faults: dict[str, str] = {}
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

    def look(self) -> None:
        """Take every product that can be judged from now on; of the others say why not, once."""
        there = products_in(self._models_repo)
        self._faults = {product: fault for product, fault in self._faults.items() if product in there}
        for product in there:
            if product in self._manifests or self._stop.is_set():
                continue
            if fault := self._learn(product):
                if fault != self._faults.get(product):
                    self._faults[product] = fault
                    log.warning("new product not judged yet", product=product, error=fault)
            else:
                self._faults.pop(product, None)
                log.info("new product", product=product, version=self._manifests[product].version)

    def _learn(self, product: str) -> str:
        """Take a product; gives what is wrong with it, '' when it is the line's."""
        try:
            manifest = read_manifest(self._models_repo, product)
        except ConfigError as error:
            return str(error)
        if fault := self._inference.learn(manifest):
            return fault
        if not self._thresholds.learn(manifest):
            return "its threshold is not known yet"
        self._manifests[product] = manifest
        return ""

    def _run(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            try:
                self.look()
            except Exception:  # the thread's top frame: the line goes on with what it knows, and the fault is seen
                log.exception("looking for new products failed")
