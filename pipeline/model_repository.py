"""The versions of products on disk: what was pushed, what Triton serves, and how one becomes the other.

Two folders on one file system. The store keeps each pushed version as one tree, `<store>/<product>/<version>/`, with
the history of the product beside it; Triton never looks there, and a push ends with one rename. The model repository
holds what Triton serves: version folders are links to the store's files, and configurations name versions by number.
S3-compatible stores are not here: another class with these methods would be one. Talks to no server. Called by
`promotion` and the commands.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pipeline.errors import CheckError, ConfigError
from pipeline.model_files import copy_file, flush, flush_folder, link, move_in, replace, sha256
from pipeline.releases import (
    CONFIG,
    HARMLESS,
    MANIFEST,
    TEACHER_VERSION,
    Event,
    ModelConfig,
    Release,
    config_faults,
    config_text,
    is_ensemble,
    name_faults,
    outside_files,
    parse_config,
    parse_history,
    parse_release,
    path_fault,
    pinned,
    prunable,
    steps_of,
    versions_of,
)
from pipeline.rollouts import Rollout, read_rollout
from pipeline.servers import Triton
from pipeline.signatures import SUFFIX, fault_of_signature, read_signature

_SIGNATURE = MANIFEST + SUFFIX
_HISTORY = "history.jsonl"
# In a version that was served before it was ever pushed: its configurations may have been tuned since.
_ADOPTED = "adopted"
_INCOMING = ".incoming-"


class ModelRepository:
    """The two folders. Methods that change something are called under `locked`."""

    def __init__(self, models: Path, store: Path, signer: Path | None = None) -> None:
        """`signer`: the file of public keys without whose signature no version is pushed or promoted."""
        self.models = models
        self._store = store
        self._signer = signer

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands out; remove what a killed one left half copied. Raises CheckError when one is at work."""
        if not self.models.is_dir():
            raise ConfigError(f"model repository {self.models} does not exist", hint="correct triton.models_repo")
        try:
            self._store.mkdir(parents=True, exist_ok=True)
            with (self._store / "lock").open("w") as lock:
                self._lock(lock)
                for left in self._store.glob(f"{_INCOMING}*"):
                    shutil.rmtree(left)
                yield
        except OSError as error:
            words = f"{error.filename or self._store}: {error.strerror or error}"
            raise CheckError(words, hint="look at the rights of this user and the room on the disk") from error

    def _lock(self, lock: IO[str]) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckError(f"another command is at work on {self._store}", hint="try again when it ends") from None

    # What is there

    def products(self) -> list[str]:
        """Name every product that is served or was pushed."""
        served = (path.parent.name for path in self.models.glob(f"*/{MANIFEST}"))
        pushed = (
            path.parents[1].name for path in self._store.glob(f"*/*/{MANIFEST}") if path.parents[1].name[0] != "."
        )
        return sorted({*served, *pushed})

    def promoted(self, product: str) -> Release | None:
        """Read the manifest that the lines read; None when the product has none yet. Raises CheckError."""
        return _manifest(self.models / product / MANIFEST)

    def pushed(self, product: str) -> dict[int, Release | CheckError]:
        """Read the manifest of each version in the store, unchecked; an error where it cannot be read."""
        found: dict[int, Release | CheckError] = {}
        for path in self._store.glob(f"{product}/[0-9]*/{MANIFEST}"):
            try:
                found[int(path.parent.name)] = parse_release(path.read_bytes(), str(path))
            except CheckError as error:
                found[int(path.parent.name)] = error
        return dict(sorted(found.items()))

    def is_signed(self, product: str, version: int) -> bool:
        """Whether a version has a signature, of whomever."""
        return (self.tree(product, version) / _SIGNATURE).is_file()

    def history(self, product: str) -> list[Event]:
        """List the product's promotions and rollbacks, oldest first."""
        path = self._store / product / _HISTORY
        return parse_history(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else []

    def tree(self, product: str, version: int) -> Path:
        """Give the folder of a pushed version."""
        return self._store / product / str(version)

    def config(self, model: str) -> ModelConfig | None:
        """Read the configuration with which a model is served; None when there is no such model. Raises CheckError."""
        path = self.models / model / CONFIG
        return parse_config(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else None

    def checked(self, product: str, version: int) -> Release:
        """Read a pushed version after checking its signature and every file of it anew. Raises CheckError."""
        tree = self.tree(product, version)
        release = _manifest(tree / MANIFEST)
        if release is None:
            versions = ", ".join(map(str, self.pushed(product))) or "none"
            raise CheckError(f"{product} has no version {version}; pushed are: {versions}", hint="push it first")
        self._check(tree, release)
        return release

    def configs(self, release: Release) -> dict[str, ModelConfig]:
        """Read a pushed version's own configurations, by model, in the order of its steps, the ensemble last."""
        tree = self.tree(release.product, release.version)
        return _configs(tree, release)

    def weights(self, release: Release, model: str) -> dict[str, Path]:
        """Name the files of one model of a pushed version, without its configuration."""
        tree = self.tree(release.product, release.version)
        paths = (tree / path for path in release.files if path.startswith(f"{model}/"))
        return {path.name: path for path in paths if path.name != CONFIG}

    def own_steps(self, release: Release) -> list[str]:
        """Name the models of a served version's steps but for its teacher, which products share."""
        ensemble = self.config(release.product)
        return [step for step in steps_of(ensemble) if step != release.teacher.model] if ensemble is not None else []

    def rollout(self, product: str) -> Rollout | None:
        """Read which version is tried beside the one in force; None when none is. Raises ConfigError."""
        return read_rollout(self.models, product)

    # What changes it

    def push(self, source: Path) -> tuple[Release, bool]:
        """Copy the version that an exported product's folder describes into the store, whole and checked, or not at
        all; gives it, and whether it is new. Raises CheckError."""
        release = _manifest(source / MANIFEST)
        if release is None:
            raise CheckError(f"{source} has no {MANIFEST}", hint="name the product's folder that was exported")
        return release, self._take(source, release, adopted=False)

    def adopt(self, product: str) -> None:
        """Keep the version that is served, if it was never pushed, so that a rollback can return to it."""
        release = self.promoted(product)
        if release is not None and not (self.tree(product, release.version) / MANIFEST).is_file():
            self._take(self.models / product, release, adopted=True)

    def place(self, release: Release, configs: dict[str, ModelConfig]) -> Iterator[Path]:
        """Link a version's folders into the model repository; gives each that is new, once it is there.

        A model that is new comes with its configuration of `configs`, as one rename. Serves nothing: the configurations
        that are there do not name it.
        """
        with self._incoming() as stage:
            for model, config in configs.items():
                version = str(_folder_of(config, release))
                folder = stage / model / version
                folder.mkdir(parents=True)
                for name, path in self.weights(release, model).items():
                    link(path, folder / name)
                if is_ensemble(config):
                    (folder / ".gitkeep").touch()  # Triton wants the folder, and Git keeps no empty one
                (stage / model / CONFIG).write_text(config_text(config), encoding="utf-8")
                target = self.models / model
                source = stage / model if not target.exists() else folder
                yield from move_in(source, target if not target.exists() else target / version, HARMLESS)

    def prune(self, product: str, keep: int, *, dry_run: bool) -> list[int]:
        """Remove old versions, see `prunable`, from both folders; gives them. Teachers stay: products share them."""
        release = self.promoted(product)
        if release is None:
            raise CheckError(f"no version of {product} is promoted: nothing is older than it")
        models = [product, *(path.name for path in self.models.glob(f"{product}.*"))]
        folders = [path for model in models for path in (self.models / model).glob("[0-9]*") if path.name.isdecimal()]
        there = {int(path.name) for path in folders} | self.pushed(product).keys()
        served = [version for model in models if (config := self.config(model)) for version in versions_of(config)]
        old = prunable(sorted(there), release.version, served, self.history(product), keep)
        for version in () if dry_run else old:
            # The store first: what is no more there cannot be promoted, whatever is left of it.
            for path in [self.tree(product, version), *(path for path in folders if int(path.name) == version)]:
                shutil.rmtree(path, ignore_errors=not path.exists())
        return old

    def pin(self, release: Release) -> None:
        """Let the configurations of the served version name it, so that a newer folder beside it is never taken."""
        for model in (release.product, *self.own_steps(release)):
            config = self.config(model)
            if config is None:
                raise CheckError(f"model repository {self.models}: {model} of {release.product} is not there")
            named = versions_of(config)
            if model == release.product or release.version not in named:
                named = [release.version]
            self.write(model, CONFIG, config_text(pinned(config, release, named)).encode())

    def addressed(self, product: str) -> list[str]:
        """Name the ensembles of single versions of a product that are in the model repository."""
        named = re.compile(re.escape(product) + r"\.v[1-9][0-9]*")
        return sorted(path.name for path in self.models.glob(f"{product}.v*") if named.fullmatch(path.name))

    def write(self, model: str, name: str, content: bytes) -> bytes | None:
        """Replace a file of a model as a whole; gives what was there. One that is the same is left alone."""
        path = self.models / model / name
        before = path.read_bytes() if path.is_file() else None
        if before != content:
            replace(path, content)
        return before

    def read(self, release: Release, name: str = MANIFEST) -> bytes | None:
        """Give the manifest of a pushed version as it is written, or its signature by `name`."""
        path = self.tree(release.product, release.version) / name
        return path.read_bytes() if path.is_file() else None

    def record(self, product: str, event: Event) -> None:
        """Add an event to the product's history."""
        path = self._store / product / _HISTORY
        before = path.read_bytes() if path.is_file() else b""
        replace(path, before + event.model_dump_json().encode() + b"\n")

    # Parts

    def _take(self, source: Path, release: Release, *, adopted: bool) -> bool:
        target = self.tree(release.product, release.version)
        if source.resolve().name != release.product or (faults := name_faults(release)):
            faults = faults if source.resolve().name == release.product else [f"is of product {release.product!r}"]
            raise CheckError(f"{source / MANIFEST}: {'; '.join(faults)}", hint="export the product again")
        present = _manifest(target / MANIFEST)
        if present is not None and present.model_sha256 != release.model_sha256:
            raise CheckError(
                f"{release.product} has another version {release.version} already",
                hint="export into a model repository that holds the earlier versions: there it gets the next number",
            )
        if present is not None and not (target / _ADOPTED).is_file():
            return False
        with self._incoming() as stage:
            _copy(source, release, stage)
            if adopted:
                (stage / _ADOPTED).touch()
            self._check(stage, release, signature=not adopted)
            target.parent.mkdir(exist_ok=True)
            flush(stage)
            if target.exists():
                target.rename(stage.with_name(stage.name + "-replaced"))
            stage.rename(target)
            flush_folder(target.parent)
        return True

    def _check(self, tree: Path, release: Release, *, signature: bool = True) -> None:
        """Raise CheckError with everything that is wrong with a version's tree."""
        faults = name_faults(release)
        if signature and self._signer is not None:
            path = tree / MANIFEST
            fault = fault_of_signature(path.read_bytes(), read_signature(path), self._signer)
            faults += [f"{MANIFEST}: {fault}"] * bool(fault)
        tuned = (tree / _ADOPTED).is_file()
        if not faults:
            found = (_fault_of_file(tree, name, digest, release, tuned) for name, digest in release.files.items())
            faults = [fault for fault in found if fault] or config_faults(release, _configs(tree, release))
        if faults:
            words = f"{release.product} version {release.version}: {'; '.join(faults)}"
            raise CheckError(words, hint="nothing was changed; export or copy it again")

    @contextmanager
    def _incoming(self) -> Iterator[Path]:
        """A folder in the store for what is not whole yet."""
        stage = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=self._store))
        stage.chmod(0o755)
        try:
            yield stage
        finally:
            for left in self._store.glob(f"{stage.name}*"):
                shutil.rmtree(left)


