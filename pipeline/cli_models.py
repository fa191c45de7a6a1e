"""The commands `logicrd models`: which versions of a product there are, and which one is served. No logic."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import config as configuration
from pipeline.config import LineConfig
from pipeline.errors import CheckError, ConfigError
from pipeline.model_control import ModelControl
from pipeline.model_repository import ModelRepository
from pipeline.promotion import promote, rollback
from pipeline.releases import MANIFEST, Release, before
from pipeline.signatures import sign
from pipeline.terminal import CONFIG_FILE, Config, Json, answer, table_of

models_app = typer.Typer(help="Versions of the models, and which one is served.", no_args_is_help=True)

Product = Annotated[str, typer.Argument(help="Which product.")]
Author = Annotated[str, typer.Option(help="Who; default: this machine's name of the user. Nobody checks it.")]
Reason = Annotated[str, typer.Option(help="Why; kept in the history.")]


@models_app.command("list")
def models_list(
    product: Annotated[str, typer.Argument(help="Only this product, with its history.")] = "",
    config: Config = CONFIG_FILE,
    as_json: Json = False,
) -> None:
    """List the versions of each product: which one is served, and to which one a rollback goes."""
    repository = _repository(configuration.load(config))
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
    repository = _repository(configuration.load(config))
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
    config: Config = CONFIG_FILE,
    as_json: Json = False,
) -> None:
    """Let every replica of Triton try a version and then serve it; if one cannot, all stay as they are."""
    settings = configuration.load(config)
    repository, by = _repository(settings), _author(author)
    with repository.locked(), ModelControl(settings.triton) as control:
        release = promote(repository, control, product, version, by=by, reason=reason, interrupt=interrupt)
        _answer_served(release, control, as_json)


@models_app.command("rollback")
def models_rollback(
    product: Product, reason: Reason = "", author: Author = "", config: Config = CONFIG_FILE, as_json: Json = False
) -> None:
    """Serve the version again that was promoted before."""
    settings = configuration.load(config)
    repository, by = _repository(settings), _author(author)
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
    repository = _repository(configuration.load(config))
    with repository.locked():
        removed = repository.prune(product, keep, dry_run=dry_run)
    words = "would be removed" if dry_run else "removed"
    text = (
        f"{product}: {words}: version {', '.join(map(str, removed))}" if removed else f"{product}: nothing is that old"
    )
    answer({"product": product, "removed": removed, "dry_run": dry_run}, as_json, text)


def _repository(settings: LineConfig) -> ModelRepository:
    triton = settings.triton
    models = triton.models_repo
    return ModelRepository(
        models, triton.model_store or models.with_name(f"{models.name}.versions"), triton.signer_file
    )


def _rows(repository: ModelRepository, product: str) -> list[dict[str, Any]]:
    promoted, pushed = repository.promoted(product), repository.pushed(product)
    if promoted is not None:
        pushed = dict(sorted(({promoted.version: promoted} | pushed).items()))
    back = before(repository.history(product))
    rows = []
    for version, release in pushed.items():
        state = "served" if promoted is not None and version == promoted.version else "pushed"
        if version == back and state == "pushed":
            state = "before"
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


def _author(given: str) -> str:
    try:
        return given or getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        raise ConfigError("this user has no name here", hint="give it with --author") from None
