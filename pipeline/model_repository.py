"""The versions of products: what was pushed, what Triton serves, and how one becomes the other.

Two places, both folders on one file system or both in S3. The store keeps each pushed version as one tree,
`<store>/<product>/<version>/`, with the history of the product beside it; Triton never looks there, and a version is
there once its manifest is, which comes last. The model repository holds what Triton serves: version folders are links
to the store's files, in S3 copies, and configurations name versions by number. Talks to no server but the store's.
Called by `promotion` and the commands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from pipeline.errors import CheckError, ConfigError
from pipeline.model_files import HARMLESS, copy_file, link, sha256
from pipeline.places import Where
from pipeline.releases import (
    CONFIG,
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
from pipeline.stores import Store, store_of

_SIGNATURE = MANIFEST + SUFFIX
_HISTORY = "history.jsonl"
# In a version that was served before it was ever pushed: its configurations may have been tuned since.
_ADOPTED = "adopted"


class ModelRepository:
    """The two places. Methods that change something are called under `locked`."""

    def __init__(self, models: Where, store: Where, signer: Path | None = None) -> None:
        """`signer`: the file of public keys without whose signature no version is pushed or promoted."""
        self.models = models
        self._models = store_of(models)
        self._store = store_of(store)
        self._signer = signer
        self._copies: Path | None = None  # of versions that are not on this machine, under `locked`

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands out; remove what a killed one left half copied. Raises CheckError when one is at work."""
        if not self._models.exists():
            raise ConfigError(f"model repository {self.models} does not exist", hint="correct triton.models_repo")
        try:
            with self._store.locked(), self._store.incoming() as self._copies:
                yield
        except OSError as error:
            words = f"{error.filename or self._store.path()}: {error.strerror or error}"
            raise CheckError(words, hint="look at the rights of this user and the room on the disk") from error
        finally:
            self._copies = None

    # What is there

    def products(self) -> list[str]:
        """Name every product that is served or was pushed."""
        served = (name.split("/")[0] for name in self._models.names(f"*/{MANIFEST}"))
        pushed = (name.split("/")[0] for name in self._store.names(f"*/*/{MANIFEST}") if name[0] != ".")
        return sorted({*served, *pushed})

    def promoted(self, product: str) -> Release | None:
        """Read the manifest that the lines read; None when the product has none yet. Raises CheckError."""
        return _manifest(self._models, f"{product}/{MANIFEST}")

    def pushed(self, product: str) -> dict[int, Release | CheckError]:
        """Read the manifest of each version in the store, unchecked; an error where it cannot be read."""
        found: dict[int, Release | CheckError] = {}
        for name in self._store.names(f"{product}/[0-9]*/{MANIFEST}"):
            try:
                release = _manifest(self._store, name)
            except CheckError as error:
                found[int(name.split("/")[1])] = error
            else:
                found |= {} if release is None else {int(name.split("/")[1]): release}
        return dict(sorted(found.items()))

    def is_signed(self, product: str, version: int) -> bool:
        """Whether a version has a signature, of whomever; the served one where workers look: it may never be pushed."""
        served = self.promoted(product)
        if served is not None and served.version == version:
            return self.read(product, _SIGNATURE) is not None
        return bool(self._store.names(f"{product}/{version}/{_SIGNATURE}"))

    def history(self, product: str) -> list[Event]:
        """List the product's promotions and rollbacks, oldest first."""
        name = f"{product}/{_HISTORY}"
        return parse_history((self._store.read(name) or b"").decode(errors="replace"), self._store.path(name))

    def tree(self, product: str, version: int) -> Path:
        """Give the folder of a pushed version, or a copy of it."""
        if self._copies is not None and (copy := self._copies / product / str(version)).is_dir():
            return copy
        return self._store.fetch(f"{product}/{version}", self._copies)

    def config(self, model: str) -> ModelConfig | None:
        """Read the configuration with which a model is served; None when there is no such model. Raises CheckError."""
        text, name = self.read(model, CONFIG), self._models.path(f"{model}/{CONFIG}")
        return None if text is None else parse_config(text.decode(errors="replace"), name)

    def read(self, model: str, name: str) -> bytes | None:
        """Give a file of a served model; None when it is not there."""
        return self._models.read(f"{model}/{name}")

    def checked(self, product: str, version: int) -> Release:
        """Read a pushed version after checking its signature and every file of it anew. Raises CheckError."""
        release = _manifest(self._store, f"{product}/{version}/{MANIFEST}")
        if release is None:
            versions = ", ".join(map(str, self.pushed(product))) or "none"
            raise CheckError(f"{product} has no version {version}; pushed are: {versions}", hint="push it first")
        self._check(self.tree(product, version), release)
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
        all; gives it, and whether it is new or signed anew. Raises CheckError."""
        release = _manifest(store_of(source), MANIFEST)
        if release is None:
            raise CheckError(f"{source} has no {MANIFEST}", hint="name the product's folder that was exported")
        return release, self._take(source, release, adopted=False)

    def adopt(self, product: str) -> None:
        """Keep the version that is served, if it was never pushed, so that a rollback can return to it."""
        release = self.promoted(product)
        if release is None or self._is_there(release):
            return
        copies = None if self._copies is None else self._copies / "served"
        for model in dict.fromkeys((product, *(name.split("/")[0] for name in release.files))):
            source = self._models.fetch(model, copies)
        self._take(source.with_name(product), release, adopted=True)

    def place(self, release: Release, configs: dict[str, ModelConfig]) -> Iterator[str]:
        """Link a version's folders into the model repository; gives each that is new, once it is there.

        A model that is new comes with its configuration of `configs`, in a folder as one rename. Serves nothing: the
        configurations that are there do not name it.
        """
        with self._store.incoming() as stage:
            for model, config in configs.items():
                version = str(_folder_of(config, release))
                folder = stage / model / version
                folder.mkdir(parents=True)
                for name, path in self.weights(release, model).items():
                    link(path, folder / name)
                if is_ensemble(config):
                    (folder / ".gitkeep").touch()  # Triton wants the folder, and Git keeps no empty one
                (stage / model / CONFIG).write_text(config_text(config), encoding="utf-8")
                self._store.hold()
                is_there = bool(self._models.folders(model))
                source, target = (folder, f"{model}/{version}") if is_there else (stage / model, model)
                if self._models.add(source, target, head="" if is_there else CONFIG):
                    yield target

    def prune(self, product: str, keep: int, *, dry_run: bool) -> list[int]:
        """Remove old versions, see `prunable`, from both places, and what a killed push left; gives the versions.

        Teachers stay: products share them.
        """
        release = self.promoted(product)
        if release is None:
            raise CheckError(f"no version of {product} is promoted: nothing is older than it")
        models = [product, *self._models.folders(f"{product}.*")]
        served = [version for model in models if (config := self.config(model)) for version in versions_of(config)]
        placed = [name for model in models for name in _numbered(self._models, model)]
        pushed, stored = self.pushed(product), _numbered(self._store, product)
        there = {_number(name) for name in placed} | pushed.keys()
        old = prunable(sorted(there), release.version, served, self.history(product), keep)
        for name in () if dry_run else stored:
            # The store first: what is no more there cannot be promoted, whatever is left of it.
            if _number(name) in old or _number(name) not in pushed:
                self._store.hold()
                self._store.remove(name, head=MANIFEST)
        for name in () if dry_run else placed:
            if _number(name) in old:
                self._store.hold()
                self._models.remove(name)
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
        return [name for name in self._models.folders(f"{product}.v*") if named.fullmatch(name)]

    def write(self, model: str, name: str, content: bytes) -> bytes | None:
        """Replace a file of a model as a whole; gives what was there. One that is the same is left alone."""
        self._store.hold()
        return self._models.write(f"{model}/{name}", content)

    def remove(self, name: str) -> None:
        """Remove a model, a folder or a file from the model repository; nothing when it is not there."""
        self._store.hold()
        self._models.remove(name, head=CONFIG)

    def as_pushed(self, release: Release, name: str = MANIFEST) -> bytes | None:
        """Give the manifest of a pushed version as it is written, or its signature by `name`."""
        return self._store.read(f"{release.product}/{release.version}/{name}")

    def record(self, product: str, event: Event) -> None:
        """Add an event to the product's history."""
        self._store.hold()
        name = f"{product}/{_HISTORY}"
        self._store.write(name, (self._store.read(name) or b"") + event.model_dump_json().encode() + b"\n")

    # Parts

    def _is_there(self, release: Release) -> bool:
        return bool(self._store.names(f"{release.product}/{release.version}/{MANIFEST}"))

    def _take(self, source: Path, release: Release, *, adopted: bool) -> bool:
        target = f"{release.product}/{release.version}"
        if source.resolve().name != release.product or (faults := name_faults(release)):
            faults = faults if source.resolve().name == release.product else [f"is of product {release.product!r}"]
            raise CheckError(f"{source / MANIFEST}: {'; '.join(faults)}", hint="export the product again")
        present = _manifest(self._store, f"{target}/{MANIFEST}")
        if present is not None and present.model_sha256 != release.model_sha256:
            raise CheckError(
                f"{release.product} has another version {release.version} already",
                hint="export into a model repository that holds the earlier versions: there it gets the next number",
            )
        is_whole = present is not None and not self._store.names(f"{target}/{_ADOPTED}")
        if is_whole and not self._is_signed_anew(source, target):
            return False
        with self._store.incoming() as stage:
            tree = stage / "version"
            tree.mkdir()
            _copy(source, release, tree)
            if adopted:
                (tree / _ADOPTED).touch()
            self._check(tree, release, signature=not adopted)
            self._store.hold()
            self._store.add(tree, target, head=MANIFEST, instead=True)
        return True

    def _is_signed_anew(self, source: Path, target: str) -> bool:
        """Whether a folder has the manifest of the version that is there, and another signature."""
        signature = read_signature(source / MANIFEST)
        return signature not in (None, self._store.read(f"{target}/{_SIGNATURE}")) and (
            (source / MANIFEST).read_bytes() == self._store.read(f"{target}/{MANIFEST}")
        )

    def _check(self, tree: Path, release: Release, *, signature: bool = True) -> None:
        """Raise CheckError with everything that is wrong with a version's tree."""
        faults, hint = name_faults(release), "nothing was changed; export or copy it again"
        if signature and self._signer is not None:
            path = tree / MANIFEST
            if fault := fault_of_signature(path.read_bytes(), read_signature(path), self._signer):
                faults.append(f"{MANIFEST}: {fault}")
                hint = "nothing was changed; `logicrd models sign` the exported folder, and push it again"
        tuned = (tree / _ADOPTED).is_file()
        if not faults:
            found = (_fault_of_file(tree, name, digest, release, tuned) for name, digest in release.files.items())
            faults = [fault for fault in found if fault] or config_faults(release, _configs(tree, release))
        if faults:
            words = f"{release.product} version {release.version}: {'; '.join(faults)}"
            raise CheckError(words, hint=hint)


def repository_of(settings: Triton) -> ModelRepository:
    """Give the repository of a line file."""
    return ModelRepository(settings.models_repo, settings.versions, settings.signer_file)


def _folder_of(config: ModelConfig, release: Release) -> int:
    """Give the version folder that a model needs; that of an ensemble is the version which it is for."""
    if is_ensemble(config):
        return (versions_of(config) or [release.version])[0]
    return TEACHER_VERSION if config.name == release.teacher.model else release.version


def _manifest(store: Store, name: str) -> Release | None:
    content = store.read(name)
    return None if content is None else parse_release(content, store.path(name))


def _numbered(store: Store, folder: str) -> list[str]:
    return [name for name in store.folders(f"{folder}/[0-9]*") if PurePosixPath(name).name.isdecimal()]


def _number(name: str) -> int:
    return int(PurePosixPath(name).name)


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
