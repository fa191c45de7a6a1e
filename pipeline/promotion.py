"""Makes another version of a product the one that is served, on every replica, or leaves everything as it was.

The way of a version: its files and signature are checked; every replica loads it under other names and lets it judge a
picture; only then are its folders linked into the model repository, its steps loaded beside those that serve, and the
ensemble switched to them. Each step of a promoted ensemble is named by number, so no answer is made by two versions.
Both versions also have an ensemble of their own name, so that a worker goes on with the one before until it has taken
the new one.
A version on trial is loaded in the same way, but the product's ensemble is not switched to it. What a killed command
leaves serves one whole version; the same command again completes it. Called by the commands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from pipeline.errors import CheckError, LineError
from pipeline.manifest import ensemble_of, other_pictures
from pipeline.model_control import ModelControl, Scores
from pipeline.model_repository import ModelRepository
from pipeline.releases import (
    CONFIG,
    MANIFEST,
    Action,
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
    versions_of,
)
from pipeline.rollouts import CANDIDATE, ROLLOUT, Rollout
from pipeline.signatures import SUFFIX

_TRIAL_FILES = (ROLLOUT, CANDIDATE, CANDIDATE + SUFFIX)


@dataclass(frozen=True, slots=True)
class Plan:
    """The configurations with which a version is served, in the order in which they are loaded: steps, the ensembles of
    single versions, the product's; `interrupts`: its steps take other tensors than those that serve, so that both
    cannot be loaded at once."""

    configs: dict[str, ModelConfig]
    interrupts: bool


@dataclass(slots=True)
class _Work:
    """One change, and what was done of it so far: files with their former content, and new folders."""

    repository: ModelRepository
    control: ModelControl
    release: Release
    current: Release | None
    plan: Plan
    scores: Scores = field(default_factory=dict)
    files: list[tuple[str, str, bytes | None]] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)


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
    _require_no_other(repository, product, version)
    work = _prepare(repository, control, product, version)
    if work.plan.interrupts and not interrupt:
        raise CheckError(
            f"{product} version {version} has other tensors than the served one: they cannot be loaded side by side",
            hint="--interrupt: its parts are UNINSPECTED while it is loaded",
        )
    previous = work.current.version if work.current is not None and work.current.version != version else None
    event = _event(action, version, previous, by, reason, work.release.model_sha256)
    with _all_or_nothing(work):
        _switch(work, product)
        _write_manifest(work)
        for name in _TRIAL_FILES:
            _remove(work, name)
        repository.record(product, event)
    return work.release


def try_beside(
    repository: ModelRepository,
    control: ModelControl,
    product: str,
    version: int,
    *,
    mode: Literal["canary", "shadow"],
    percent: float,
    by: str,
    reason: str,
) -> Release:
    """Let workers try a pushed version on a share of the product's parts, beside the one in force; gives it.

    Blocks until every replica serves both. Raises CheckError as `promote` does, and where the two cannot be served at
    once.
    """
    _require_no_other(repository, product, version)
    work = _prepare(repository, control, product, version)
    if work.current is None or work.current.version == version:
        raise CheckError(f"{product} version {version} has nothing to be tried beside", hint="promote another one")
    others = other_pictures(work.release, work.current) or ("tensors" if work.plan.interrupts else "")
    if others:
        raise CheckError(f"{product} version {version} has other {others} than the served one", hint="promote it whole")
    event = _event(mode, version, None, by, reason, work.release.model_sha256)
    words = event.model_dump(include={"version", "model_sha256", "at", "by", "reason"})
    rollout = Rollout(mode=mode, percent=percent, **words)
    del work.plan.configs[product]
    with _all_or_nothing(work):
        _switch(work, ensemble_of(product, version))
        _write_manifest(work, CANDIDATE)
        _write(work, product, ROLLOUT, rollout.model_dump_json().encode())
        repository.record(product, event)
    return work.release


def stop_trial(repository: ModelRepository, control: ModelControl, product: str, *, by: str, reason: str) -> Rollout:
    """Let the version in force judge every part again, and unload the one on trial; gives what was tried.

    Raises CheckError where none is on trial, and when a replica could not be told: workers use it no more even then.
    """
    rollout, current = repository.rollout(product), repository.promoted(product)
    if rollout is None or current is None:
        raise CheckError(f"no version of {product} is on trial", hint="`logicrd models list` shows what is")
    for name in _TRIAL_FILES:
        repository.remove(f"{product}/{name}")
    repository.record(product, _event("stop", rollout.version, None, by, reason, rollout.model_sha256))
    _forget(repository, control, ensemble_of(product, rollout.version))
    for model in repository.own_steps(current):
        config = repository.config(model)
        if config is not None and rollout.version in versions_of(config):
            left = [version for version in versions_of(config) if version != rollout.version]
            repository.write(model, CONFIG, config_text(pinned(config, current, left)).encode())
            control.load(model)
    return rollout


def rollback(repository: ModelRepository, control: ModelControl, product: str, *, by: str, reason: str) -> Release:
    """Take back a canary, or else promote the version that was promoted before; gives the version in force.

    A shadow ends with it. Raises CheckError where there is nothing to take back.
    """
    rollout, current = repository.rollout(product), repository.promoted(product)
    if rollout is not None:
        stop_trial(repository, control, product, by=by, reason=reason)
        if rollout.mode == "canary" and current is not None:
            return current
    version = before(repository.history(product))
    if version is None:
        raise CheckError(f"{product}: no version was promoted before this one", hint="promote one by its number")
    return promote(repository, control, product, version, by=by, reason=reason, action="rollback", interrupt=True)


def _require_no_other(repository: ModelRepository, product: str, version: int) -> None:
    rollout = repository.rollout(product)
    if rollout is not None and rollout.version != version:
        raise CheckError(
            f"{product}: version {rollout.version} is on trial ({rollout.mode})",
            hint="promote it, or end the trial: `logicrd models rollback` for a canary, `shadow --stop` for a shadow",
        )


def _prepare(repository: ModelRepository, control: ModelControl, product: str, version: int) -> _Work:
    """Check a version anew, and decide how it would be served. Raises CheckError."""
    release = repository.checked(product, version)
    current = repository.promoted(product)
    repository.adopt(product)
    pushed = repository.configs(release)
    plan = plan_of(release, pushed, {model: repository.config(model) for model in pushed}, current)
    return _Work(repository, control, release, current, plan)


def _event(action: Action, version: int, previous: int | None, by: str, reason: str, sha256: str) -> Event:
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return Event(at=at, action=action, version=version, previous=previous, by=by, reason=reason, model_sha256=sha256)


@contextmanager
def _all_or_nothing(work: _Work) -> Iterator[None]:
    """Let every replica try a version, and pin what is served to its own number; if what is done inside then fails, put
    it back on disk and in every replica."""
    files = {model: work.repository.weights(work.release, model) for model in work.plan.configs}
    work.scores = work.control.try_out(work.release, work.plan.configs, files)
    if work.current is not None:
        work.repository.pin(work.current)
        work.control.load(work.release.product)
    try:
        yield
    except BaseException as error:  # whatever it was, also Ctrl-C: what was served is served again
        lasting, faults = _undo(work)
        if lasting:
            words = f"{error}; what it had written is still in the repository: {'; '.join(lasting)}"
            raise CheckError(words, hint="give the same command again when it can be written to") from error
        if faults:
            words = f"{error}; put back on disk, but not everywhere in memory: {'; '.join(faults)}"
            raise CheckError(words, hint="restart those replicas") from error
        raise


def _switch(work: _Work, ensemble: str) -> None:
    """Load a version beside the one that serves, and prove that the ensemble of that name is the one that was tried."""
    repository, control, release, plan = work.repository, work.control, work.release, work.plan
    for model in repository.addressed(release.product):
        if plan.interrupts or model not in plan.configs:  # its steps go
            _forget(repository, control, model)
    if plan.interrupts:
        control.unload(release.product)
    own = {model: config for model, config in plan.configs.items() if is_addressed(config, release)}
    _place(work, {model: config for model, config in plan.configs.items() if model not in own})
    for model, config in plan.configs.items():
        if model in own:  # only now: a server that starts must find the steps that it names
            _place(work, {model: config})
        _write(work, model, CONFIG, config_text(config).encode())
        control.load(model)
    control.prove(release, work.scores, ensemble)


def _forget(repository: ModelRepository, control: ModelControl, ensemble: str) -> None:
    # The folder first: a server that starts meanwhile must not find an ensemble whose steps go.
    repository.remove(ensemble)
    control.unload(ensemble)


def _place(work: _Work, configs: dict[str, ModelConfig]) -> None:
    for folder in work.repository.place(work.release, configs):
        work.folders.append(folder)  # at once: the next one may fail


def _write_manifest(work: _Work, name: str = MANIFEST) -> None:
    """Tell the lines: they read this file."""
    signature = work.repository.as_pushed(work.release, MANIFEST + SUFFIX)
    if signature is not None:
        _write(work, work.release.product, name + SUFFIX, signature)
    _write(work, work.release.product, name, work.repository.as_pushed(work.release) or b"")


def _write(work: _Work, model: str, name: str, content: bytes) -> None:
    # Noted first: an interrupt in between must not lose what was there.
    _note(work, model, name)
    work.repository.write(model, name, content)


def _remove(work: _Work, name: str) -> None:
    _note(work, work.release.product, name)
    work.repository.remove(f"{work.release.product}/{name}")


def _note(work: _Work, model: str, name: str) -> None:
    work.files.append((model, name, work.repository.read(model, name)))


def _undo(work: _Work) -> tuple[list[str], list[str]]:
    """Put files and folders back, and tell the replicas; gives what went wrong with the first and with the second."""
    repository, configs = work.repository, work.plan.configs
    new, lasting = [model for model in configs if model in work.folders], []

    def change(what: Callable[..., object], *arguments: object) -> None:
        try:
            what(*arguments)
        except (LineError, OSError) as error:
            lasting.append(str(error))

    for model in new:
        if is_ensemble(configs[model]):  # first: what it names goes
            change(repository.remove, model)
    for model, name, content in reversed(work.files):
        if model in new:
            continue
        if content is None:
            change(repository.remove, f"{model}/{name}")
        else:
            change(repository.write, model, name, content)
    kept = [model for model in configs if model not in new]
    faults = work.control.put_back(kept, list(reversed(new)))
    for folder in work.folders:
        change(repository.remove, folder)
    return lasting, faults
