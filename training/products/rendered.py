"""What every product hands to `scenes`: a picture and the masks of its defects."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Defect:
    """One defect of one picture: its type, where it shows, (H, W) bool."""

    name: str
    mask: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Saturation:
    """How much of a mask must be found for full marks: a share (relative) or an area in pixels (absolute)."""

    threshold: float
    relative: bool


@dataclass(frozen=True, slots=True)
class Rendered:
    """A picture (H, W, 3) uint8 RGB and its defects; no defects means a good part."""

    picture: NDArray[np.uint8]
    defects: tuple[Defect, ...] = ()