def repository_of(settings: Triton) -> ModelRepository:
    """Give the repository of a line file."""
    models = settings.models_repo
    store = settings.model_store or models.with_name(f"{models.name}.versions")
    return ModelRepository(models, store, settings.signer_file)


def _folder_of(config: ModelConfig, release: Release) -> int:
    """Give the version folder that a model needs; that of an ensemble is the version which it is for."""
    if is_ensemble(config):
        return (versions_of(config) or [release.version])[0]
    return TEACHER_VERSION if config.name == release.teacher.model else release.version


def _manifest(path: Path) -> Release | None:
    return parse_release(path.read_bytes(), str(path)) if path.is_file() else None


def _configs(tree: Path, release: Release) -> dict[str, ModelConfig]:
    names = dict.fromkeys(name.partition("/")[0] for name in release.files)
    found = {model: tree / model / CONFIG for model in names}
    configs = {
        model: parse_config(path.read_text(encoding="utf-8"), f"{model}/{CONFIG}")
        for model, path in found.items()
        if path.is_file()
    }
    order = steps_of(configs[release.product]) if release.product in configs else []
    # A model that no step names stays, so that it is complained of.
    ranks = {model: rank for rank, model in enumerate(order)} | {release.product: len(order)}
    return dict(sorted(configs.items(), key=lambda item: ranks.get(item[0], -1)))


