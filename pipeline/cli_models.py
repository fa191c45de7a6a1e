"""The commands `logicrd models`: which versions of a product there are, and which one is served. No logic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import config as configuration
from pipeline import logs
from pipeline.config import LineConfig
from pipeline.errors import CheckError, ConfigError
from pipeline.model_control import ModelControl
from pipeline.model_repository import ModelRepository, repository_of
from pipeline.promotion import promote, rollback, stop_trial, try_beside
from pipeline.releases import MANIFEST, Release, before
from pipeline.signatures import sign
from pipeline.tail import candidate_figures
from pipeline.terminal import CONFIG_FILE, Author, Config, Json, Reason, answer, author_of, table_of
from pipeline.wire import CANDIDATE_FIGURES

models_app = typer.Typer(no_args_is_help=True)

Product = Annotated[str, typer.Argument(help="Which product.")]


@models_app.callback()
def models() -> None:
    """Versions of the models, and which one is served."""
    logs.configure(level="warning", colour=not configuration.without_colour())


@models_app.command("list")
def models_list(
    product: Annotated[str, typer.Argument(help="Only this product, with its history.")] = "",
    config: Config = CONFIG_FILE,
    as_json: Json = False,
) -> None:
    """List the versions of each product: which one is served, and to which one a rollback goes."""
    repository = repository_of(configuration.load(config).triton)
    if product and product not in repository.products():
        raise ConfigError(f"no product {product!r}; there are: {', '.join(repository.products()) or 'none'}")
    rows = [row for name in [product] * bool(product) or repository.products() for row in _rows(repository, name)]
    history = [event.model_dump(mode="json") for event in repository.history(product)] if product else []
    answer(
        {"versions": rows, "history": history} if product else rows,
        as_json,
        table_of(rows, ["product", "version", "state", "signed", "created", "method", "model"]),
    )
    if history and not as_json:
        answer(None, as_json, table_of(history, ["at", "action", "version", "previous", "by", "reason"]))


@models_app.command("sign")
def models_sign(
    folder: Annotated[Path, typer.Argument(help="An exported product's folder, as `runs/models/cable-set`.")],
    key: Annotated[Path, typer.Option(help="Private key of Ed25519 in PEM; only openssl reads it.")],
) -> None:
    """Sign the manifest of an exported product, and with it the hash of every file."""
    if not (folder / MANIFEST).is_file():
        raise ConfigError(f"{folder} has no {MANIFEST}", hint="name the product's folder that was exported")
    answer(None, False, str(sign(folder / MANIFEST, key)))


@models_app.command("push")
def models_push(
    folder: Annotated[Path, typer.Argument(help="An exported product's folder, as `runs/models/cable-set`.")],
    config: Config = CONFIG_FILE,
    as_json: Json = False,
) -> None:
    """Check an exported version and keep it, whole or not at all; it is served once it is promoted."""
    repository = repository_of(configuration.load(config).triton)
    with repository.locked():
        release, is_new = repository.push(folder)
    text = f"{release.product} version {release.version} {'pushed' if is_new else 'was pushed before'}"
    answer(_document(release) | {"new": is_new}, as_json, text)


@models_app.command("promote")
def models_promote(
    product: Product,
    version: Annotated[int, typer.Argument(help="Which version, as `logicrd models list` shows it.", min=1)],
    reason: Reason = "",
    author: Author = "",
    interrupt: Annotated[
        bool, typer.Option("--interrupt", help="Stop serving the product meanwhile, where its tensors have changed.")
    ] = False,
    canary: Annotated[
        float | None, typer.Option(help="Let it judge this percentage of the parts, by the hash of their ids.")
    ] = None,
    config: Config = CONFIG_FILE,
    as_json: Json = False,
) -> None:
    """Let every replica of Triton try a version and then serve it; if one cannot, all stay as they are.

    Running workers take it within seconds. With --canary it judges a share of the parts, until it is promoted without.
    """
    settings, share = configuration.load(config), None if canary is None else _percent(canary)
    repository, by = repository_of(settings.triton), author_of(author)
    with repository.locked(), ModelControl(settings.triton) as control:
        if share is None:
            release = promote(repository, control, product, version, by=by, reason=reason, interrupt=interrupt)
            _answer_served(release, control, as_json)
        else:
            try_beside(repository, control, product, version, mode="canary", percent=share, by=by, reason=reason)
            _answer_trial(repository, product, as_json)


@models_app.command("shadow")
def models_shadow(
    product: Product,
    version: Annotated[int | None, typer.Argument(help="Which version; none: how the trial does.", min=1)] = None,
    percent: Annotated[float, typer.Option(help="Percentage of the parts, by the hash of their ids.")] = 100.0,
    stop: Annotated[bool, typer.Option("--stop", help="End the trial.")] = False,
    reason: Reason = "",
    author: Author = "",
    config: Config = CONFIG_FILE,
    as_json: Json = False,
) -> None:
    """Let a version judge parts as well, without a say in their verdicts; or show how often it would have agreed.

    The figures are those that the running workers told last, each since its start; those of a canary are shown too.
    """
    settings = configuration.load(config)
    repository = repository_of(settings.triton)
    if version is None and not stop:
        _answer_trial(repository, product, as_json, settings)
        return
    if version is not None and stop:
        raise ConfigError("--stop takes no version: there is one trial of a product at most")
    by, share = author_of(author), _percent(percent)
    with repository.locked(), ModelControl(settings.triton) as control:
        if version is None:
            rollout = stop_trial(repository, control, product, by=by, reason=reason)
            ended = {"product": product, "version": rollout.version, "mode": rollout.mode}
            answer(ended, as_json, f"{product}: the {rollout.mode} of version {rollout.version} is ended")
            return
        try_beside(repository, control, product, version, mode="shadow", percent=share, by=by, reason=reason)
        _answer_trial(repository, product, as_json)


@models_app.command("rollback")
def models_rollback(
    product: Product, reason: Reason = "", author: Author = "", config: Config = CONFIG_FILE, as_json: Json = False
) -> None:
    """Take a canary back; without one, serve the version again that was promoted before."""
    settings = configuration.load(config)
    repository, by = repository_of(settings.triton), author_of(author)
    with repository.locked(), ModelControl(settings.triton) as control:
        release = rollback(repository, control, product, by=by, reason=reason)
        _answer_served(release, control, as_json)


@models_app.command("prune")
def models_prune(
    product: Product,
    keep: Annotated[int, typer.Option(help="How many versions promoted before this one stay.", min=1)] = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, and change nothing.")] = False,
    config: Config = CONFIG_FILE,
    as_json: Json = False,
) -> None:
    """Remove versions older than the served one, but for those promoted last; teachers and what is loaded stay."""
    repository = repository_of(configuration.load(config).triton)
    with repository.locked():
        removed = repository.prune(product, keep, dry_run=dry_run)
    words = "would be removed" if dry_run else "removed"
    text = (
        f"{product}: {words}: version {', '.join(map(str, removed))}" if removed else f"{product}: nothing is that old"
    )
    answer({"product": product, "removed": removed, "dry_run": dry_run}, as_json, text)


def _rows(repository: ModelRepository, product: str) -> list[dict[str, Any]]:
    promoted, pushed = repository.promoted(product), repository.pushed(product)
    if promoted is not None:
        pushed = dict(sorted(({promoted.version: promoted} | pushed).items()))
    back, rollout = before(repository.history(product)), repository.rollout(product)
    rows = []
    for version, release in pushed.items():
        state = "served" if promoted is not None and version == promoted.version else "pushed"
        if version == back and state == "pushed":
            state = "before"
        if rollout is not None and version == rollout.version and state != "served":
            state = f"{rollout.mode} {rollout.percent:g} %"
        row: dict[str, Any] = {"product": product, "version": version, "state": state}
        if isinstance(release, CheckError):
            rows.append(row | {"state": "broken", "method": str(release)})
        else:
            rows.append(
                row | _document(release) | {"signed": "yes" if repository.is_signed(product, version) else "no"}
            )
    return rows


def _document(release: Release) -> dict[str, Any]:
    return {
        "product": release.product,
        "version": release.version,
        "created": release.created,
        "method": release.method,
        "model": release.model_sha256[:12],
    }


def _answer_served(release: Release, control: ModelControl, as_json: bool) -> None:
    text = f"{release.product} version {release.version} is served by {', '.join(control.addresses)}"
    answer(_document(release) | {"replicas": control.addresses}, as_json, text)


def _answer_trial(repository: ModelRepository, product: str, as_json: bool, settings: LineConfig | None = None) -> None:
    """Say what is tried of a product and, with the line's settings, what its workers told of it."""
    rollout = repository.rollout(product)
    if rollout is None:
        raise CheckError(f"no version of {product} is on trial", hint="`logicrd models shadow PRODUCT VERSION`")
    share = f"{rollout.percent:g} % of the parts"
    text = f"{product} version {rollout.version} is the {rollout.mode} of {share}; workers begin within seconds"
    if settings is None:
        answer({"product": product, **rollout.model_dump(mode="json")}, as_json, text)
        return
    source = f"/{settings.site}/{settings.area}/{settings.line}"
    rows = candidate_figures(settings.kafka, source, product, rollout.model_sha256)
    total = {name: sum(row[name] for row in rows) for name in CANDIDATE_FIGURES}
    table = table_of([*rows, {"worker": "all", **total}], ["worker", *CANDIDATE_FIGURES, "refused", "told"])
    table.title = f"{product} version {rollout.version}: {rollout.mode} of {share}"
    answer({"product": product, **rollout.model_dump(mode="json"), **total, "workers": rows}, as_json, table)


def _percent(given: float) -> float:
    if not 0 < given <= 100:
        raise ConfigError(f"{given:g} is not a percentage of parts", hint="a number above 0, 100 at most")
    return given
