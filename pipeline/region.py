"""The region of interest of a camera: which part of its picture the model sees, before the resize to model size.

The mask is painted first, then the crop is cut out and turned. `training/region.py` does the same to the pictures that
a model is fitted on; the rooms share no code, and tests/contract/test_region.py holds the two equal. Opens no camera.
Called by `config` (settings), `ingest` (cuts) and `verdict` (from the model's picture back to the camera's).
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
import zlib
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from pipeline.types import Image, View

GREY = 128
"""What is painted where the model is to see nothing."""
DATA_URL = "data:image/png;base64,"
# A record of the camera pool must carry it, and Kafka takes 1 MB; a mask of 2 megapixels has some 10 KB.
MAX_MASK_BYTES = 500_000

Point = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=2, max_length=2)]
Polygon = Annotated[list[Point], Field(min_length=3)]
MAX_PIXELS = 64_000_000
"""Larger pictures are refused wherever they come from, so that no region is drawn for one."""
# OpenCV turns pictures of up to 32766 pixels a side.
Side = Annotated[int, Field(gt=0, le=32_766)]
Rectangle = tuple[int, int, int, int]


def _form(value: object) -> str:
    return "file" if isinstance(value, str) else "polygons"


class RegionOfInterest(BaseModel):
    """Which part of the camera's picture is inspected; all of it in pixels of that picture, so that a picture of
    another size is a fault and never another place."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    picture_size: Annotated[list[Side], Field(min_length=2, max_length=2)]
    """Width and height of the camera's picture; another size is `frame_corrupt`."""
    crop: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=4, max_length=4)] | None = None
    """Left, top, width and height of the part to look at. Unset: the whole picture."""
    rotate: Annotated[float, Field(ge=-360, le=360, allow_inf_nan=False)] = 0.0
    """Degrees by which the picture is turned clockwise about the crop's centre; the corners show what lies around the
    crop, and grey beyond the picture. Nearer to a quarter or three quarter turns width and height change
    places."""
    mask: (
        Annotated[
            Annotated[str, Tag("file")] | Annotated[list[Polygon], Field(min_length=1), Tag("polygons")],
            Discriminator(_form),
        ]
        | None
    ) = None
    """What is inspected: path of a PNG of the picture's size (white is inspected), or polygons, each a list of
    `[x, y]`. The rest is painted grey before the crop."""

    @model_validator(mode="after")
    def _consistent(self) -> RegionOfInterest:
        width, height = self.picture_size
        if width * height > MAX_PIXELS:
            raise ValueError(f"`picture_size` is {width} x {height}, over {MAX_PIXELS} pixels")
        x, y, w, h = self.rectangle
        if w == 0 or h == 0:
            raise ValueError(f"`crop` is {w} x {h} pixels: give `[x, y, width, height]`")
        if x + w > width or y + h > height:
            raise ValueError(f"`crop` reaches to {x + w}, {y + h}, outside of the picture of {width} x {height}")
        corners = [] if self.mask is None or isinstance(self.mask, str) else [c for shape in self.mask for c in shape]
        if any(not (0 <= a <= width and 0 <= b <= height) for a, b in corners):
            raise ValueError(f"`mask` has a corner outside of the picture of {width} x {height}")
        inside = None if self.mask is None or self.by_file else self.inside()
        if inside is not None and not inside[y : y + h, x : x + w].any():
            raise ValueError("`mask` leaves nothing of the crop to inspect")
        return self

    @property
    def rectangle(self) -> Rectangle:
        """The crop, or the whole picture."""
        x, y, width, height = self.crop if self.crop is not None else [0, 0, *self.picture_size]
        return x, y, width, height

    @property
    def by_file(self) -> bool:
        """Whether the mask is the name of a file that has still to be read; see `with_mask_read`."""
        return isinstance(self.mask, str) and not self.mask.startswith(DATA_URL)

    @property
    def view(self) -> View:
        """What a frame of this region shows."""
        width, height = self.picture_size
        return View((width, height), self.rectangle, self.rotate)

    def inside(self) -> Image | None:
        """Draw the mask: (H, W) uint8, 255 where the picture is inspected; None without one. Raises ValueError."""
        width, height = self.picture_size
        if self.mask is None:
            return None
        if isinstance(self.mask, str):
            return mask_of(self.mask, width, height)
        drawn = np.zeros((height, width), np.uint8)
        for polygon in self.mask:
            cv2.fillPoly(drawn, [np.round(np.array(polygon)).astype(np.int32)], 255)
        return drawn

    def same_as(self, other: RegionOfInterest | None) -> bool:
        """Say whether the model sees the same with either; None is the whole picture."""
        if other is None:
            other = RegionOfInterest(picture_size=self.picture_size)
        if self.view != other.view:
            return False
        ours, theirs = (region.inside() if region.mask is not None else np.uint8(255) for region in (self, other))
        return bool(np.all(ours == theirs))


