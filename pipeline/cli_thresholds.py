"""The commands `logicrd thresholds`: limits per product in Redis, who changed them and by which rule. No logic."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from pipeline import config as configuration
from pipeline import limits
from pipeline.app import read_manifests
from pipeline.cli_tuning import (
    Last,
    ModelVersion,
    manifest_of,
    own_limits,
    preview,
    thresholds_suggest,
    versions_of,
)
from pipeline.config import LineConfig
from pipeline.errors import ConfigError
from pipeline.limits import Change
from pipeline.manifest import Manifest
from pipeline.terminal import CONFIG_FILE, Author, Config, Json, Reason, answer, author_of, table_of
from pipeline.threshold_store import Policy, ThresholdStore, Written
from pipeline.tuning import Limits

DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")]

thresholds_app = typer.Typer(help="Limits per product, kept in Redis.", no_args_is_help=True)
thresholds_app.command("suggest")(thresholds_suggest)


@thresholds_app.command("list")
def thresholds_list(config: Config = CONFIG_FILE, as_json: Json = False) -> None:
    """Show the limits of every product of the line, and where they come from; of versions that are not served those
    that were set."""
    settings = configuration.load(config)
    store = ThresholdStore(settings.redis)
    rows = []
    for product, manifest in read_manifests(settings).items():
        others = [_row(store, other) for other in versions_of(settings, product)[1].values()]
        rows += [_row(store, manifest), *(row for row in others if row["source"] == "redis")]
    columns = ["product", "model_version", "ng", "review", "version", "source", "updated_by", "reason"]
    answer(rows, as_json, table_of(rows, columns))


@thresholds_app.command("get")
def thresholds_get(
    product: str, model_version: ModelVersion = None, config: Config = CONFIG_FILE, as_json: Json = False
) -> None:
    """Show the limits of one product."""
    _, manifest, store, _ = _opened(config, product, model_version)
    row = _row(store, manifest)
    answer(row, as_json, _lines(row))


@thresholds_app.command("set", context_settings={"ignore_unknown_options": True})
def thresholds_set(
    product: str,
    ng: Annotated[float, typer.Option(help="At this score and above: NG.")],
    review: Annotated[
        float | None, typer.Option(help="At this score and above: REVIEW. Default: the same as --ng.")
    ] = None,
    reason: Reason = "",
    author: Author = "",
    version: Annotated[int | None, typer.Option(help="Refuse unless this version is in force.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show which of the last parts would flip, and change nothing.")
    ] = False,
    last: Last = 1000,
    model_version: ModelVersion = None,
    config: Config = CONFIG_FILE,
    as_json: Json = False,
) -> None:
    """Set the limits of one product; a running line takes them with the next part.

    Those of a version that is not served hold for its scores alone: on trial, and from its promotion on.
    """
    settings, manifest, store, beside = _opened(config, product, model_version)
    expected = None if version is None else str(version)
    review = ng if review is None else review
    if dry_run:
        limits.check_limits(ng, review)
        preview(settings, manifest, _row(store, manifest), Limits(ng, review), last, as_json)
        return
    change = Change(product, ng, review, manifest.model_sha256, reason, expected, beside=beside)
    _write(store, manifest, change, author=author, action="set", as_json=as_json)


@thresholds_app.command("rollback")
def thresholds_rollback(
    product: str,
    to: Annotated[int | None, typer.Option(min=1, help="This version. Default: the one before.")] = None,
    reason: Reason = "",
    author: Author = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show which of the last parts would flip, and change nothing.")
    ] = False,
    last: Last = 1000,
    model_version: ModelVersion = None,
    config: Config = CONFIG_FILE,
    as_json: Json = False,
) -> None:
    """Put limits of the past in force again, as a new version."""
    settings, manifest, store, beside = _opened(config, product, model_version)
    current = store.of_model(product, manifest.model_sha256).get("version", "0")
    past = limits.to_roll_back_to(store.history(product, 1000), current, to, manifest)
    if dry_run:
        preview(settings, manifest, _row(store, manifest), Limits(past.ng, past.review), last, as_json)
        return
    why = f"rollback to version {past.version}" + (f": {reason}" if reason else "")
    change = Change(product, past.ng, past.review, manifest.model_sha256, why, expected=current, beside=beside)
    _write(store, manifest, change, author=author, action="rollback", as_json=as_json)


@thresholds_app.command("history")
def thresholds_history(
    product: str,
    count: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    config: Config = CONFIG_FILE,
    as_json: Json = False,
) -> None:
    """Show who changed the limits of a product, when and why; newest first."""
    rows = ThresholdStore(configuration.load(config).redis).history(product, count)
    columns = ["version", "action", "ng", "review", "updated_at", "updated_by", "updated_as", "approved_by", "reason"]
    shown = [row | {"model": row.get("model_sha256", "")[:12]} for row in rows]
    answer(rows, as_json, table_of(shown, [*columns[:4], "model", *columns[4:]]))


@thresholds_app.command("export")
def thresholds_export(
    out: Annotated[Path | None, typer.Option(help="File to write. Default: stdout.")] = None,
    config: Config = CONFIG_FILE,
    as_json: Json = False,
) -> None:
    """Write the limits of the line's products to a file, as YAML or with --json; products without any are left out,
    and so are versions that are not served."""
    settings = configuration.load(config)
    store = ThresholdStore(settings.redis)
    found = {product: store.of_model(product, each.model_sha256) for product, each in read_manifests(settings).items()}
    records = {product: fields for product, fields in found.items() if fields}
    document = limits.to_document(records)
    if as_json:  # with its characters as they are: YAML, as which it is read again, joins no halves of one
        text = json.dumps(document, ensure_ascii=False, indent=1) + "\n"
    else:
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    if out is None:
        sys.stdout.write(text)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror}") from None


@thresholds_app.command("import")
def thresholds_import(
    file: Annotated[Path, typer.Argument(help="What `export` wrote.")],
    only_unset: Annotated[
        bool, typer.Option("--only-unset", help="Leave products alone that have limits for the served model.")
    ] = False,
    reason: Reason = "",
    author: Author = "",
    dry_run: DryRun = False,
    config: Config = CONFIG_FILE,
    as_json: Json = False,
) -> None:
    """Make the limits in Redis those of a file: all that differ at once, or, when one cannot be, none."""
    settings = configuration.load(config)
    document = configuration.read_yaml(file)
    store = ThresholdStore(settings.redis)
    products = limits.products_of(document)
    manifests = {product: manifest_of(settings, product, None)[0] for product in products}
    current = {product: _or_none(store, manifest) for product, manifest in manifests.items()}
    changes = limits.plan(document, str(file), current, manifests)
    if only_unset:
        changes = [
            each for each in changes if limits.read(current[each.product], manifests[each.product]).threshold is None
        ]
    why = reason or f"import of {file.name}"
    changes = [Change(**{**asdict(change), "reason": why}) for change in changes]
    written = [] if dry_run or not changes else store.write(changes, author=author_of(author), action="import")
    rows = [
        {
            "product": change.product,
            "ng": f"{current[change.product].get('ng', 'none')} -> {change.ng}",
            "review": f"{current[change.product].get('review', 'none')} -> {change.review}",
            "version": _fate(done),
        }
        for change, done in zip(changes, written or [Written(change.product) for change in changes], strict=True)
    ]
    text = table_of(rows, ["product", "ng", "review", "version"]) if rows else "nothing differs"
    answer({"dry_run": dry_run, "changes": rows}, as_json, text)


@thresholds_app.command("policy")
def thresholds_policy(
    two_person: Annotated[
        bool | None, typer.Option("--two-person/--one-person", help="Whether a second person has to approve.")
    ] = None,
    people: Annotated[
        Literal["authors", "users"], typer.Option(help="Two names are two people, or only two users of Redis are.")
    ] = "authors",
    expiry_h: Annotated[float, typer.Option(min=1 / 60, max=720, help="A proposal is void after this.")] = 8.0,
    reason: Reason = "",
    author: Author = "",
    config: Config = CONFIG_FILE,
    as_json: Json = False,
) -> None:
    """Show, or set, the rule by which limits come into force."""
    if not 1 / 60 <= expiry_h <= 720:  # as above, where NaN passes
        raise typer.BadParameter("--expiry-h is a finite number of hours")
    store = ThresholdStore(configuration.load(config).redis)
    if two_person is not None:
        rule = Policy(approvals=2 if two_person else 1, expiry_s=round(expiry_h * 3600), people=people)
        store.set_policy(rule, author=author_of(author), reason=reason)
    rule = store.policy()
    answer(asdict(rule), as_json, _lines(asdict(rule)))


@thresholds_app.command("proposals")
def thresholds_proposals(config: Config = CONFIG_FILE, as_json: Json = False) -> None:
    """Show what waits for a second person."""
    settings = configuration.load(config)
    store = ThresholdStore(settings.redis)
    rows = []
    for product, manifest in read_manifests(settings).items():
        own = store.proposal(product)
        known = (manifest, *versions_of(settings, product)[1].values())
        versions = {each.model_sha256: each.version for each in known}
        for fields in (own, *(store.proposal(product, sha) for sha in versions)):
            if fields:  # that at the product's record may be for the version that was served when it was made
                version = versions.get(fields.get("model_sha256", ""), "?")
                rows.append({"product": product, "model_version": version, **fields})
    columns = ["product", "model_version", "id", "ng", "review", "base", "updated_by", "expires_at", "reason"]
    answer(rows, as_json, table_of(rows, columns) if rows else "nothing waits")


@thresholds_app.command("approve")
def thresholds_approve(
    product: str,
    proposal: Annotated[str, typer.Argument(help="Its id, as `proposals` shows it.")],
    author: Author = "",
    model_version: ModelVersion = None,
    config: Config = CONFIG_FILE,
    as_json: Json = False,
) -> None:
    """Put somebody else's proposal in force."""
    _, manifest, store, beside = _opened(config, product, model_version)
    sha = manifest.model_sha256
    store.approve(product, proposal, author=author_of(author), model_sha256=sha, beside=beside)
    row = _row(store, manifest)
    answer(row, as_json, _lines(row))


