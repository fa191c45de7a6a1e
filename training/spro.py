"""AU-sPRO, the localisation measure of MVTec LOCO AD, from anomaly maps and defect masks.

Follows the official evaluation (Bergmann et al., "Beyond Dents and Scratches", IJCV 2022; evaluation code 2.0) within
1e-3: strict `>`, saturated areas, plain mean over all channels, false positives outside the union of an image's masks.
Where the official code needs its maps free of ties, this one does not. Never reads a file, never clamps a map, never
holds more than one image's pixels. Called by `evaluate`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from training.errors import DataError

LIMITS = (0.01, 0.05, 0.1, 0.3, 1.0)
# Points of a curve: all distinct values of a small set; of a larger one ranks, which differ from all by under 1e-4.
MAX_THRESHOLDS = 20_000
# Values that one image's background, or one channel, offers as thresholds.
_OFFERED = 4_000

Values = NDArray[np.floating]
# AU-sPRO by limit, keyed as '0.01', '0.05', '0.1', '0.3', '1'; None where the set has no defect-free pixel.
Areas = dict[str, float] | None


@dataclass(frozen=True, slots=True)
class Channel:
    """One defect of one image: `mask` (H, W) true inside it; `saturated_area` in pixels, 1 to the mask's area."""

    defect: str
    mask: NDArray[np.bool_]
    saturated_area: int


@dataclass(frozen=True, slots=True)
class LabelledMap:
    """An (H, W) map at the picture's original size, its channels (none if good), and its kind, 'good' for good ones."""

    name: str
    kind: str
    anomaly_map: Values
    channels: tuple[Channel, ...] = ()

    def background(self) -> Values:
        """The map's values outside every channel, ascending."""
        free = np.ones(self.anomaly_map.shape, dtype=bool)
        for channel in self.channels:
            free &= ~channel.mask
        return np.sort(self.anomaly_map[free])


@dataclass(frozen=True, slots=True)
class SproAreas:
    """AU-sPRO of every kind but 'good', and of every defect type; both against all good images."""

    kinds: dict[str, Areas]
    defects: dict[str, Areas]


@dataclass(slots=True)
class _Curve:
    """Sums over a set of images at every threshold."""

    false_positives: NDArray[np.int64]
    spro: NDArray[np.float64]
    free_pixels: int = 0
    channels: int = 0


@dataclass(slots=True)
class _Curves:
    thresholds: Values
    of: dict[tuple[str, str], _Curve] = field(default_factory=dict)

    def get(self, family: str, name: str) -> _Curve:
        size = len(self.thresholds)
        return self.of.setdefault((family, name), _Curve(np.zeros(size, np.int64), np.zeros(size)))

    def add(self, image: LabelledMap) -> None:
        """Defect types count the images that show them: their false positives lie outside all channels there."""
        false_positives = _above(background := image.background(), self.thresholds)
        sets = [("kind", image.kind), *(("defect", name) for name in sorted({c.defect for c in image.channels}))]
        for key in sets:
            curve = self.get(*key)
            curve.false_positives += false_positives
            curve.free_pixels += len(background)
        for channel in image.channels:
            hits = _above(np.sort(image.anomaly_map[channel.mask]), self.thresholds)
            spro = np.minimum(hits / channel.saturated_area, 1.0)
            for key in (("kind", image.kind), ("defect", channel.defect)):
                curve = self.get(*key)
                curve.spro += spro
                curve.channels += 1


def au_spro(images: Callable[[], Iterable[LabelledMap]]) -> SproAreas:
    """`images` is called twice and must give the same images: once to choose thresholds, once to count.

    Raises DataError that names the image where a map is not finite, differs in size from its masks, or where a channel
    has no saturated area (the official code divides by zero there).
    """
    curves = _Curves(_thresholds(images()))
    for image in images():
        curves.add(image)
    good = curves.get("kind", "good")
    found: dict[str, dict[str, Areas]] = {"kind": {}, "defect": {}}
    for (family, name), curve in curves.of.items():
        if curve is not good:
            found[family][name] = _areas(curve, good)
    return SproAreas(found["kind"], dict(sorted(found["defect"].items())))


