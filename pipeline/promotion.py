"""Makes another version of a product the one that is served, on every replica, or leaves everything as it was.

The way of a version: its files and signature are checked; every replica loads it under other names and lets it judge a
picture; only then are its folders linked into the model repository, its steps loaded beside those that serve, and the
ensemble switched to them. Each step of a promoted ensemble is named by number, so no answer is made by two versions.
Both versions also have an ensemble of their own name, so that a worker goes on with the one before until it has taken
the new one.
What a killed command leaves serves one whole version; the same command again completes it. Called by the commands.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pipeline.errors import CheckError
from pipeline.model_control import ModelControl, Scores
from pipeline.model_repository import ModelRepository
from pipeline.releases import (
    CONFIG,
    MANIFEST,
    Event,
    ModelConfig,
    Release,
    addressed,
    before,
    compatible,
    config_text,
    is_addressed,
    is_ensemble,
    pinned,
)
from pipeline.signatures import SUFFIX


@dataclass(frozen=True, slots=True)
class Plan:
    """The configurations with which a version is served, in the order in which they are loaded: steps, the ensembles of
    single versions, the product's; `interrupts`: its steps take other tensors than those that serve, so that both
    cannot be loaded at once."""

    configs: dict[str, ModelConfig]
    interrupts: bool


@dataclass(slots=True)
class _Done:
    """What was changed so far: files with their former content, and new folders."""

    files: list[tuple[str, str, bytes | None]] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)


def plan_of(
    release: Release,
    pushed: Mapping[str, ModelConfig],
    served: Mapping[str, ModelConfig | None],
    current: Release | None,
) -> Plan:
    """Decide how a version is served. A configuration that fits is kept as it is served: it may have been tuned."""
    fits = {
        model: (old := served.get(model)) is not None and compatible(old, config) for model, config in pushed.items()
    }
    steps = [model for model in pushed if model not in (release.product, release.teacher.model)]
    interrupts = any(served.get(step) is not None and not fits[step] for step in steps)
    versions = [release.version]
    if current is not None and not interrupts:
        versions = sorted({current.version, release.version})
    configs = {}
    for model, config in pushed.items():
        kept = served.get(model)
        base = kept if kept is not None and (fits[model] or model == release.teacher.model) else config
        if model == release.teacher.model:
            configs[model] = base
        else:
            configs[model] = pinned(base, release, versions if model in steps else [release.version])
    product = configs.pop(release.product)
    own = [addressed(product, release)]
    if current is not None and len(versions) > 1 and (old := served.get(release.product)) is not None:
        own.insert(0, addressed(pinned(old, current, [current.version]), current))
    configs |= {config.name: config for config in own} | {release.product: product}
    return Plan(configs, interrupts)


def promote(
    repository: ModelRepository,
    control: ModelControl,
    product: str,
    version: int,
    *,
    by: str,
    reason: str,
    action: Literal["promote", "rollback"] = "promote",
    interrupt: bool = False,
) -> Release:
    """Serve a pushed version from now on; gives it. Blocks until every replica does.

    `interrupt` allows a version whose tensors differ: the product is not served while its steps are loaded. Raises
    CheckError with everything as it was, and says so if a replica could not be told.
    """
    release = repository.checked(product, version)
    current = repository.promoted(product)
    repository.adopt(product)
    pushed = repository.configs(release)
    plan = plan_of(release, pushed, {model: repository.config(model) for model in pushed}, current)
    if plan.interrupts and not interrupt:
        raise CheckError(
            f"{product} version {version} has other tensors than the served one: they cannot be loaded side by side",
            hint="--interrupt: its parts are UNINSPECTED while it is loaded",
        )
    files = {model: repository.weights(release, model) for model in pushed}
    scores = control.try_out(release, plan.configs, files)
    if current is not None:
        repository.pin(current)
        control.load(product)
    done = _Done()
    previous = current.version if current is not None and current.version != version else None
    event = Event(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        action=action,
        version=version,
        previous=previous,
        by=by,
        reason=reason,
        model_sha256=release.model_sha256,
    )
    try:
        _switch(repository, control, release, plan, done, scores)
        _write_manifest(repository, release, done)
        repository.record(product, event)
    except BaseException as error:  # whatever it was, also Ctrl-C: what was served is served again
        faults = _undo(repository, control, plan, done)
        if faults:
            words = f"{error}; put back on disk, but not everywhere in memory: {'; '.join(faults)}"
            raise CheckError(words, hint="restart those replicas") from error
        raise
    return release


def rollback(repository: ModelRepository, control: ModelControl, product: str, *, by: str, reason: str) -> Release:
    """Promote the version that was promoted before; raises CheckError where there is none."""
    version = before(repository.history(product))
    if version is None:
        raise CheckError(f"{product}: no version was promoted before this one", hint="promote one by its number")
    return promote(repository, control, product, version, by=by, reason=reason, action="rollback", interrupt=True)


def _switch(
    repository: ModelRepository, control: ModelControl, release: Release, plan: Plan, done: _Done, scores: Scores
) -> None:
    for model in repository.addressed(release.product):
        if plan.interrupts or model not in plan.configs:  # its steps go
            control.unload(model)
            shutil.rmtree(repository.models / model)
    if plan.interrupts:
        control.unload(release.product)
    own = {model: config for model, config in plan.configs.items() if is_addressed(config, release)}
    _place(repository, release, {model: config for model, config in plan.configs.items() if model not in own}, done)
    for model, config in plan.configs.items():
        if model in own:  # only now: a server that starts must find the steps that it names
            _place(repository, release, {model: config}, done)
        _write(repository, model, CONFIG, config_text(config).encode(), done)
        control.load(model)
    control.prove(release, scores)


def _place(repository: ModelRepository, release: Release, configs: dict[str, ModelConfig], done: _Done) -> None:
    for folder in repository.place(release, configs):
        done.folders.append(folder)  # at once: the next one may fail


def _write_manifest(repository: ModelRepository, release: Release, done: _Done) -> None:
    """Tell the lines: they read this file."""
    signature = repository.read(release, MANIFEST + SUFFIX)
    if signature is not None:
        _write(repository, release.product, MANIFEST + SUFFIX, signature, done)
    _write(repository, release.product, MANIFEST, repository.read(release) or b"", done)


def _write(repository: ModelRepository, model: str, name: str, content: bytes, done: _Done) -> None:
    # Noted first: an interrupt in between must not lose what was there.
    path = repository.models / model / name
    done.files.append((model, name, path.read_bytes() if path.is_file() else None))
    repository.write(model, name, content)


def _undo(repository: ModelRepository, control: ModelControl, plan: Plan, done: _Done) -> list[str]:
    """Put files and folders back, and tell the replicas; gives what went wrong."""
    new = [model for model in plan.configs if repository.models / model in done.folders]
    for model in new:
        if is_ensemble(plan.configs[model]):  # first: what it names goes
            shutil.rmtree(repository.models / model, ignore_errors=True)
    for model, name, content in reversed(done.files):
        if model in new:
            continue
        if content is None:
            (repository.models / model / name).unlink(missing_ok=True)
        else:
            repository.write(model, name, content)
    kept = [model for model in plan.configs if model not in new]
    faults = control.put_back(kept, list(reversed(new)))
    for folder in done.folders:
        shutil.rmtree(folder, ignore_errors=True)
    return faults