@thresholds_app.command("withdraw")
def thresholds_withdraw(
    product: str,
    proposal: Annotated[str, typer.Argument(help="Its id, as `proposals` shows it.")],
    reason: Reason = "",
    author: Author = "",
    model_version: ModelVersion = None,
    config: Config = CONFIG_FILE,
    as_json: Json = False,
) -> None:
    """Take a proposal back, or refuse another's."""
    _, manifest, store, _ = _opened(config, product, model_version)
    store.withdraw(product, proposal, author=author_of(author), model_sha256=manifest.model_sha256, reason=reason)
    answer({"withdrawn": proposal}, as_json, f"{product}: proposal {proposal} is withdrawn")


def threshold_doubts(store: ThresholdStore, manifests: Iterable[Manifest]) -> list[str]:
    """Name the products whose record in Redis a line would not use, for `logicrd check`. Raises DependencyError."""
    rows = [_row(store, manifest) for manifest in manifests]
    return [f"threshold of {row['product']}: {row['reason']}" for row in rows if row["version"] == 0 and row["reason"]]


def _opened(config: Path, product: str, version: int | None) -> tuple[LineConfig, Manifest, ThresholdStore, bool]:
    settings = configuration.load(config)
    manifest, beside = manifest_of(settings, product, version)
    return settings, manifest, ThresholdStore(settings.redis), beside