def area_under(fpr: NDArray[np.float64], spro: NDArray[np.float64], limit: float) -> float:
    """Area under a curve up to `limit`, divided by it; both (n,) ascending, `fpr` from 0 to 1.

    Trapezoids over the points up to the limit, and an end piece interpolated linearly where no point lies on it.
    """
    inside = int(np.searchsorted(fpr, limit, side="right"))
    x, y = fpr[:inside], spro[:inside]
    if x[-1] < limit:
        share = (limit - x[-1]) / (fpr[inside] - x[-1])
        x, y = np.append(x, limit), np.append(y, y[-1] + share * (spro[inside] - y[-1]))
    return float(np.trapezoid(y, x) / limit)


def mean_areas(parts: Sequence[Areas]) -> Areas:
    """The plain mean by limit, LOCO's headline of both kinds; None where a part is."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not known:
        return None
    return {limit: sum(part[limit] for part in known) / len(known) for limit in known[0]}


def _areas(curve: _Curve, good: _Curve) -> Areas:
    pixels = curve.free_pixels + good.free_pixels
    if pixels == 0 or curve.channels == 0:
        return None
    fpr = (curve.false_positives + good.false_positives) / pixels
    spro = curve.spro / curve.channels
    return {f"{limit:g}": area_under(fpr, spro, limit) for limit in LIMITS}


def _above(ascending: Values, thresholds: Values) -> NDArray[np.int64]:
    """How many values lie strictly above each threshold."""
    return (len(ascending) - np.searchsorted(ascending, thresholds, side="right")).astype(np.int64)


def _thresholds(images: Iterable[LabelledMap]) -> Values:
    """Descending, from the largest value (nothing lies above it) to -inf (everything does)."""
    pool: Values = np.empty(0, dtype=np.float32)
    for image in images:
        _check(image)
        offers = [image.background(), *(np.sort(image.anomaly_map[channel.mask]) for channel in image.channels)]
        pool = np.unique(np.concatenate([pool, *(_offer(values) for values in offers)]))
        if len(pool) > 40 * MAX_THRESHOLDS:
            pool = _evenly(pool, 20 * MAX_THRESHOLDS)
    return np.append(_evenly(pool, MAX_THRESHOLDS)[::-1], pool.dtype.type(-np.inf))


def _offer(ascending: Values) -> Values:
    """Values at even ranks, and at ranks ever denser towards the top, where the small limits are decided."""
    count = len(ascending)
    if count <= _OFFERED:
        return ascending
    from_top = count - np.geomspace(1, count, _OFFERED // 2).round().astype(np.int64)
    return np.concatenate([_evenly(ascending, _OFFERED // 2), ascending[from_top]])


def _evenly(ascending: Values, count: int) -> Values:
    """At most `count` values at even ranks, the first and the last among them."""
    if len(ascending) <= count:
        return ascending
    return ascending[np.linspace(0, len(ascending) - 1, count).round().astype(np.int64)]


def _check(image: LabelledMap) -> None:
    if not np.isfinite(image.anomaly_map).all():
        raise DataError(f"anomaly map of '{image.name}': holds NaN or infinity; are the model's weights finite?")
    for channel in image.channels:
        if channel.mask.shape != image.anomaly_map.shape:
            sizes = f"{channel.mask.shape}, the map {image.anomaly_map.shape}"
            raise DataError(f"anomaly map of '{image.name}': the mask of '{channel.defect}' is {sizes}")
        if channel.saturated_area < 1:
            raise DataError(
                f"mask of '{image.name}': '{channel.defect}' saturates at 0 pixels, so sPRO is undefined; "
                "raise its saturation_threshold or draw the defect larger"
            )
