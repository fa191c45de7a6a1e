"""What `logicrd thresholds` tells of limits before they are set: suggestions, and which parts would flip. No logic."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import config as configuration
from pipeline import tuning
from pipeline.config import LineConfig
from pipeline.errors import ConfigError
from pipeline.manifest import Manifest, read_manifest
from pipeline.model_repository import repository_of
from pipeline.releases import Release
from pipeline.rollouts import read_candidate
from pipeline.tail import last_verdicts
from pipeline.terminal import CONFIG_FILE, Config, Json, answer
from pipeline.tuning import Forecast, Limits
from pipeline.types import Judgement

ModelVersion = Annotated[
    int | None, typer.Option(min=1, help="Of this version of the model, pushed or on trial. Default: the served one.")
]
Last = Annotated[int, typer.Option(min=1, max=1_000_000, help="Parts of the verdict topic to look at.")]


def thresholds_suggest(
    product: str,
    reviewed: Annotated[
        Path | None,
        typer.Option(help="Parts that people looked at: CSV or JSON lines with partId, truth, perhaps score."),
    ] = None,
    parts_per_hour: Annotated[
        float | None, typer.Option(min=1e-3, help="Parts an hour, for false alarms an hour.")
    ] = None,
    false_alarms_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Bearable false alarms (NG) an hour. Default: 1 % of the good parts.")
    ] = None,
    reviews_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Bearable needless looks an hour. Default: 4 % of the good parts.")
    ] = None,
    last: Last = 10_000,
    model_version: ModelVersion = None,
    config: Config = CONFIG_FILE,
    as_json: Json = False,
) -> None:
    """Suggest limits: the model's own, from its validation normals, or others from reviewed parts; sets nothing."""
    if parts_per_hour is None and (false_alarms_per_hour is not None or reviews_per_hour is not None):
        raise typer.BadParameter("--false-alarms-per-hour and --reviews-per-hour need --parts-per-hour")
    if not all(math.isfinite(given or 0) for given in (parts_per_hour, false_alarms_per_hour, reviews_per_hour)):
        raise typer.BadParameter("figures an hour are finite numbers")
    settings = configuration.load(config)
    manifest, _ = manifest_of(settings, product, model_version)
    own = own_limits(manifest)
    found: dict[str, Any]
    if reviewed is None:
        forecast = tuning.from_normals(manifest.calibration)
        found = {"ng": own.ng, "review": own.review, "source": "validation normals"}
        doubts = [] if forecast else ["the model tells no counts of its validation normals: export it again"]
    else:
        ng_rate = 0.01 if false_alarms_per_hour is None else min(1.0, false_alarms_per_hour / (parts_per_hour or 1))
        extra = 0.04 if reviews_per_hour is None else reviews_per_hour / (parts_per_hour or 1)
        parts, unknown = _scored(settings, manifest, reviewed, last)
        chosen = tuning.suggest(parts, ng_rate=ng_rate, review_rate=min(1.0, ng_rate + extra))
        forecast = tuning.from_reviewed(parts, chosen)
        models = tuning.from_reviewed(parts, own)
        found = {"ng": chosen.ng, "review": chosen.review, "source": "reviewed parts", "parts": len(parts)}
        found |= {"without_score": unknown, "models_own": asdict(own) | _told(models, parts_per_hour)}
        doubts = tuning.doubts(parts, manifest, ng_rate)
    found = {"product": product, **found, "model_sha256": manifest.model_sha256, "parts_per_hour": parts_per_hour}
    found |= {"forecast": _told(forecast, parts_per_hour), "method": tuning.METHOD, "doubts": doubts}
    answer(found, as_json, _suggestion_text(found))


def preview(
    settings: LineConfig, manifest: Manifest, row: dict[str, Any], new: Limits, last: int, as_json: bool
) -> None:
    """Show which parts of the past the new limits would judge otherwise than those in force (`row`)."""
    product, source = manifest.product, f"/{settings.site}/{settings.area}/{settings.line}"
    events = last_verdicts(settings.kafka, source, product, last)
    old = Limits(float(row["ng"]), float(row["review"])) if row["version"] else own_limits(manifest)
    flipped, ways, incomparable = tuning.flips(events, product, manifest.model_sha256, old, new)
    moves = {way: count for way, count in ways.items() if len(set(way.split(">"))) > 1}
    document = {
        "dry_run": True,
        "product": product,
        "before": asdict(old) | {"version": int(row["version"])},
        "after": asdict(new),
        "parts": sum(ways.values()),
        "incomparable": incomparable,
        "flipped": len(flipped),
        "ways": moves,
        "flips": [asdict(flip) for flip in flipped],
    }
    text = f"{product}: {len(flipped)} of the last {document['parts']} parts would flip"
    text += f" ({', '.join(f'{way} {count}' for way, count in sorted(moves.items()))})" if moves else ""
    text += f"; {incomparable} more were not judged by this model" if incomparable else ""
    shown = [
        f"  {flip.time}  {flip.part_id}  {flip.score:.4f}  {flip.before} -> {flip.after}" for flip in flipped[-20:]
    ]
    answer(document, as_json, "\n".join([text, *shown]))


