"""From the results of a comparison to its table, as JSON and as Markdown.

Means are over products first, then over seeds, whose standard deviation is given; nothing is rounded up. Pure: sees
results and speeds, no picture and no network. Called by `cli`.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from pydantic import BaseModel, ConfigDict

from training.compare import FUSED, ROWS, Equal, Result, Row
from training.metrics import ImageAuroc

FIGURES = ("logical", "structural", "mean", "pooled")
FPR_LIMIT = "0.05"


class Spread(BaseModel):
    """Mean over seeds and standard deviation between them (None of a single seed); None where there is no figure."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: float | None
    deviation: float | None


class Speed(BaseModel):
    """Pictures a second of the exported network in ONNX Runtime, one at a time and in batches of eight."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_1: float
    batch_8: float


class Line(BaseModel):
    """One row of the table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    image_auroc: dict[str, Spread]
    au_spro: Spread
    parameters: int
    training_s: float
    speed: Speed | None
    products: dict[str, dict[str, Spread]]


class Table(BaseModel):
    """compare.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    equal: Equal
    machine: str
    seeds: tuple[int, ...]
    products: tuple[str, ...]
    lines: tuple[Line, ...]


def make_table(results: Sequence[Result], speeds: Mapping[str, Speed], equal: Equal, machine: str) -> Table:
    """One line for every row whose network is among the results."""
    networks = {result.network for result in results}
    lines = [_line(row, results, speeds.get(row.network)) for row in ROWS if row.network in networks]
    return Table(
        equal=equal,
        machine=machine,
        seeds=tuple(sorted({result.seed for result in results})),
        products=tuple(sorted({result.product for result in results})),
        lines=tuple(lines),
    )


def markdown(table: Table) -> str:
    """The table for people: means, the differences that the method stands for, and each product."""
    head = "| method | logical | structural | mean | pooled | AU-sPRO 0.05 | images/s at 1 | at 8 | weights | fit |"
    parts = [_about(table), head, "|---|" + "---:|" * 9, *map(_row, table.lines), "", *_differences(table)]
    parts += ["", "Image AUROC in %, logical / structural, mean over seeds:", "", *_by_product(table)]
    return "\n".join(parts) + "\n"


def _line(row: Row, results: Sequence[Result], speed: Speed | None) -> Line:
    own = [result for result in results if result.network == row.network]

    def auroc(result: Result, figure: str) -> float | None:
        found: ImageAuroc = result.report.image.image_auroc
        if row.score != FUSED:
            found = result.report.branches[row.score]
        value: float | None = getattr(found, figure)
        return value

    products = sorted({result.product for result in own})
    return Line(
        title=row.title,
        image_auroc={figure: _spread(own, partial(auroc, figure=figure)) for figure in FIGURES},
        au_spro=_spread(own, _spro),
        parameters=own[0].parameters,
        training_s=statistics.fmean(result.training_s for result in own),
        speed=speed,
        products={
            name: {
                figure: _spread([r for r in own if r.product == name], partial(auroc, figure=figure))
                for figure in FIGURES
            }
            for name in products
        },
    )


def _spread(results: Sequence[Result], figure: Callable[[Result], float | None]) -> Spread:
    by_seed: dict[int, list[float | None]] = {}
    for result in results:
        by_seed.setdefault(result.seed, []).append(figure(result))
    means: list[float] = []
    for values in by_seed.values():
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return Spread(mean=None, deviation=None)
        means.append(statistics.fmean(known))
    return Spread(mean=statistics.fmean(means), deviation=statistics.stdev(means) if len(means) > 1 else None)


def _spro(result: Result) -> float | None:
    areas = result.report.au_spro
    return None if areas is None or areas.mean is None else areas.mean[FPR_LIMIT]


def _about(table: Table) -> str:
    same = table.equal
    return (
        f"Same for all: {same.steps} steps of {same.batch_size} pictures of {same.image_size} x {same.image_size}, "
        f"teacher {same.teacher_arch} {same.teacher_sha256[:8]}, seeds {', '.join(map(str, table.seeds))}; products: "
        f"{', '.join(table.products)}. Image AUROC and AU-sPRO in %, mean over products, then over seeds with their "
        f"standard deviation. Speed: {table.machine}.\n"
    )


def _row(line: Line) -> str:
    cells = [line.title, *(_percent(line.image_auroc[figure]) for figure in FIGURES), _percent(line.au_spro)]
    speed = ("", "") if line.speed is None else (f"{line.speed.batch_1:.1f}", f"{line.speed.batch_8:.1f}")
    cells += [*speed, f"{line.parameters / 1e6:.1f} M", f"{line.training_s:.0f} s"]
    return "| " + " | ".join(cells) + " |"


def _percent(spread: Spread) -> str:
    if spread.mean is None:
        return "-"
    return f"{100 * spread.mean:.1f}" + ("" if spread.deviation is None else f" ± {100 * spread.deviation:.1f}")


def _differences(table: Table) -> list[str]:
    lines = {line.title: line for line in table.lines}
    ours, found = lines.get(ROWS[-1].title), []
    for title in ("RD", "DSKD"):
        other = lines.get(title)
        if ours is None or other is None:
            continue
        points = [_difference(ours, other, figure) for figure in ("logical", "structural", "mean")]
        text = f"- LogicRD less {title}: logical {points[0]}, structural {points[1]}, mean {points[2]} points"
        if ours.speed is not None and other.speed is not None:
            ratios = (ours.speed.batch_1 / other.speed.batch_1, ours.speed.batch_8 / other.speed.batch_8)
            text += f"; {ratios[0]:.2f} x its images/s at batch 1, {ratios[1]:.2f} x at batch 8"
        found.append(text + ".")
    return found


def _difference(ours: Line, other: Line, figure: str) -> str:
    a, b = ours.image_auroc[figure].mean, other.image_auroc[figure].mean
    return "-" if a is None or b is None else f"{100 * (a - b):+.1f}"


def _by_product(table: Table) -> list[str]:
    rows = ["| method | " + " | ".join(table.products) + " |", "|---|" + "---:|" * len(table.products)]
    for line in table.lines:
        cells = [line.products[name] for name in table.products]
        texts = [f"{_percent(_bare(c['logical']))} / {_percent(_bare(c['structural']))}" for c in cells]
        rows.append("| " + " | ".join([line.title, *texts]) + " |")
    return rows


def _bare(spread: Spread) -> Spread:
    return Spread(mean=spread.mean, deviation=None)
