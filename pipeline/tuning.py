"""What limits do: to parts already judged, to parts that people have looked at, and which limits to suggest.

Rates are those of one part. Their expectation is (k + 1/2) / (n + 1) for k of n (the mean under Jeffreys' prior), their
interval Clopper and Pearson's exact one at 95 %. A limit that is laid above the (n - k)th of n good scores is passed by
a new good part at a rate between Beta(k, n - k + 1) and Beta(k + 1, n - k), whatever the scores' distribution, and that
is the same interval: it holds although the limit was chosen on the same parts. Pure: no client, no clock, no file.
Called by the commands.
"""

from __future__ import annotations

import csv
import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ConfigError
from pipeline.fusion import worst
from pipeline.manifest import Calibration, Manifest
from pipeline.types import Judgement
from pipeline.verdict import judge

CONFIDENCE = 0.95
METHOD = "expected: (k + 1/2) / (n + 1), Jeffreys; interval: Clopper-Pearson, 95 %; k of n: `count` of `of`"
_GOOD, _BAD = frozenset({"good", "ok"}), frozenset({"bad", "ng"})


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on the fused score, `review` not above `ng`."""

    ng: float
    review: float


@dataclass(frozen=True, slots=True)
class Rate:
    """How often something happens to a part: k = `count` of n = `of` parts seen, and what that says of the next one."""

    count: int
    of: int
    expected: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """What limits do to good and to bad parts; None where no part of that kind was seen.

    `false_alarms`: good parts that are NG; `needless_reviews`: good parts in REVIEW; `misses`: bad parts that are OK;
    `bad_in_review`: bad parts in REVIEW.
    """

    false_alarms: Rate | None
    needless_reviews: Rate | None
    misses: Rate | None
    bad_in_review: Rate | None


@dataclass(frozen=True, slots=True)
class Reviewed:
    """A part that a person has looked at; `score` is None where only the verdict topic knows it."""

    part_id: str
    good: bool
    score: float | None


@dataclass(frozen=True, slots=True)
class Flip:
    """A part of the past that other limits would have judged otherwise."""

    part_id: str
    station: str
    time: str
    score: float
    before: Judgement
    after: Judgement


def rate(fewest: int, most: int, of: int) -> Rate:
    """Make a rate of a count that lies between `fewest` and `most` of `of` parts; the expectation is that of `most`."""
    return Rate(most, of, (most + 0.5) / (of + 1), clopper_pearson(fewest, of)[0], clopper_pearson(most, of)[1])


def clopper_pearson(count: int, of: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Give the exact two-sided interval of a binomial rate (Clopper and Pearson 1934): `count` of `of`, at least 1."""
    tail = (1 - confidence) / 2
    low = 0.0 if count == 0 else _solve(lambda p: _at_most(count - 1, of, p) < 1 - tail)
    high = 1.0 if count == of else _solve(lambda p: _at_most(count, of, p) < tail)
    return low, high


def from_normals(calibration: Calibration) -> Forecast | None:
    """Say what the manifest's limits do to good parts by its validation normals; None for exports that tell no counts.

    The manifest holds quantiles, not scores: what lies between two of them is counted at both ends.
    """
    if calibration.images is None or calibration.quantiles is None or not calibration.quantiles.score:
        return None
    count, quantiles = calibration.images, calibration.quantiles.score
    ng = _reaching(calibration.thresholds.ng, quantiles, count)
    review = _reaching(calibration.thresholds.review, quantiles, count)
    between = max(0, review[0] - ng[1]), max(0, review[1] - ng[0])
    return Forecast(rate(*ng, count), rate(*between, count), None, None)


def from_reviewed(parts: Sequence[tuple[bool, float]], limits: Limits) -> Forecast:
    """Say what limits do by reviewed parts: whether each is good, and its score."""

    def share(good: bool, judgement: Judgement) -> Rate | None:
        said = [judge(score, limits.ng, limits.review) for is_good, score in parts if is_good is good]
        return rate(said.count(judgement), said.count(judgement), len(said)) if said else None

    return Forecast(
        share(True, Judgement.NG),
        share(True, Judgement.REVIEW),
        share(False, Judgement.OK),
        share(False, Judgement.REVIEW),
    )


