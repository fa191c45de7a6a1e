"""Writes what an evaluation found for people to read: report.json, three pictures and MODEL_CARD.md made from them.

Computes no measure of its own and chooses nothing; every figure comes from the report or is a count of its records.
Called by `cli`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter
from numpy.typing import NDArray

from training.calibrate import HeatMap, Thresholds
from training.data import read_region_of
from training.detector import Description
from training.evaluate import BRANCHES, Evaluation, ScoreRecord, by_kind, enlarged
from training.metrics import AurocIntervals, ImageAuroc, Interval, TestReport
from training.region import GREY, RegionOfInterest
from training.spro import LIMITS

REPORT, CARD = "report.json", "MODEL_CARD.md"
ROC, HISTOGRAM, SHEET = "roc.png", "histogram.png", "heatmaps.jpg"
KINDS = ("good", "logical", "structural")
SPLITS = ("logical", "structural", "mean", "pooled")
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {"good": "#0072b2", "logical": "#d55e00", "structural": "#8b5a9f", "pooled": "#555555"}
# Columns of the heat-map sheet: this many clearest and this many hardest pictures of a kind.
EACH = 2
_THUMB_PX = 360
_OUTLINE = (0, 255, 255)


def write_report(folder: Path, description: Description, evaluation: Evaluation) -> None:
    """Fills `folder` (made if missing); the model card comes last and embeds the pictures by relative name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(evaluation.report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    scores = by_kind(evaluation.records, "score")
    _save(_roc_figure(scores, evaluation.report), folder / ROC)
    _save(_histogram_figure(scores, description.calibration.thresholds), folder / HISTOGRAM)
    _save(_sheet_figure(evaluation, description), folder / SHEET)
    (folder / CARD).write_text(model_card(description, evaluation), encoding="utf-8")


def summary(report: TestReport) -> list[str]:
    """The main figures as a Markdown table, in percent: rows of scores, columns of splits."""
    image = report.image
    rows = [["image AUROC, fused (95 % interval)", *_auroc_cells(image.image_auroc, image.intervals)]]
    rows += [[f"image AUROC, {name} alone", *_auroc_cells(report.branches[name], None)] for name in BRANCHES]
    if report.au_spro is not None:
        parts = [report.au_spro.logical, report.au_spro.structural, report.au_spro.mean]
        for limit in (f"{value:g}" for value in LIMITS):
            cells = [_percent(None if part is None else part[limit]) for part in parts]
            rows.append([f"AU-sPRO, false positive rate up to {limit}", *cells, "-"])
    return _table(["", *SPLITS], rows)


def model_card(description: Description, evaluation: Evaluation) -> str:
    """The whole card as Markdown."""
    report = evaluation.report
    sections = [
        [f"# Model card: {description.product}", "", *_about(description)],
        ["## Identity", "", *_identity(description, report)],
        ["## Calibration", "", *_calibration(description)],
        ["## Measured", "", *_measured(report), "", *_decisions(evaluation, description.calibration.thresholds)],
        [f"![ROC curves]({ROC})", "", f"![Scores by kind]({HISTOGRAM})", "", f"![Heat maps]({SHEET})"],
        ["## By defect type", "", *_by_defect(report)],
        ["## Known limits", "", *_limits(description, report)],
        ["## Reproduce", "", *_reproduce(description, evaluation)],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def roc(good: NDArray[np.float64], bad: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(false positive rate, true positive rate) at every distinct score, from (0, 0) to (1, 1); ties in one step."""
    thresholds = np.unique(np.concatenate([good, bad]))[::-1]
    rates = [1 - np.searchsorted(np.sort(s), thresholds, side="left") / len(s) for s in (good, bad)]
    return np.append(0.0, rates[0]), np.append(0.0, rates[1])


def _about(description: Description) -> list[str]:
    size = description.image_size
    return [
        f"Tells good parts of one product, `{description.product}`, from parts with structural or logical anomalies,",
        f"in RGB pictures resized to {size} x {size}. Method `{description.method}` on a frozen teacher,",
        f"`{description.teacher_arch}`. Weights, calibration and limits come from good parts alone; the test below",
        "chose nothing. It is meant for the product, camera and light it was fitted on.",
    ]


def _identity(description: Description, report: TestReport) -> list[str]:
    values = description.model_dump(mode="json", exclude={"calibration", "metrics"})
    values |= {"test_sha256": report.test_sha256, "test_layout": report.layout}
    return _table(["field", "value"], [[key, f"`{value}`"] for key, value in values.items()])


def _calibration(description: Description) -> list[str]:
    calibration = description.calibration
    limits, heat = calibration.thresholds, calibration.heatmap
    fusion: Mapping[str, Any] = calibration.fusion.model_dump(mode="json")
    constants = ", ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in fusion.items())
    return [
        f"On {calibration.images} good validation pictures, none of which the weights were fitted on.",
        "",
        f"- fused score: {constants}",
        f"- suggested limits: reject above {limits.ng:.3f}, look again above {limits.review:.3f}",
        f"- heat map: fixed scale {heat.low:.4g} to {heat.high:.4g}; a pixel is anomalous above {heat.limit:.4g}",
    ]


def _measured(report: TestReport) -> list[str]:
    counts = report.image.test_images
    tested = f"{counts.good} good, {counts.logical} logical and {counts.structural} structural test pictures; percent."
    return [tested, "", *summary(report)]


def _decisions(evaluation: Evaluation, limits: Thresholds) -> list[str]:
    rows = []
    for kind, scores in by_kind(evaluation.records, "score").items():
        if len(scores):
            verdicts = [verdict(score, limits) for score in scores]
            rows.append([kind, *(str(verdicts.count(name)) for name in ("OK", "REVIEW", "NG"))])
    return ["At the suggested limits:", "", *_table(["pictures", "OK", "REVIEW", "NG"], rows)]


def verdict(score: float, limits: Thresholds) -> str:
    """'OK', 'REVIEW' or 'NG' of a fused score: above a limit counts, on it does not."""
    if score > limits.ng:
        return "NG"
    return "REVIEW" if score > limits.review else "OK"


def _by_defect(report: TestReport) -> list[str]:
    if not report.defects:
        return ["The data name no defect types."]
    rows = []
    for found in report.defects:
        spro = None if found.au_spro is None else found.au_spro["0.05"]
        rows.append([found.defect, str(found.images), _percent(found.image_auroc), _percent(spro)])
    return _table(["defect", "pictures", "image AUROC", "AU-sPRO, rate up to 0.05"], rows)


def _limits(description: Description, report: TestReport) -> list[str]:
    counts = report.image.test_images
    lines = [
        f"- The limits rest on {description.calibration.images} normals: false alarms rarer than one in as many are",
        "  extrapolated, not measured.",
        "- The intervals say what other test pictures would change, not what another training run would.",
        "- Other products, cameras, lenses or light were not tested; changed light moves the scores.",
    ]
    missing = [kind for kind in ("logical", "structural") if getattr(counts, kind) == 0]
    lines += [f"- No {kind} anomalies were there to test on; nothing is known of them." for kind in missing]
    if report.au_spro is None:
        lines.append("- The test data have no masks: where the map points was not measured.")
    few = [f"{found.defect} ({found.images})" for found in report.defects if found.images < 10]
    if few:
        lines.append(f"- Fewer than ten pictures, so rough figures: {', '.join(few)}.")
    return lines


def _reproduce(description: Description, evaluation: Evaluation) -> list[str]:
    data = evaluation.data.root.resolve().name
    return [
        f"From git revision `{description.git_revision}`, with the data folder `{data}` whose hashes stand above:",
        "",
        "```",
        f"logicrd-train evaluate --model {description.product} --data {data} --out report --maps maps",
        "```",
        "",
        "`maps` then holds the anomaly maps in the layout of the official MVTec LOCO evaluation script. Its image",
        "AUROC takes the largest map value of a picture as the score; the figures above are of the fused score.",
    ]


def _auroc_cells(values: ImageAuroc, intervals: AurocIntervals | None) -> list[str]:
    return [_percent(getattr(values, s), None if intervals is None else getattr(intervals, s)) for s in SPLITS]


def _percent(value: float | None, interval: Interval | None = None) -> str:
    if value is None:
        return "-"
    text = f"{100 * value:.1f}"
    return text if interval is None else f"{text} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _roc_figure(scores: Mapping[str, NDArray[np.float64]], report: TestReport) -> Figure:
    figure = Figure(figsize=(5.2, 5.0), layout="constrained")
    axes = figure.add_subplot()
    curves = {kind: scores[kind] for kind in ("logical", "structural") if len(scores[kind])}
    if len(curves) > 1:
        curves["pooled"] = np.concatenate(list(curves.values()))
    for kind, bad in curves.items():
        value = getattr(report.image.image_auroc, kind)
        axes.plot(*roc(scores["good"], bad), color=COLOURS[kind], label=f"{kind}  {_percent(value)} %", clip_on=False)
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set(xlabel="share of good pictures above the limit", ylabel="share of anomalies above the limit")
    axes.set_title(f"{report.product}: ROC of the fused score", fontsize=11)
    axes.legend(loc="lower right", frameon=False)
    _plain(axes)
    return figure


def _histogram_figure(scores: Mapping[str, NDArray[np.float64]], limits: Thresholds) -> Figure:
    kinds = [kind for kind in KINDS if len(scores[kind])]
    figure = Figure(figsize=(7.2, 0.8 + 1.5 * len(kinds)), layout="constrained")
    every = np.concatenate([scores[kind] for kind in kinds])
    # Anomalies may score a hundred times the limit: linear around it, logarithmic beyond.
    width = max(abs(limits.ng), 1e-9)
    low, high = (np.arcsinh(value / width) for value in (min(every.min(), 0.0), max(every.max(), limits.ng)))
    edges = width * np.sinh(np.linspace(low - 0.05, high + 0.05, 41))
    for row, kind in enumerate(kinds):
        axes = figure.add_subplot(len(kinds), 1, row + 1)
        axes.hist(scores[kind], bins=list(edges), color=COLOURS[kind])
        axes.set_xscale("asinh", linear_width=width)
        axes.set(xlim=(edges[0], edges[-1]), ylabel="pictures")
        axes.xaxis.set_major_locator(FixedLocator(_round_numbers(edges[0], edges[-1])))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_title(f"{kind} ({len(scores[kind])})", fontsize=10, loc="left", color=COLOURS[kind])
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        for name, limit, style in (("review", limits.review, "--"), ("ng", limits.ng, "-")):
            axes.axvline(limit, color="black", linewidth=1, linestyle=style, label=f"{name} {limit:.2f}")
        _plain(axes)
        if row == 0:
            axes.legend(loc="upper right", frameon=False, fontsize=9)
        axes.tick_params(labelbottom=row == len(kinds) - 1)
    axes.set_xlabel("fused score")
    return figure


def _round_numbers(low: float, high: float) -> list[float]:
    """0 and 1, 2, 5, 10, ... of both signs, from two decades under the widest end, within (low, high)."""
    top = int(np.ceil(np.log10(max(-low, high, 1e-9))))
    steps = [digit * 10.0**power for power in range(top - 2, top + 1) for digit in (1, 2, 5)]
    return [tick for tick in (*(-step for step in reversed(steps)), 0.0, *steps) if low < tick < high]


def _sheet_figure(evaluation: Evaluation, description: Description) -> Figure:
    heat, limits = description.calibration.heatmap, description.calibration.thresholds
    chosen = [indices for kind in KINDS if (indices := pick(evaluation.records, kind))]
    height, width = _thumb(read_region_of(Path(evaluation.records[0].file), evaluation.region)).shape[:2]
    columns, cell = max(len(indices) for indices in chosen), 2.6
    size = (columns * cell + 0.9, len(chosen) * (2 * cell * height / width + 0.5) + 0.5)
    engine = ConstrainedLayoutEngine(h_pad=0.04, w_pad=0.02, hspace=0.01, wspace=0.01)
    figure = Figure(figsize=size, layout=engine)
    figure.suptitle(
        "of each kind, left the clearest and right the hardest; below each its map, masks outlined", fontsize=9
    )
    grid = figure.subplots(2 * len(chosen), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for block, indices in enumerate(chosen):
        for column, index in enumerate(indices):
            record = evaluation.records[index]
            title = f"{_name(record)}\n{record.score:.2f}  {verdict(record.score, limits)}"
            picture, overlaid = _sample(evaluation, index, heat)
            grid[2 * block, column].imshow(picture)
            grid[2 * block, column].set_title(title, fontsize=8, color=COLOURS[str(record.kind)])
            grid[2 * block + 1, column].imshow(overlaid)
    scale = ScalarMappable(Normalize(heat.low, heat.high), "inferno")
    bar = figure.colorbar(scale, ax=list(grid.flat), location="right", shrink=0.4, aspect=40, pad=0.01)
    bar.set_ticks([heat.low, heat.limit, heat.high], labels=[f"{heat.low:.3g}", "limit", f"{heat.high:.3g}"])
    return figure


def pick(records: Sequence[ScoreRecord], kind: str) -> list[int]:
    """Indices of a kind's clearest and hardest pictures, in this order; for good ones the clearest score lowest."""
    sign = 1 if kind == "good" else -1
    order = sorted((i for i, r in enumerate(records) if r.kind == kind), key=lambda i: sign * records[i].score)
    return order if len(order) <= 2 * EACH else order[:EACH] + order[-EACH:]


def overlay(picture: NDArray[np.uint8], anomaly_map: NDArray[np.float32], heat: HeatMap) -> NDArray[np.uint8]:
    """(H, W, 3) picture under its (h, w) map on the fixed scale; opacity is 0 at `low`, 0.7 at `high`."""
    large = enlarged(anomaly_map, *picture.shape[:2])
    strength = np.clip((large - heat.low) / max(heat.high - heat.low, 1e-12), 0, 1)
    coloured = cv2.applyColorMap((255 * strength).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    opacity = (0.7 * strength)[..., None]
    return np.asarray(picture * (1 - opacity) + coloured * opacity, dtype=np.uint8)


def _sample(evaluation: Evaluation, index: int, heat: HeatMap) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    file = Path(evaluation.records[index].file)
    picture = _thumb(read_region_of(file, evaluation.region))
    drawn = np.ascontiguousarray(overlay(picture, evaluation.maps[index], heat))
    for channel in () if evaluation.truth is None else evaluation.truth.channels(file):
        shown = _region_of_mask(channel.mask, evaluation.region)
        mask = cv2.resize(shown, drawn.shape[1::-1], interpolation=cv2.INTER_AREA)
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, contours, -1, _OUTLINE, 1, cv2.LINE_AA)
    return picture, drawn


def _region_of_mask(mask: NDArray[np.bool_], region: RegionOfInterest | None) -> NDArray[np.uint8]:
    """The part of an (H, W) mask that the map covers, 0 or 1; nothing is marked where the model sees grey."""
    if region is None:
        return mask.astype(np.uint8)
    white = np.repeat(mask.astype(np.uint8)[..., None] * 255, 3, axis=2)
    return (region.cut(white)[..., 0] > (255 + GREY) // 2).astype(np.uint8)


def _thumb(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    share = _THUMB_PX / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * share)), max(1, round(picture.shape[0] * share)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _name(record: ScoreRecord) -> str:
    file = Path(record.file)
    return f"{file.parent.name}/{file.name}"


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
