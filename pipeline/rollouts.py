"""A version on trial beside the one in force: which one, how, and for which parts.

It lies in the model repository beside the product's manifest, where workers look already: one rename puts it in force
with the candidate's manifest and under the same rights as what is served, and it needs no other server. `canary` parts
are judged by the candidate instead, `shadow` parts by both. Which parts follows from their ids alone, so that every
view of a part, on every worker, goes the same way. Written by `promotion`, read by workers and the commands.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ConfigError, first_fault
from pipeline.manifest import Manifest, Sha256, manifest_at
from pipeline.places import Where
from pipeline.stores import store_of

ROLLOUT = "rollout.json"
CANDIDATE = "candidate.json"
"""The candidate's manifest, byte for byte."""
_RANGE = 2**64


class Rollout(BaseModel):
    """What is tried: `percent` of a product's parts, by this version."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    schema_version: Literal[1] = 1
    mode: Literal["canary", "shadow"]
    version: Annotated[int, Field(ge=1)]
    model_sha256: Sha256
    percent: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
    at: str
    by: str
    reason: str = ""

    def takes(self, part_id: str) -> bool:
        """Whether a part is among those that the candidate judges; a higher percentage keeps all of a lower one's."""
        number = int.from_bytes(hashlib.sha256(part_id.encode()).digest()[:8], "big")
        return number < self.percent / 100 * _RANGE


def read_rollout(models_repo: Where, product: str) -> Rollout | None:
    """Read what is tried of a product; None when nothing is. Raises ConfigError, for S3 also DependencyError."""
    store, name = store_of(models_repo), f"{product}/{ROLLOUT}"
    path = store.path(name)
    try:
        content = store.read(name)
        return None if content is None else Rollout.model_validate_json(content)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        hint = "start it again with `logicrd models`"
        raise ConfigError(f"{path}: {first_fault(error)}", hint=hint) from None


def read_candidate(models_repo: Where, product: str, rollout: Rollout, signer: Path | None = None) -> Manifest:
    """Read the manifest of the version that is tried, as `manifest_at` does. Raises ConfigError, also when it is
    another one's."""
    manifest = manifest_at(models_repo, name := f"{product}/{CANDIDATE}", signer)
    if manifest is None or manifest.model_sha256 != rollout.model_sha256:
        path = store_of(models_repo).path(name)
        raise ConfigError(f"{path} is not the manifest of version {rollout.version} of {product!r}")
    return manifest
