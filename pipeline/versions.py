"""A version of a product as the Triton client knows it: which ensemble of a replica serves it, and how a trial goes.

Asks nobody. Owned by `inference`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakSet

from tritonclient.grpc import InferenceServerClient

from pipeline.balance import is_unknown
from pipeline.manifest import Manifest, ensemble_of
from pipeline.rollouts import Rollout
from pipeline.types import Model


@dataclass(slots=True, eq=False)
class Version:
    """A version; `moved` are the replicas whose ensemble of the product's name serves another one.

    `rollout` for one that is on trial, with the batches in a row that it failed, and why it is tried no longer.
    """

    manifest: Manifest
    model: Model
    moved: WeakSet[InferenceServerClient] = field(default_factory=WeakSet)
    rollout: Rollout | None = None
    failures: int = 0
    fault: str = ""

    @property
    def mode(self) -> str:
        """How it is tried: `canary` or `shadow`; '' for one in force."""
        return "" if self.rollout is None else self.rollout.mode

    def ensemble_at(self, client: InferenceServerClient) -> str:
        """Name the ensemble to ask for at a replica."""
        if self.rollout is None and client not in self.moved:
            return self.manifest.product
        return ensemble_of(self.manifest.product, self.manifest.version)

    def has_moved(self, client: InferenceServerClient, asked: str, answers: str | None, words: str) -> bool:
        """Whether the ensemble that was asked serves another version now (`answers`), or none.

        Then the replica is asked for the other name from here on: a promotion leaves the version before under a name of
        its own.
        """
        if answers == str(self.manifest.version) or (answers is None and not is_unknown(words)):
            return False
        if asked == self.manifest.product:
            self.moved.add(client)
        else:
            self.moved.discard(client)
        return True


def version_of(manifest: Manifest) -> Version:
    """Make a version that is in force."""
    return Version(manifest, Model(manifest.product, str(manifest.version), manifest.model_sha256))
