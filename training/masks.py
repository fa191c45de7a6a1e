"""Reads defect masks: MVTec LOCO's one PNG a defect with its saturation, and MVTec AD's one PNG a picture.

Checks all of them on load and keeps none: an image's masks are decoded when asked for. Every error names the file and
the remedy. Called by `evaluate` and, before training, by `cli`.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from training.data import SUFFIXES, TEST_KINDS, DataFolder, Layout, decode, picture_size, read_header, read_raw
from training.errors import DataError
from training.spro import Channel

CONFIG = "defects_config.json"
GROUND_TRUTH = "ground_truth"


class DefectType(BaseModel):
    """One entry of defects_config.json; keys that the official evaluation does not read are ignored.

    `saturation_threshold` is a share of the mask in (0, 1] where `relative_saturation`, else whole pixels at original
    size.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    defect_name: Annotated[str, Field(min_length=1)]
    pixel_value: Annotated[int, Field(ge=1, le=255)]
    saturation_threshold: Annotated[float, Field(gt=0)]
    relative_saturation: bool

    @model_validator(mode="after")
    def _check_threshold(self) -> "DefectType":
        if self.relative_saturation and self.saturation_threshold > 1:
            raise ValueError("a relative saturation_threshold lies in (0, 1]")
        if not self.relative_saturation and self.saturation_threshold != int(self.saturation_threshold):
            raise ValueError("an absolute saturation_threshold is a whole number of pixels")
        return self

    def saturated_area(self, area: int) -> int:
        """Pixels that count as all of a mask of `area` pixels; 0 where the share of a tiny mask is under one pixel."""
        if self.relative_saturation:
            return math.floor(self.saturation_threshold * area)
        return min(int(self.saturation_threshold), area)


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """The mask files of every anomalous test picture, and the defect each shows; in MVTec AD's layout no `types`."""

    types: dict[int, DefectType]
    files: dict[Path, tuple[Path, ...]]
    defects: dict[Path, tuple[str, ...]] = field(default_factory=dict)

    @property
    def all_files(self) -> tuple[Path, ...]:
        """Every mask, in the order of the pictures."""
        return tuple(file for files in self.files.values() for file in files)

    def channels(self, picture: Path) -> tuple[Channel, ...]:
        """The masks of one test picture, (H, W) at original size; none of a good picture. Raises as `open_masks`."""
        return tuple(self._channel(picture, file) for file in self.files.get(picture, ()))

    def _channel(self, picture: Path, file: Path) -> Channel:
        grey = read_mask(file)
        mask = grey > 0
        area = int(mask.sum())
        if area == 0:
            raise DataError(f"mask '{file}': marks no pixel; remove it or draw the defect")
        if not self.types:
            return Channel(picture.parent.name, mask, area)
        defect = self._type(file, np.unique(grey[mask]))
        saturated = defect.saturated_area(area)
        if saturated < 1:
            raise DataError(
                f"mask '{file}': {defect.saturation_threshold:g} of its {area} pixels is less than one, so sPRO is "
                f"undefined; raise saturation_threshold of '{defect.defect_name}' or draw the defect larger"
            )
        return Channel(defect.defect_name, mask, saturated)

    def _type(self, file: Path, values: NDArray[np.uint8]) -> DefectType:
        if len(values) > 1:
            shown = ", ".join(str(value) for value in values[:5])
            raise DataError(f"mask '{file}': holds several grey values ({shown}); one file holds one defect")
        if int(values[0]) not in self.types:
            known = ", ".join(str(value) for value in sorted(self.types))
            raise DataError(f"mask '{file}': grey value {values[0]} is not in {CONFIG}, which has {known}")
        return self.types[int(values[0])]


