"""Settings of fitting, calibration and pre-training, read from YAML and checked on load.

Reads the one file it is given and never the environment. Unknown keys are refused with their path.
Called by `cli`; the values travel down as frozen models.
"""

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from training.errors import ConfigError

CONFIGS = Path(__file__).parent / "configs"
MAX_SEED = 2**31 - 1
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
# Names a folder of the model repository and a Triton model; long enough for people, short enough for metric labels.
PRODUCT_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")


class _Settings(BaseModel):
    # Infinity is valid YAML and never a setting.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CalibrationConfig(_Settings):
    """How far above the validation normals the suggested limits lie, in standard deviations of their scores."""

    # Sixty normals cannot show a 1-in-1000 quantile, so the limit is extrapolated from their spread instead.
    ng_sigma: Annotated[float, Field(gt=0)] = 3.0
    review_sigma: Annotated[float, Field(gt=0)] = 2.0
    mahalanobis_weight: Annotated[float, Field(ge=0, le=1000)] = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.review_sigma > self.ng_sigma:
            raise ValueError("review_sigma lies above ng_sigma: nothing would be looked at again")
        return self


class NetworkConfig(_Settings):
    """What network a run trains: all that is needed to build it again around its weights."""

    method: Literal["rd", "dskd", "logicrd"] = "logicrd"
    # Modules of LogicRD, each of which can be left out; the other methods have none of them.
    gse: bool = True
    fcp: bool = True
    nii: bool = True
    # Channels of the one-class embedding: 512 is the published size of reverse distillation for ResNet18.
    width: Annotated[int, Field(ge=8, le=2048)] = 192
    image_size: Annotated[int, Field(ge=64, le=1024, multiple_of=32)] = 256


class FitConfig(NetworkConfig):
    """One training run of one method on one product; the defaults are LogicRD's."""

    # Whether the distance branch joins the score; without it the score is the map's alone.
    mahalanobis: bool = True
    batch_size: Annotated[int, Field(ge=2, le=256)] = 16
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 5e-3
    # Attention is upset by the rate that suits the convolutions.
    attention_learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    # constant is the official recipe of reverse distillation; cosine warms up and then falls to nothing at max_steps. A
    # student that settles rebuilds anomalies too: on one product, 250 steps, cosine took the map's image AUROC from
    # 64.4 / 81.2 (logical / structural) to 53.9 / 74.3.
    schedule: Literal["constant", "cosine"] = "constant"
    max_steps: Annotated[int, Field(ge=1)] = 500
    # Wall-clock budget; whichever of steps, minutes and plateau comes first ends the run.
    max_minutes: Annotated[float, Field(gt=0)] = 60.0
    # Steps between two looks at the validation loss, and how many looks without progress end the run.
    validate_every: Annotated[int, Field(ge=1)] = 50
    patience: Annotated[int, Field(ge=1)] = 6
    # auto is bf16 autocast on a CUDA device and fp32 on a CPU: few CPUs multiply bf16 faster.
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    # Whether the teacher's features of all normals are kept on disk: faster, at about 1 MB a picture of 256 x 256.
    cache_features: bool = True
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    seed: Seed = 111
    threads: Annotated[int, Field(ge=1, le=256)] | None = None
    calibration: CalibrationConfig = CalibrationConfig()

    def network(self) -> NetworkConfig:
        """The part that describes the network alone."""
        return NetworkConfig(**self.model_dump(include=set(NetworkConfig.model_fields)))


class PretrainConfig(_Settings):
    """One pre-training run of the teacher on drawn pictures."""

    picture_size: Annotated[int, Field(ge=64, le=256, multiple_of=16)] = 112
    batch_size: Annotated[int, Field(ge=2, le=512)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    minutes: Annotated[float, Field(gt=0)] = 20.0
    max_steps: Annotated[int, Field(ge=1)] = 1_000_000
    seed: Seed = 7
    threads: Annotated[int, Field(ge=1, le=256)] | None = None
    # Processes that draw; one feeds a network on a CPU, a GPU needs as many as there are cores.
    workers: Annotated[int, Field(ge=0, le=256)] = 1
    # auto is bf16 autocast on a CUDA device and fp32 on a CPU: few CPUs multiply bf16 faster.
    precision: Literal["auto", "fp32", "bf16"] = "auto"


def check_product_name(name: str) -> str:
    """The name itself; raises ConfigError where no model repository could hold it."""
    if PRODUCT_NAME.fullmatch(name) is None:
        raise ConfigError(f"product '{name}': names match {PRODUCT_NAME.pattern}, e.g. fastener-tray; give --product")
    return name


SettingsT = TypeVar("SettingsT", FitConfig, PretrainConfig)


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key '{twice[0]}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_config(kind: type[SettingsT], path: Path) -> SettingsT:
    """Reads `path` as YAML into `kind`; raises ConfigError that names the file and the key."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)  # noqa: S506 - derives from SafeLoader
    except OSError as error:
        raise ConfigError(f"config '{path}': cannot be read ({error.strerror}); give an existing YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config '{path}': is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config '{path}': must hold keys and values, found {type(values).__name__}")
    return checked(kind, values, f"config '{path}'")


def changed(settings: SettingsT, changes: Mapping[str, object], where: str) -> SettingsT:
    """The settings with what a command line says, checked again; None changes nothing. `where` opens the message."""
    given = {key: value for key, value in changes.items() if value is not None}
    return checked(type(settings), settings.model_dump() | given, where)


def checked(kind: type[SettingsT], values: Mapping[str, object], where: str) -> SettingsT:
    """Raises ConfigError that opens with `where` and names the key."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = ", ".join(sorted(kind.model_fields))
        raise ConfigError(f"{where}: key '{key}': {first['msg']}; known keys: {known}") from error