def with_mask_read(region: RegionOfInterest, root: Path) -> RegionOfInterest:
    """Put the mask's file into the settings themselves, so that they mean the same on every machine.

    A relative path starts at `root`. Raises ValueError that names the file and the fault.
    """
    if not region.by_file:
        return region
    path = root / str(region.mask)
    try:
        raw = path.read_bytes()
        text = DATA_URL + base64.b64encode(raw).decode("ascii")
        return RegionOfInterest.model_validate(region.model_dump() | {"mask": text})
    except OSError as error:
        raise ValueError(f"mask {path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise ValueError(f"mask {path}: {fault}") from None


def mask_of(text: str, width: int, height: int) -> Image:
    """Decode a mask's data URL to (height, width) uint8 of 0 and 255. Raises ValueError; a bomb is not unpacked."""
    try:
        raw = base64.b64decode(text.removeprefix(DATA_URL), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("`mask` is not base64") from None
    if len(raw) > MAX_MASK_BYTES:
        raise ValueError(f"`mask` has {len(raw)} bytes, at most {MAX_MASK_BYTES}: save it in black and white")
    if not _is_whole_png(raw):
        raise ValueError("`mask` is no whole PNG file")
    found_width, found_height, bits, colour = struct.unpack(">IIBB", raw[16:26])
    if (found_width, found_height) != (width, height):
        size = f"{found_width} x {found_height}"
        raise ValueError(f"`mask` is {size}, the picture {width} x {height}: a mask has the picture's size")
    if colour not in (0, 2, 3) or bits > 8:
        raise ValueError("`mask` has transparency or 16 bits: save it in black and white")
    grey = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
    if grey is None or grey.shape != (height, width):
        raise ValueError("`mask` cannot be decoded: save it again")
    return np.where(np.asarray(grey) >= 128, np.uint8(255), np.uint8(0))


def _is_whole_png(raw: bytes) -> bool:
    """Walk the chunks from the header to the end, checksums included: OpenCV decodes a damaged file without a word."""
    at, kinds = 8, []
    while raw[:8] == b"\x89PNG\r\n\x1a\n" and at + 12 <= len(raw):
        end = at + 12 + int.from_bytes(raw[at : at + 4], "big")
        if zlib.crc32(raw[at + 4 : end - 4]) != int.from_bytes(raw[end - 4 : end], "big"):
            return False
        kinds.append(raw[at + 4 : at + 8])
        at = end
    return kinds[:1] == [b"IHDR"] and kinds[-1] == b"IEND" and len(raw) == at


def cut_region(image: Image, crop: Rectangle, rotate: float, inside: Image | None) -> Image:
    """Paint what is not `inside`, cut the crop out and turn it clockwise by `rotate` degrees: (h, w, 3) uint8.

    Whole quarter turns move pixels and change none; the rest is turned about the crop's centre, bilinear.
    """
    x, y, width, height = crop
    quarters, rest = quarter_turns(rotate)
    if inside is not None:
        image = np.asarray(cv2.copyTo(image, inside, np.full_like(image, GREY)), dtype=np.uint8)
    if rest:
        turn = cv2.getRotationMatrix2D((x + (width - 1) / 2, y + (height - 1) / 2), -rest, 1.0)
        turn[:, 2] -= (x, y)
        beyond = (GREY, GREY, GREY)
        turned = cv2.warpAffine(
            image, turn, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=beyond
        )
        cut = np.asarray(turned, dtype=np.uint8)
    else:
        cut = image[y : y + height, x : x + width]
    return np.ascontiguousarray(np.rot90(cut, -quarters), dtype=np.uint8)


def quarter_turns(rotate: float) -> tuple[int, float]:
    """Split degrees into quarter turns and the rest, within -45 and 45."""
    quarters = round(rotate / 90)
    return quarters, rotate - 90 * quarters


def upright_size(view: View) -> tuple[int, int]:
    """Give width and height of the cut, in pixels, before the resize."""
    width, height = view.crop[2:]
    return (height, width) if quarter_turns(view.rotate)[0] % 2 else (width, height)


def in_picture(u: float, v: float, crop: Rectangle, rotate: float) -> tuple[float, float]:
    """Find a place of the cut, given as fractions of its width and height, in pixels of the whole picture.

    Pixels are squares here: the picture's first one spans 0 to 1.
    """
    x, y, width, height = crop
    quarters, rest = quarter_turns(rotate)
    for _ in range(quarters % 4):
        u, v = v, 1 - u
    across, down = (u - 0.5) * width, (v - 0.5) * height
    cos, sin = math.cos(math.radians(rest)), math.sin(math.radians(rest))
    return x + width / 2 + across * cos + down * sin, y + height / 2 - across * sin + down * cos


def box_in_picture(bbox: tuple[float, float, float, float], view: View) -> tuple[float, float, float, float]:
    """Give the upright box, in fractions of the camera's picture, around a box in fractions of the cut."""
    u, v, across, down = bbox
    corners = [
        in_picture(a, b, view.crop, view.rotate)
        for a, b in ((u, v), (u + across, v), (u, v + down), (u + across, v + down))
    ]
    (left, right), (top, bottom) = (
        (_fraction(min(places), size), _fraction(max(places), size))
        for places, size in zip(zip(*corners, strict=True), view.picture, strict=True)
    )
    return left, top, round(right - left, 4), round(bottom - top, 4)


def _fraction(place: float, size: int) -> float:
    return round(min(max(place / size, 0.0), 1.0), 4)