def open_masks(data: DataFolder) -> GroundTruth | None:
    """Finds and checks every mask of a test split; None where the data come without any.

    Without masks come plain folders, and MVTec layouts that have neither ground_truth/ nor defects_config.json; then
    only image-level figures can be had. Where there are some, every anomalous picture needs its own. Raises DataError
    for a missing, left-over, empty, mis-sized or many-valued mask, and for a broken defects_config.json.
    """
    root = data.root / GROUND_TRUTH
    config = data.root / CONFIG
    if data.layout is Layout.FOLDER or not data.test or not (root.exists() or config.exists()):
        return None
    if data.layout is Layout.LOCO:
        truth = GroundTruth(read_defects_config(config), _loco_files(data))
        _refuse_strays(root, {file.parent for file in truth.all_files})
    else:
        truth = GroundTruth({}, _mvtec_ad_files(data))
        _refuse_strays(root, set(truth.all_files))
    for picture, files in truth.files.items():
        _check_sizes(picture, files)
        truth.defects[picture] = tuple(channel.defect for channel in truth.channels(picture))
    return truth


def read_defects_config(path: Path) -> dict[int, DefectType]:
    """Grey value to defect type. Raises DataError that names file and entry; see `DefectType` for what is checked."""
    try:
        types = TypeAdapter(list[DefectType]).validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"'{path}': cannot be read ({error.strerror}); masks need it to name their defects") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"]) or "the file"
        raise DataError(f"'{path}': {place}: {first['msg']}") from error
    found = {defect.pixel_value: defect for defect in types}
    if not types or len(found) < len(types):
        fault = "lists no defect" if not types else "gives one pixel_value to two entries"
        raise DataError(f"'{path}': {fault}; every defect needs a grey value of its own")
    return found


def read_mask(path: Path) -> NDArray[np.uint8]:
    """(H, W) uint8 grey values of a mask; raises DataError where the file is no grey PNG of at most 8 bits."""
    raw = read_raw(path)
    header = read_header(path, raw)
    if path.suffix.lower() != ".png" or header.colour != "grey" or header.bits > 8 or header.alpha:
        raise DataError(f"mask '{path}': is {header.bits} bit {header.colour}; save it as an 8 bit grey PNG")
    return decode(path, raw, header, cv2.IMREAD_GRAYSCALE)


def _loco_files(data: DataFolder) -> dict[Path, tuple[Path, ...]]:
    files: dict[Path, tuple[Path, ...]] = {}
    for kind in ("logical", "structural"):
        for picture in data.test.get(kind, ()):
            folder = data.root / GROUND_TRUTH / TEST_KINDS[kind] / picture.stem
            masks = tuple(sorted(folder.glob("*.png"))) if folder.is_dir() else ()
            if not masks:
                raise DataError(f"mask folder '{folder}': missing or empty; '{picture}' needs one PNG a defect there")
            files[picture] = masks
    return files


def _mvtec_ad_files(data: DataFolder) -> dict[Path, tuple[Path, ...]]:
    files: dict[Path, tuple[Path, ...]] = {}
    for picture in data.test.get("structural", ()):
        mask = data.root / GROUND_TRUTH / picture.parent.name / f"{picture.stem}_mask.png"
        if not mask.is_file():
            raise DataError(f"mask '{mask}': missing; '{picture}' needs it")
        files[picture] = (mask,)
    return files


def _refuse_strays(root: Path, known: set[Path]) -> None:
    """A mask without a picture is a picture lost, or a name misspelt. `known` lie two levels below `root`."""
    for path in sorted(root.glob("*/*")):
        if path not in known and (path.is_dir() or path.suffix.lower() in SUFFIXES):
            raise DataError(f"mask '{path}': belongs to no test picture; remove it, or put its picture into test/")


def _check_sizes(picture: Path, masks: tuple[Path, ...]) -> None:
    expected = picture_size(picture)
    for mask in masks:
        if (found := picture_size(mask)) != expected:
            sizes = f"{found[1]} x {found[0]}, '{picture}' {expected[1]} x {expected[0]}"
            raise DataError(f"mask '{mask}': is {sizes}; masks have the size of their picture")