def suggest(parts: Sequence[tuple[bool, float]], *, ng_rate: float, review_rate: float) -> Limits:
    """Lay the limits as low as they may be, so that misses are few: at most these shares of the good parts reach them.

    Chosen on the good parts alone, so that the bad ones judge it. `review_rate` is not below `ng_rate`. Raises
    ConfigError without a good part.
    """
    good = sorted(score for is_good, score in parts if is_good)
    if not good:
        raise ConfigError("no good part with a score: limits are laid by good parts", hint="review some that were OK")
    return Limits(ng=_above(good, ng_rate), review=_above(good, review_rate))


def doubts(parts: Sequence[tuple[bool, float]], manifest: Manifest, ng_rate: float) -> list[str]:
    """Say what makes the figures of reviewed parts less than they seem."""
    good = [score for is_good, score in parts if is_good]
    bad = len(parts) - len(good)
    found = []
    if 2 * sum(score < manifest.calibration.thresholds.review for score in good) < len(good):
        found.append(
            "most good parts lie above the model's own review limit: if only alarms were reviewed, false alarms are "
            "overstated and misses are not seen; review a sample of parts that were OK"
        )
    needed = math.ceil(math.log((1 - CONFIDENCE) / 2) / math.log1p(-ng_rate)) if 0 < ng_rate < 1 else 0
    if len(good) < needed:
        found.append(
            f"{len(good)} good parts are too few to show a rate of {ng_rate:.2g}: {needed} without a false alarm would"
        )
    if not bad:
        found.append("no bad part was reviewed: nothing is known of misses")
    return found


def read_reviewed(text: str, name: str) -> list[Reviewed]:
    """Read reviewed parts: CSV with a header (`partId,truth` and perhaps `score`), or one JSON object a line.

    `truth` is good or bad (ok or ng). Raises ConfigError with the line.
    """
    lines = text.removeprefix("\ufeff").splitlines()
    rows = _json_rows(lines, name) if lines and lines[0].lstrip().startswith("{") else _csv_rows(lines, name)
    seen: dict[str, int] = {}
    parts = []
    for number, row in rows:
        part = _reviewed(row, f"{name}: line {number}")
        if part.part_id in seen:
            raise ConfigError(f"{name}: line {number}: part {part.part_id!r} stands in line {seen[part.part_id]} too")
        seen[part.part_id] = number
        parts.append(part)
    if not parts:
        raise ConfigError(f"{name}: no parts", hint="a CSV with the header `partId,truth`, or JSON lines")
    return parts


def part_scores(events: Iterable[Mapping[str, Any]], product: str, model_sha256: str) -> dict[str, float]:
    """Give each part's score by its verdict's event: the highest of its views; of several inspections the last one's.

    Parts that another model has judged, or none, are left out.
    """
    seen = ((str(event["data"].get("partId")), _views(event["data"], product, model_sha256)) for event in events)
    return {part_id: max(scores) for part_id, views in seen if (scores := [s for s, _, _ in views if s is not None])}


def flips(
    events: Iterable[Mapping[str, Any]], product: str, model_sha256: str, before: Limits, after: Limits
) -> tuple[list[Flip], Counter[str], int]:
    """Judge parts of the past by two pairs of limits.

    Gives those that are judged otherwise, how many go which way (`OK>NG`; those that stay as `OK>OK`), and how many
    cannot be compared: judged by another model, or not at all.
    """
    found: list[Flip] = []
    ways: Counter[str] = Counter()
    incomparable = 0
    for event in events:
        data = event["data"]
        views = _views(data, product, model_sha256)
        scores = [score for score, _, _ in views if score is not None]
        if not scores:
            incomparable += 1
            continue
        missing = data.get("missingViews")
        absent = isinstance(missing, list) and any(isinstance(view, dict) and view.get("required") for view in missing)
        old, new = (_judged(views, limits, absent=absent) for limits in (before, after))
        ways[f"{old.value}>{new.value}"] += 1
        if old is not new:
            time = str(event.get("attributes", {}).get("time", ""))
            found.append(Flip(str(data.get("partId")), str(data.get("station")), time, max(scores), old, new))
    return found, ways, incomparable


_SeenView = tuple[float | None, Judgement, bool]
"""Score under the model in question or None, what the view said, whether the part needs it."""


def _views(data: Mapping[str, Any], product: str, model_sha256: str) -> list[_SeenView]:
    views = data.get("views")
    return [_view(view, product, model_sha256) for view in views] if isinstance(views, list) else []


