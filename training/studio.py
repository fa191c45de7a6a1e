"""A small renderer: parts are laid on a canvas as colour, height and gloss, then lit and photographed.

Shading, highlights and shadows come from one height field and one lamp, so that every part of a picture agrees on where
the light is. Distances are pixels, colours 0..255 RGB. Knows nothing of products. Called by `products`.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Field = npt.NDArray[np.float32]
Generator = np.random.Generator
# A highlight's width: satin metal, as zinc-plated fasteners and moulded plastic show it.
SHININESS = 28.0
SHADOW_DEPTH = 0.6


@dataclass(frozen=True, slots=True)
class Stamp:
    """A part ready to lay down: coverage (h, w) 0..1, colour (h, w, 3), height (h, w) over its ground, gloss 0..1."""

    cover: Field
    colour: Field
    height: Field
    gloss: float
    # False for what soaks in or follows the relief below it: stains, burns, labels.
    solid: bool = True


@dataclass(frozen=True, slots=True)
class Lamp:
    """Where light comes from (unit vector, z towards the camera) and how strong it is in each corner (2, 2, 3)."""

    direction: tuple[float, float, float]
    corners: Field

    @staticmethod
    def draw(generator: Generator) -> "Lamp":
        """A lamp up left that has been moved a little, with a slope of up to 20 % across the picture."""
        azimuth = math.radians(float(generator.normal(-135, 9)))
        elevation = math.radians(float(generator.normal(50, 3)))
        flat = math.cos(elevation)
        exposure = float(generator.normal(1.0, 0.04))
        corners = exposure * (1 + generator.uniform(-0.1, 0.1, size=(2, 2, 1)))
        warmth = 1 + generator.normal(0, 0.012, size=(1, 1, 3))
        direction = (flat * math.cos(azimuth), flat * math.sin(azimuth), math.sin(elevation))
        return Lamp(direction, (corners * warmth).astype(np.float32))


class Canvas:
    """What lies in front of the camera; stamps later laid down lie on top."""

    def __init__(self, colour: Field, height: Field, gloss: float, lamp: Lamp) -> None:
        self.colour = colour.astype(np.float32)
        self.height = height.astype(np.float32)
        self.gloss = np.full(height.shape, gloss, dtype=np.float32)
        self.lamp = lamp

    def lay(self, stamp: Stamp, centre: tuple[float, float], lift: float = 3.0) -> Field:
        """Lays a stamp with its middle at (x, y), casting a shadow of `lift` pixels; returns its coverage (H, W)."""
        rows, columns = stamp.cover.shape
        top, left = round(centre[1] - rows / 2), round(centre[0] - columns / 2)
        whole = np.zeros_like(self.height)
        y0, x0 = max(top, 0), max(left, 0)
        y1, x1 = min(top + rows, whole.shape[0]), min(left + columns, whole.shape[1])
        if y0 >= y1 or x0 >= x1:
            return whole
        part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        here = (slice(y0, y1), slice(x0, x1))
        cover = stamp.cover[part]
        whole[here] = cover
        self._shade(whole, here, lift)
        self.colour[here] += cover[..., None] * (stamp.colour[part] - self.colour[here])
        # A part rests on the tops of its ground and hides the grain below it.
        ground = float(np.median(self.height[here][cover > 0.5])) if (cover > 0.5).any() else 0.0
        rests = cover if stamp.solid else cover * 0
        self.height[here] += rests * (ground - self.height[here]) + cover * stamp.height[part]
        self.gloss[here] += cover * (stamp.gloss - self.gloss[here])
        return whole

    def _shade(self, cover: Field, here: tuple[slice, slice], lift: float) -> None:
        margin = int(2 * lift) + 6
        rows = slice(max(here[0].start - margin, 0), here[0].stop + margin)
        columns = slice(max(here[1].start - margin, 0), here[1].stop + margin)
        dx, dy = -self.lamp.direction[0] * lift, -self.lamp.direction[1] * lift
        window = cover[rows, columns]
        size = (window.shape[1], window.shape[0])
        moved = cv2.warpAffine(window, np.array([[1, 0, dx], [0, 1, dy]]), size)
        soft = cv2.GaussianBlur(moved, (0, 0), 0.6 + 0.4 * lift) * SHADOW_DEPTH
        contact = cv2.GaussianBlur(window, (0, 0), 1.5) * 0.3
        self.colour[rows, columns] *= (1 - np.maximum(soft, contact))[..., None]

    def photograph(self, generator: Generator) -> npt.NDArray[np.uint8]:
        """Lights the canvas and takes the picture: blur of the lens, vignette, photon and sensor noise."""
        picture = self._lit()
        rows, columns = self.height.shape
        picture *= cv2.resize(self.lamp.corners, (columns, rows), interpolation=cv2.INTER_LINEAR)
        picture *= _vignette(rows, columns)[..., None]
        picture = field(cv2.GaussianBlur(picture, (0, 0), float(generator.uniform(0.5, 0.9))))
        noise = generator.standard_normal(picture.shape, dtype=np.float32)
        # Variance of 1.5 grey levels squared from the sensor, plus photons in proportion to brightness.
        # In place, to spare fresh memory for whole pictures.
        spread = np.maximum(picture, 0)
        spread *= 0.025
        spread += 1.5
        noise *= np.sqrt(spread, out=spread)
        picture += noise
        picture += 0.5
        return np.asarray(np.clip(picture, 0, 255, out=picture), dtype=np.uint8)

    def _lit(self) -> Field:
        slope_x = cv2.Sobel(self.height, cv2.CV_32F, 1, 0, scale=1 / 8)
        slope_y = cv2.Sobel(self.height, cv2.CV_32F, 0, 1, scale=1 / 8)
        upright = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
        x, y, z = self.lamp.direction
        diffuse = np.clip((z - slope_x * x - slope_y * y) * upright, 0, None) / z
        half = math.sqrt(2 + 2 * z)
        mirror = np.clip((z + 1 - slope_x * x - slope_y * y) * upright / half, 0, 1) ** SHININESS
        # A third of the light comes from everywhere: diffusers, walls.
        picture = self.colour * (0.33 + 0.67 * diffuse)[..., None]
        picture += (190 * self.gloss * mirror)[..., None]
        return field(picture)


def _vignette(rows: int, columns: int) -> Field:
    y = np.linspace(-1, 1, rows, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, columns, dtype=np.float32)[None, :]
    return field(1 - 0.06 * (x**2 + y**2))


def field(values: npt.ArrayLike) -> Field:
    """Values as float32: the one type of colours, heights and coverages."""
    return np.asarray(values, dtype=np.float32)


def grid(side: int, angle: float) -> tuple[Field, Field]:
    """Coordinates (u, v) of a (side, side) window about its middle, turned by `angle` radians."""
    axis = np.arange(side, dtype=np.float32) - (side - 1) / 2
    x, y = axis[None, :], axis[:, None]
    u = x * math.cos(angle) + y * math.sin(angle)
    v = y * math.cos(angle) - x * math.sin(angle)
    return field(u), field(v)


def covered(distance: Field) -> Field:
    """Coverage 0..1 from a signed distance in pixels, negative inside; one pixel of soft edge."""
    return field(np.clip(0.5 - distance, 0, 1))


def rounded_box(u: Field, v: Field, half_u: float, half_v: float, radius: float) -> Field:
    """Signed distance to a box of the given half sizes with rounded corners."""
    du, dv = np.abs(u) - (half_u - radius), np.abs(v) - (half_v - radius)
    outside = np.hypot(np.maximum(du, 0), np.maximum(dv, 0))
    return field(outside + np.minimum(np.maximum(du, dv), 0) - radius)


def blotch(side: int, generator: Generator) -> Field:
    """A ragged spot, (side, side) coverage 0..1: stains, burns, chips."""
    cells = generator.standard_normal((6, 6)).astype(np.float32)
    rough = cv2.resize(cells, (side, side), interpolation=cv2.INTER_CUBIC)
    u, v = grid(side, 0.0)
    return covered(field((np.hypot(u, v) - 0.33 * side + rough * 0.07 * side) * 0.35))


def metal(base: tuple[float, float, float], shape: tuple[int, ...], angle: float, generator: Generator) -> Field:
    """Colour (h, w, 3) of a metal surface with a faint grain along `angle` radians."""
    noise = generator.standard_normal(shape[:2], dtype=np.float32)
    length = 7
    kernel = np.zeros((length, length), dtype=np.float32)
    middle = length // 2
    reach = (middle * math.cos(angle), middle * math.sin(angle))
    ends = [(round(middle + sign * reach[0]), round(middle + sign * reach[1])) for sign in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], 1.0)
    grain = cv2.filter2D(noise, -1, kernel / kernel.sum())
    tone = 1 + 0.07 * grain + float(generator.normal(0, 0.03))
    return field(np.array(base, dtype=np.float32) * tone[..., None])
