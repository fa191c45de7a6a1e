"""Photographs of grounds that scikit-image's wheel carries: brick, grass and gravel, all CC0.

Gives seeded crops as grey relief; never downloads. Called by the products of `scenes`.
"""

from functools import cache
from importlib.resources import files

import cv2
import numpy as np
from numpy.typing import NDArray

from training.errors import DataError

PHOTOGRAPHS = ("brick", "grass", "gravel")


@cache
def photograph(name: str) -> NDArray[np.float32]:
    """One photograph as (512, 512) float32, mean 0 and deviation 1."""
    raw = (files("skimage") / "data" / f"{name}.png").read_bytes()
    grey = cv2.imdecode(np.frombuffer(raw, dtype=np.uint8), cv2.IMREAD_GRAYSCALE)
    if grey is None:
        raise DataError(f"texture '{name}': scikit-image's copy cannot be decoded; install scikit-image again")
    values = grey.astype(np.float32)
    return np.asarray((values - values.mean()) / values.std(), dtype=np.float32)


def relief(name: str, shape: tuple[int, int], scale: float, generator: np.random.Generator) -> NDArray[np.float32]:
    """A crop of a photograph turned, zoomed by `scale` and mirrored at its edges: (h, w) float32, about mean 0."""
    height, width = shape
    angle = float(generator.uniform(0, 360))
    centre = generator.uniform(0, 512, size=2)
    matrix = cv2.getRotationMatrix2D((float(centre[0]), float(centre[1])), angle, scale)
    matrix[:, 2] += (width / 2 - centre[0], height / 2 - centre[1])
    source, size = photograph(name), (width, height)
    crop = cv2.warpAffine(source, matrix, size, flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT)
    return np.asarray(crop, dtype=np.float32)