def manifest_of(settings: LineConfig, product: str, version: int | None) -> tuple[Manifest, bool]:
    """Read the manifest of a version, by default the served one, which a signer has to have signed where one is named:
    no worker would judge with it, nor by its limits. And whether it is another than that.

    Raises ConfigError, naming the versions that there are.
    """
    if version is None:
        return read_manifest(settings.triton.models_repo, product, settings.triton.signer_file), False
    served, others = versions_of(settings, product)
    if served is not None and served.version == version:
        return served, False
    if version not in others:
        known = ", ".join(map(str, sorted(others))) or "none"
        raise ConfigError(f"{product!r} has no version {version} beside the served one; there are: {known}")
    return others[version], True


def versions_of(settings: LineConfig, product: str) -> tuple[Manifest | None, dict[int, Manifest]]:
    """Read the manifest of the served version, None when there is none, and those of the others: pushed or on trial.

    One in the store that cannot be read is left out.
    """
    repository = repository_of(settings.triton)
    served, rollout = repository.promoted(product), repository.rollout(product)
    others: dict[int, Manifest] = {
        version: release for version, release in repository.pushed(product).items() if isinstance(release, Release)
    }
    if rollout is not None:  # the store may be on another machine
        others[rollout.version] = read_candidate(settings.triton.models_repo, product, rollout)
    if served is not None:
        others.pop(served.version, None)
    return served, others


def own_limits(manifest: Manifest) -> Limits:
    """Give the limits that the model brings."""
    own = manifest.calibration.thresholds
    return Limits(own.ng, own.review)


def _scored(settings: LineConfig, manifest: Manifest, file: Path, last: int) -> tuple[list[tuple[bool, float]], int]:
    """Read reviewed parts, with the scores that the file lacks from the verdict topic, and how many have none."""
    listed = tuning.read_reviewed(configuration.read_text(file), str(file))
    known: dict[str, float] = {}
    if any(part.score is None for part in listed):
        source = f"/{settings.site}/{settings.area}/{settings.line}"
        events = last_verdicts(settings.kafka, source, manifest.product, last)
        known = tuning.part_scores(events, manifest.product, manifest.model_sha256)
    scores = [(part.good, known.get(part.part_id) if part.score is None else part.score) for part in listed]
    parts = [(good, score) for good, score in scores if score is not None]
    return parts, len(listed) - len(parts)


def _told(forecast: Forecast | None, parts_per_hour: float | None) -> dict[str, Any]:
    if forecast is None:
        return {}
    told: dict[str, Any] = {name: value for name, value in asdict(forecast).items() if value is not None}
    for name in ("false_alarms", "needless_reviews") if parts_per_hour is not None else ():
        figures = told.get(name)
        if figures is not None and parts_per_hour is not None:
            hourly = {f"{end}_per_hour": figures[end] * parts_per_hour for end in ("expected", "low", "high")}
            told[name] = figures | hourly
    return told


def _suggestion_text(found: dict[str, Any]) -> str:
    lines = [f"{found['product']}: ng {found['ng']:.4f}, review {found['review']:.4f} (from {found['source']})"]
    names = {
        "false_alarms": f"good parts that are {Judgement.NG}",
        "needless_reviews": f"good parts in {Judgement.REVIEW}",
        "misses": f"bad parts that are {Judgement.OK}",
        "bad_in_review": f"bad parts in {Judgement.REVIEW}",
    }
    for name, figures in found["forecast"].items():
        lines.append(f"  {names[name]:24} {_rate_text(figures)}")
    if "models_own" in found:
        own = found["models_own"]
        lines.append(f"the model's own limits on the same parts: ng {own['ng']:.4f}, review {own['review']:.4f}")
        lines += [f"  {text:24} {_rate_text(own[name])}" for name, text in names.items() if name in own]
    if found.get("without_score"):
        lines.append(f"{found['without_score']} reviewed parts have no score of this model and do not count")
    lines += [f"look  {doubt}" for doubt in found["doubts"]]
    return "\n".join(lines)


def _rate_text(figures: dict[str, Any]) -> str:
    text = f"{figures['count']:4} of {figures['of']}: {figures['expected']:.2%}"
    text += f" ({figures['low']:.2%} to {figures['high']:.2%})"
    if "expected_per_hour" in figures:
        low, high = figures["low_per_hour"], figures["high_per_hour"]
        text += f"   an hour {figures['expected_per_hour']:.1f} ({low:.1f} to {high:.1f})"
    return text