def _or_none(store: ThresholdStore, manifest: Manifest) -> Mapping[str, str]:
    try:
        return store.of_model(manifest.product, manifest.model_sha256)
    except ConfigError:
        return {}


def _row(store: ThresholdStore, manifest: Manifest) -> dict[str, Any]:
    """Show the limits for a version's scores as a line that has just been started would take them."""
    named = {"product": manifest.product, "model_version": manifest.version}
    try:
        fields = store.of_model(manifest.product, manifest.model_sha256)
        reading = limits.read(fields, manifest)
        why = "" if reading.fault == "absent" else reading.why
    except ConfigError as error:
        fields, reading, why = {}, limits.Reading(None, "invalid"), str(error)
    if reading.threshold is None:
        told = {name: round(value, 4) for name, value in asdict(own_limits(manifest)).items()}
        blank = dict.fromkeys(("updated_by", "updated_at"), "")
        return {**named, **told, "version": 0, "source": "manifest", **blank, "reason": why}
    shown = {key: fields.get(key, "") for key in ("ng", "review", "version")}
    rest = {key: fields.get(key, "") for key in ("updated_by", "updated_at", "updated_as", "approved_by", "reason")}
    return {**named, **shown, "source": "redis", **rest}


def _write(
    store: ThresholdStore, manifest: Manifest, change: Change, *, author: str, action: str, as_json: bool
) -> None:
    before = _row(store, manifest)
    (done,) = store.write([change], author=author_of(author), action=action)
    if done.proposal is not None:
        text = f"{change.product}: proposed as {done.proposal}; in force once a second person approves:\n"
        text += f"  logicrd thresholds approve {change.product} {done.proposal}"
        text += f" --model-version {manifest.version}" if change.beside else ""
        proposal = store.proposal(change.product, manifest.model_sha256 if change.beside else "")
        answer({"before": before, "proposal": proposal}, as_json, text)
        return
    after = _row(store, manifest)
    moved = ", ".join(f"{name} {before[name]} -> {after[name]}" for name in ("ng", "review"))
    text = f"{change.product}: {moved}, version {done.version}"
    answer({"before": before, "after": after}, as_json, text)


def _fate(done: Written) -> str:
    return f"proposal {done.proposal}" if done.proposal else str(done.version or "")


def _lines(row: dict[str, Any]) -> str:
    return "\n".join(f"{key:14} {value}" for key, value in row.items())
