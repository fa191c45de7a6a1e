"""The manifest beside an exported ensemble: what the network is, and the numbers that belong to it.

Read from the model repository at start, and again when another version is promoted. It says which tensors Triton has to
offer, which thresholds were suggested by the validation normals, on which scale a heat map is drawn, and which part of
a camera's picture the network saw. Where the line file names a signer, nothing of a manifest is read that it did not
sign. Written by the training room; never by the line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.cameras import Camera, graph_cameras
from pipeline.errors import ConfigError, first_fault
from pipeline.places import Where
from pipeline.region import RegionOfInterest
from pipeline.signatures import SUFFIX, fault_of_signature
from pipeline.stores import Store, store_of
from pipeline.types import Model, Threshold, ThresholdSource

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


class Quantiles(_Part):
    """Quantiles of the validation normals' fused score by their level, `{"0.99": 4.2}`, interpolated linearly."""

    score: dict[Annotated[str, Field(pattern=r"^(0\.[0-9]+|1\.0+)$")], Finite]


class Calibration(_Part):
    """What the validation normals said; `images` is how many they were. Old exports tell no number and no quantiles."""

    images: Annotated[int, Field(ge=1)] | None = None
    quantiles: Quantiles | None = None
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
    preprocessing: Literal["resize-area-v1", "region-v1+resize-area-v1"]
    region: RegionOfInterest | None = None
    map_shape: tuple[int, int]
    calibration: Calibration
    model_sha256: Sha256
    files: dict[str, Sha256] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _region_as_said(self) -> Manifest:
        if (self.region is None) != (self.preprocessing == "resize-area-v1"):
            raise ValueError("`preprocessing` and `region` do not fit together")
        if self.region is not None and self.region.by_file:
            raise ValueError("`region.mask` is a path: it must lie in the manifest itself")
        return self

    @property
    def suggestion(self) -> Threshold:
        """The thresholds that hold as long as nobody has set others."""
        limits = self.calibration.thresholds
        return Threshold(limits.ng, limits.review, 0, ThresholdSource.MANIFEST, self.model_sha256)


class Manifests(dict[str, Manifest]):
    """The version in force of each product; beside them other versions whose answers may still come.

    Written by one thread at a time, read by all: each change is one assignment.
    """

    def __init__(self, manifests: Mapping[str, Manifest]) -> None:
        super().__init__(manifests)
        self._beside: dict[tuple[str, str], Manifest] = {}

    def of(self, product: str, model: Model | None) -> Manifest | None:
        """Give the manifest of the network that gave a score; without one, that of the version in force."""
        manifest = self.get(product)
        if model is None or (manifest is not None and manifest.model_sha256 == model.sha256):
            return manifest
        return self._beside.get((product, model.sha256))

    def keep(self, product: str, *versions: Manifest) -> None:
        """Let these be all the versions of a product that are known beside the one in force."""
        kept = {(product, version.model_sha256): version for version in versions}
        self._beside = {key: version for key, version in self._beside.items() if key[0] != product} | kept


def ensemble_of(product: str, version: int) -> str:
    """Name the ensemble that serves this version, whichever `product` itself serves; `logicrd models` makes it."""
    return f"{product}.v{version}"


def other_pictures(manifest: Manifest, other: Manifest) -> str:
    """Say in which way two versions ask for other pictures; '' when a frame made for one can be judged by the other.

    A frame is brought to a model's size and region before anyone knows which version will judge it.
    """
    names = ("input", "region", "preprocessing")
    return ", ".join(name for name in names if getattr(manifest, name) != getattr(other, name))


def read_manifest(models_repo: Where, product: str, signer: Path | None = None) -> Manifest:
    """Read a product's manifest, see `manifest_at`. Raises ConfigError naming the product, and those that are there."""
    manifest = manifest_at(models_repo, f"{product}/manifest.json", signer)
    if manifest is None:
        raise ConfigError(_absent(models_repo, product), hint="`logicrd-train export` writes a product")
    return manifest


def manifest_at(models_repo: Where, name: str, signer: Path | None = None) -> Manifest | None:
    """Read a manifest in the folder of its product; None when it is not there.

    With `signer`, a file of public keys, one of them has to have signed it, and weights that are there to be read have
    to be those that it lists; blocks while they are. Raises ConfigError, for a repository in S3 also DependencyError.
    """
    store, product = store_of(models_repo), name.partition("/")[0]
    path = store.path(name)
    try:
        data = store.read(name)
        signature = None if signer is None else store.read(name + SUFFIX)
    except OSError as error:
        raise ConfigError(f"manifest {path}: {error.strerror}") from None
    if data is None:
        return None
    if signer is not None and (fault := fault_of_signature(data, signature, signer)):
        raise ConfigError(f"manifest {path}: {fault}", hint="`logicrd models sign`, before it is pushed")
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise ConfigError(f"manifest {path}: {first_fault(error)}", hint="export the product again") from None
    if manifest.product != product:
        raise ConfigError(f"manifest {path} is of product {manifest.product!r}, not {product!r}")
    if signer is not None and (others := _other_files(store, manifest)):
        raise ConfigError(f"manifest {path}: not its files: {', '.join(others)}", hint="promote the version again")
    return manifest


def _other_files(store: Store, manifest: Manifest) -> list[str]:
    """Name the weights that are not those of the manifest. A worker that has manifests alone can compare none."""
    others = []
    for name, digest in manifest.files.items():
        if name.endswith("/config.pbtxt"):  # it may have been tuned
            continue
        try:
            if store.digest(name) not in (digest, None):
                others.append(name)
        except OSError as error:
            others.append(f"{name} ({error.strerror})")
    return others


def products_in(models_repo: Where) -> list[str]:
    """Name the products that a repository has, by their manifests. Raises DependencyError for one in S3."""
    return [name.partition("/")[0] for name in store_of(models_repo).names("*/manifest.json")]


def with_models_region(camera: Camera, manifest: Manifest) -> Camera:
    """Give a camera that has no region of its own the one that its model was trained with. Raises ConfigError."""
    region = manifest.region
    if region is not None and graph_cameras([camera]):
        raise ConfigError(
            f"camera {camera.id!r}: product {camera.product!r} sees a region, and `inference: graph` shows it whole "
            "pictures",
            hint="set `inference: line`, or train the product on whole pictures",
        )
    if camera.region is not None or region is None:
        return camera
    if camera.picture_size not in (None, region.picture_size):
        width, height = region.picture_size
        raise ConfigError(
            f"camera {camera.id!r}: `picture_size` is not {width} x {height}, which the region of product "
            f"{camera.product!r} is made for",
            hint="give the camera a `region` of its own, which shows the part as the model's does",
        )
    return camera.model_copy(update={"region": region})


def region_doubts(cameras: Sequence[Camera], manifests: Mapping[str, Manifest]) -> list[str]:
    """Name the cameras whose own region is not the one that their model was trained with.

    It may be right: a camera that is mounted otherwise needs another region to show the same. Raises ConfigError.
    """
    doubts = []
    for camera in cameras:
        trained = manifests[camera.product].region
        region = with_models_region(camera, manifests[camera.product]).region
        if region is not None and not region.same_as(trained):
            on = "whole pictures" if trained is None else "another region"
            doubts.append(f"camera {camera.id!r}: product {camera.product!r} was trained on {on}")
    return doubts


def _absent(models_repo: Where, product: str) -> str:
    if not store_of(models_repo).exists():
        return f"model repository {models_repo} does not exist"
    return f"product {product!r} is not in {models_repo}; it has: {', '.join(products_in(models_repo)) or 'none'}"