def _fault_of_file(tree: Path, name: str, digest: str, release: Release, tuned: bool) -> str:
    path = tree / name
    if not path.is_file():
        return f"file {name} is missing"
    if sha256(path) != digest and not (tuned and path.name == CONFIG):
        return f"file {name} is not the manifest's"
    if path.suffix != ".onnx":
        return ""
    try:
        locations = outside_files(path.read_bytes())
    except CheckError as error:
        return f"file {name} is {error}"
    folder = name.rpartition("/")[0]
    found = (fault for location in locations if (fault := path_fault(location, folder, release.files)))
    return next((f"file {name} {fault}" for fault in found), "")


def _copy(source: Path, release: Release, stage: Path) -> None:
    """Copy a version's files out of an exported repository. Raises CheckError for links and for files beside them."""
    root = source.parent
    folders = dict.fromkeys(Path(name).parent for name in release.files)
    for folder in (*folders, Path(release.product, str(release.version))):
        for part in (folder, *folder.parents[:-1]):
            if (root / part).is_symlink():
                raise CheckError(f"{root / part} is a link", hint="push the folder itself")
        if not folder.name.isdecimal() or not (root / folder).is_dir():
            continue
        listed = {Path(name).name for name in release.files if Path(name).parent == folder}
        beside = {path.name for path in (root / folder).iterdir()} - listed - HARMLESS
        if beside:
            raise CheckError(
                f"{root / folder} holds files that the manifest does not list: {', '.join(sorted(beside))}"
            )
    for name in release.files:
        copy_file(root / name, stage / name)
    for name in (MANIFEST, _SIGNATURE):
        if name == MANIFEST or (source / name).is_file():
            copy_file(source / name, stage / name)
