"""The manifest beside an exported ensemble: what the network is, and the numbers that belong to it.

Read once at start from the model repository. It says which tensors Triton has to offer, which thresholds were suggested
by the validation normals, and on which scale a heat map is drawn. Written by the training room; never by the line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ConfigError
from pipeline.types import Threshold, ThresholdSource

Finite = Annotated[float, Field(allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    # A newer exporter may add keys; the line reads those it knows.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Input(_Part):
    """The picture that the network takes: UINT8, RGB, HWC, at this size."""

    height: Annotated[int, Field(ge=16, le=8192)]
    width: Annotated[int, Field(ge=16, le=8192)]
    dtype: Literal["uint8"]
    layout: Literal["HWC"]
    colour: Literal["RGB"]


class Limits(_Part):
    """Suggested thresholds on the fused score, from validation normals."""

    ng: Finite
    review: Finite

    @model_validator(mode="after")
    def _ordered(self) -> Limits:
        if self.review > self.ng:
            raise ValueError("`review` lies above `ng`")
        return self


class Fusion(_Part):
    """Mean and deviation of each branch on validation normals, and the weight of the second one."""

    map_mean: Finite
    map_std: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    mahalanobis_mean: Finite
    mahalanobis_std: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class HeatMapScale(_Part):
    """Map values: `limit` is where a pixel counts as anomalous, `low` to `high` is the fixed colour scale."""

    limit: Finite
    low: Finite
    high: Finite


class Calibration(_Part):
    """What the validation normals said."""

    fusion: Fusion
    thresholds: Limits
    heatmap: HeatMapScale


class Manifest(_Part):
    """One exported product."""

    schema_version: Literal[1]
    product: str
    method: str
    version: Annotated[int, Field(ge=1)]
    input: Input
    preprocessing: Literal["resize-area-v1"]
    map_shape: tuple[int, int]
    calibration: Calibration
    model_sha256: Sha256

    @property
    def suggestion(self) -> Threshold:
        """The thresholds that hold as long as nobody has set others."""
        limits = self.calibration.thresholds
        return Threshold(limits.ng, limits.review, 0, ThresholdSource.MANIFEST, self.model_sha256)


def read_manifest(models_repo: Path, product: str) -> Manifest:
    """Read a product's manifest. Raises ConfigError naming the product, and those that the repository has."""
    path = models_repo / product / "manifest.json"
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(_absent(models_repo, product), hint="`logicrd-train export` writes a product") from None
    except OSError as error:
        raise ConfigError(f"manifest {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        raise ConfigError(f"manifest {path}: {place}: {first['msg']}", hint="export the product again") from None
    if manifest.product != product:
        raise ConfigError(f"manifest {path} is of product {manifest.product!r}, not {product!r}")
    return manifest


def products_in(models_repo: Path) -> list[str]:
    """Name the products that a repository has, by their manifests."""
    return sorted(path.parent.name for path in models_repo.glob("*/manifest.json"))


def _absent(models_repo: Path, product: str) -> str:
    if not models_repo.is_dir():
        return f"model repository {models_repo} does not exist"
    return f"product {product!r} is not in {models_repo}; it has: {', '.join(products_in(models_repo)) or 'none'}"