def _view(view: Mapping[str, Any], product: str, model_sha256: str) -> _SeenView:
    try:
        said, required = Judgement(view["verdict"]), bool(view.get("required", True))
        score = (view.get("scores") or {}).get("fused")
        same = view.get("productId") == product and (view.get("model") or {}).get("sha256") == model_sha256
    except (AttributeError, KeyError, TypeError, ValueError):  # somebody else's record
        return None, Judgement.UNINSPECTED, True
    if said is Judgement.UNINSPECTED or not same or not isinstance(score, int | float) or not math.isfinite(score):
        return None, said, required
    return float(score), said, required


def _judged(views: list[_SeenView], limits: Limits, *, absent: bool) -> Judgement:
    said = [
        (stood if score is None else judge(score, limits.ng, limits.review), required)
        for score, stood, required in views
    ]
    return worst(said, absent=absent)


def _above(good: list[float], share: float) -> float:
    """Give the lowest limit that at most this share of sorted scores reaches: half way between two of them."""
    allowed = min(int(share * len(good) + 1e-9), len(good) - 1)
    below = good[len(good) - 1 - allowed]
    next_up = math.nextafter(below, math.inf)
    higher = next((score for score in good[len(good) - allowed :] if score > below), None)
    if higher is None:
        return max(math.ceil(below * 1e4 + 1) / 1e4, next_up)
    middle = max((below + higher) / 2, next_up)
    return round(middle, 4) if below < round(middle, 4) <= higher else middle


def _reaching(limit: float, quantiles: Mapping[str, float], count: int) -> tuple[int, int]:
    """Count the scores that reach a limit by their quantiles: the fewest and the most that it may be."""
    levels = [(float(level) * (count - 1), value <= limit) for level, value in quantiles.items()]
    below = [math.floor(round(place, 6)) for place, is_below in levels if is_below]
    above = [math.ceil(round(place, 6)) for place, is_below in levels if not is_below]
    return count - min(above, default=count), count - 1 - max(below, default=-1)


def _at_most(count: int, of: int, p: float) -> float:
    """Probability of at most `count` of `of` at rate p, 0 < p < 1; sums up the side with fewer terms."""
    few = 2 * count < of
    hits = np.arange(count + 1) if few else np.arange(count + 1, of + 1)
    mass = float(np.exp(_log_choose(of)[hits] + hits * math.log(p) + (of - hits) * math.log1p(-p)).sum())
    return mass if few else 1.0 - mass


@functools.lru_cache(maxsize=4)
def _log_choose(of: int) -> npt.NDArray[np.float64]:
    """Logarithms of the binomial coefficients of `of`, (of + 1,)."""
    places = np.arange(1, of + 1)
    return np.concatenate(([0.0], np.cumsum(np.log((of - places + 1) / places))))


def _solve(is_above: Callable[[float], bool]) -> float:
    """Bisect for the rate from which on `is_above` holds."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if is_above(middle) else (middle, high)
    return (low + high) / 2


def _csv_rows(lines: list[str], name: str) -> list[tuple[int, Mapping[str, object]]]:
    delimiter = ";" if lines and ";" in lines[0] else ","
    reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True)
    if not {"partId", "truth"} <= set(reader.fieldnames or ()):
        raise ConfigError(f"{name}: no columns `partId` and `truth` in the first line", hint="`score` is a third one")
    return [(reader.line_num, row) for row in reader]


def _json_rows(lines: list[str], name: str) -> list[tuple[int, Mapping[str, object]]]:
    rows: list[tuple[int, Mapping[str, object]]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ConfigError(f"{name}: line {number}: no JSON object")
        rows.append((number, row))
    return rows


def _reviewed(row: Mapping[str, object], place: str) -> Reviewed:
    part_id, truth = str(row.get("partId") or "").strip(), str(row.get("truth") or "").strip().lower()
    if not part_id:
        raise ConfigError(f"{place}: no partId")
    if truth not in _GOOD | _BAD:
        raise ConfigError(f"{place}: truth {truth[:40]!r}: write good or bad")
    text = row.get("score")
    try:
        score = None if text is None or not str(text).strip() else float(str(text))
    except ValueError:
        score = math.nan
    if score is not None and not math.isfinite(score):
        raise ConfigError(f"{place}: score {str(text)[:40]!r} is no finite number")
    return Reviewed(part_id, truth in _GOOD, score)
