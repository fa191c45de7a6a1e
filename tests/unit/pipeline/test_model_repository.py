"""The store and the model repository: a push is whole or nothing, whatever is wrong with what is pushed."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
from exported import PRODUCT, graph, shipped, tiny, write_manifest
from signers import make_keys

from pipeline.errors import CheckError, ConfigError
from pipeline.model_repository import ModelRepository
from pipeline.releases import config_text, pinned, versions_of
from pipeline.signatures import sign


@pytest.fixture
def repository(tmp_path):
    """A repository that serves version 3."""
    tiny(tmp_path / "models", 3)
    return ModelRepository(tmp_path / "models", tmp_path / "store")


def tree_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def push(repository, folder):
    with repository.locked():
        return repository.push(folder)


def edit(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    write_manifest(folder.parent, manifest | changes)


def replace(folder, name, content):
    """Replace a file of a version and its hash in the manifest."""
    (folder.parent / name).write_bytes(content)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit(folder, files=files | {name: hashlib.sha256(content).hexdigest()})


def test_a_push_keeps_a_version_and_serves_nothing(repository, tmp_path):
    """The whole tree is in the store, the model repository is what it was, and a second push changes nothing."""
    before = tree_of(repository.models)
    release, is_new = push(repository, tiny(tmp_path / "export", 4))
    assert is_new
    assert (release.product, release.version) == (PRODUCT, 4)
    assert list(repository.pushed(PRODUCT)) == [4]
    assert repository.checked(PRODUCT, 4) == release
    assert push(repository, tmp_path / "export" / PRODUCT) == (release, False)
    assert tree_of(repository.models) == before


def broken_hash(folder):
    (folder.parent / f"{PRODUCT}.map/4/model.onnx").write_bytes(graph() + b"\0")


def missing(folder):
    (folder.parent / f"{PRODUCT}.map/4/model.onnx").unlink()


def broken_graph(folder):
    replace(folder, f"{PRODUCT}.map/4/model.onnx", b"\x3a\xff")


def outside(folder):
    replace(folder, f"{PRODUCT}.map/4/model.onnx", graph("../../secret"))


def extra(folder):
    (folder.parent / f"{PRODUCT}.map/4/more.bin").write_bytes(b"")


def link(folder):
    path = folder.parent / f"{PRODUCT}.map/4/model.onnx"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def linked_folder(folder):
    path = folder.parent / f"{PRODUCT}.map"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def pipe(folder):
    path = folder.parent / f"{PRODUCT}.map/4/model.onnx"
    path.unlink()
    os.mkfifo(path)


def escape(folder):
    edit(folder, files=json.loads((folder / "manifest.json").read_text())["files"] | {"../secret": "0" * 64})


def cut_manifest(folder):
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-100])


def no_manifest(folder):
    (folder / "manifest.json").unlink()


def other_folder(folder):
    edit(folder, product="cable-set")


def broken_config(folder):
    replace(folder, f"{PRODUCT}.map/config.pbtxt", b"nome: 3")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (broken_hash, "is not the manifest's"),
        (missing, "No such file"),
        (broken_graph, "not an ONNX graph"),
        (outside, "outside its folder"),
        (extra, "does not list: more.bin"),
        (link, "is a link"),
        (linked_folder, "is a link"),
        (pipe, "is not the manifest's"),
        (escape, "is not one of version 4"),
        (cut_manifest, "JSON"),
        (no_manifest, "has no manifest.json"),
        (other_folder, "is of product"),
        (broken_config, "not a configuration of Triton"),
    ],
)
def test_a_damaged_push_changes_nothing(repository, tmp_path, damage, words):
    """Whatever is wrong is named, and neither the store nor the repository has anything of it."""
    folder = tiny(tmp_path / "export", 4)
    damage(folder)
    before = tree_of(repository.models)
    with pytest.raises(CheckError, match=words):
        push(repository, folder)
    assert tree_of(repository.models) == before
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["lock"]


def test_a_number_is_taken_once(repository, tmp_path):
    """Another version of the same number is refused: verdicts name versions by number."""
    push(repository, tiny(tmp_path / "export", 4))
    replace(tmp_path / "export" / PRODUCT, f"{PRODUCT}.mahalanobis/4/statistics.npz", b"other")
    with pytest.raises(CheckError, match="another version 4 already"):
        push(repository, tmp_path / "export" / PRODUCT)


def test_what_a_killed_push_leaves_is_no_version(repository, tmp_path):
    """A half copy is not listed, and the next command removes it."""
    left = tmp_path / "store" / ".incoming-abc"
    tiny(left, 9)
    assert repository.products() == [PRODUCT]
    push(repository, tiny(tmp_path / "export", 4))
    assert not left.exists()


def test_two_commands_do_not_meet(repository):
    """The second one is told so at once."""
    with repository.locked(), pytest.raises(CheckError, match="another command"), repository.locked():
        raise AssertionError


def test_what_the_disk_refuses_is_named(repository, tmp_path):
    """A file where the store should be, and a history that is none, end as one sentence."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckError, match="file"), ModelRepository(repository.models, tmp_path / "file").locked():
        raise AssertionError
    push(repository, tiny(tmp_path / "export", 4))
    (tmp_path / "store" / PRODUCT / "history.jsonl").write_text("yesterday\n")
    with pytest.raises(CheckError, match=r"history\.jsonl"):
        repository.history(PRODUCT)


def test_only_what_the_signer_signed_is_taken(repository, tmp_path):
    """No signature, another's, and a manifest changed after it are refused; the signer's is taken, and asked again."""
    mine, signer = make_keys(tmp_path, "mine")
    other, _ = make_keys(tmp_path, "other")
    repository = ModelRepository(repository.models, tmp_path / "store", signer)
    folder = tiny(tmp_path / "export", 4)
    with pytest.raises(CheckError, match="not signed, and"):
        push(repository, folder)
    sign(folder / "manifest.json", other)
    with pytest.raises(CheckError, match="not signed by a key of"):
        push(repository, folder)
    sign(folder / "manifest.json", mine)
    edit(folder, created="later")
    with pytest.raises(CheckError, match="not signed by a key of"):
        push(repository, folder)
    sign(folder / "manifest.json", mine)
    assert push(repository, folder)[1]
    assert repository.is_signed(PRODUCT, 4)
    (repository.tree(PRODUCT, 4) / "manifest.json.sig").write_bytes(bytes(64))
    with pytest.raises(CheckError, match="not signed by a key of"):
        repository.checked(PRODUCT, 4)


def test_a_version_that_is_there_can_be_signed_later(repository, tmp_path):
    """Pushed before the line named a signer, or signed by a key that is renewed: the refusal names the remedy, and
    pushing the signed folder again is one. A folder with another manifest changes nothing."""
    mine, signer = make_keys(tmp_path, "mine")
    folder = tiny(tmp_path / "export", 4)
    push(repository, folder)
    repository = ModelRepository(repository.models, tmp_path / "store", signer)
    with pytest.raises(CheckError, match="not signed") as caught:
        repository.checked(PRODUCT, 4)
    assert "models sign" in caught.value.hint
    assert "push" in caught.value.hint
    assert not push(repository, folder)[1]
    sign(folder / "manifest.json", mine)
    assert push(repository, folder)[1]
    assert not push(repository, folder)[1]
    edit(folder, created="later")
    sign(folder / "manifest.json", mine)
    assert not push(repository, folder)[1]
    assert repository.checked(PRODUCT, 4).created != "later"


def test_the_signature_of_what_is_served_is_that_beside_it(repository, tmp_path):
    """What workers look at is listed, also for a version that was never pushed."""
    served = repository.promoted(PRODUCT).version
    assert not repository.is_signed(PRODUCT, served)
    sign(repository.models / PRODUCT / "manifest.json", make_keys(tmp_path, "mine")[0])
    assert repository.is_signed(PRODUCT, served)


def test_a_key_of_another_kind_signs_nothing(tmp_path):
    """RSA keys and files that are no key are named."""
    folder = tiny(tmp_path / "export", 4)
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(ConfigError, match="no private key of Ed25519"):
        sign(folder / "manifest.json", tmp_path / "key.pem")


def test_the_served_version_is_kept_with_its_tuning(repository):
    """A version that was served before the first push can be returned to, though its configuration was tuned."""
    config = repository.config(f"{PRODUCT}.map")
    config.instance_group[0].count = 2
    repository.write(f"{PRODUCT}.map", "config.pbtxt", config_text(config).encode())
    with repository.locked():
        repository.adopt(PRODUCT)
    kept = repository.configs(repository.checked(PRODUCT, 3))
    assert kept[f"{PRODUCT}.map"].instance_group[0].count == 2


def test_served_weights_that_changed_are_not_kept(repository):
    """What is not the manifest's cannot become a version to return to."""
    (repository.models / f"{PRODUCT}.map/3/model.onnx").write_bytes(b"other")
    with repository.locked(), pytest.raises(CheckError, match="is not the manifest's"):
        repository.adopt(PRODUCT)


def test_folders_beside_the_served_ones_wait(repository, tmp_path):
    """After pinning and placing, each configuration still names the served version alone."""
    push(repository, tiny(tmp_path / "export", 4))
    release = repository.checked(PRODUCT, 4)
    with repository.locked():
        repository.pin(repository.promoted(PRODUCT))
        made = list(repository.place(release, repository.configs(release)))
        assert list(repository.place(release, repository.configs(release))) == []
    models = {name.removesuffix("/4") for name in made}
    assert models == {*repository.configs(release)} - {shipped()["teacher"]["model"]}
    assert all(versions_of(repository.config(model)) == [3] for model in models)
    assert (repository.models / f"{PRODUCT}.map/4/model.onnx").is_file()


def test_a_new_product_comes_with_its_configurations(tmp_path):
    """Into an empty repository each model is one rename: folder, files and configuration."""
    (tmp_path / "models").mkdir()
    repository = ModelRepository(tmp_path / "models", tmp_path / "store")
    push(repository, tiny(tmp_path / "export", 1))
    release = repository.checked(PRODUCT, 1)
    configs = {model: pinned(config, release, [1]) for model, config in repository.configs(release).items()}
    with repository.locked():
        made = list(repository.place(release, configs))
    assert {*made} == {*configs}
    assert versions_of(repository.config(PRODUCT)) == [1]


def test_strangers_files_under_a_number_are_not_served(repository, tmp_path):
    """A folder of that number with other files is named and left alone."""
    push(repository, tiny(tmp_path / "export", 4))
    (repository.models / f"{PRODUCT}.map/4").mkdir()
    (repository.models / f"{PRODUCT}.map/4/model.onnx").write_bytes(b"mine")
    release = repository.checked(PRODUCT, 4)
    with repository.locked(), pytest.raises(CheckError, match="holds other files"):
        list(repository.place(release, repository.configs(release)))


def test_pruning_takes_old_versions_from_both_folders(repository, tmp_path):
    """Versions that never served and are older go; the served one and every teacher stay."""
    for version in (1, 2):
        push(repository, tiny(tmp_path / f"export-{version}", version))
    (repository.models / f"{PRODUCT}.map/2").mkdir()
    with repository.locked():
        assert repository.prune(PRODUCT, 1, dry_run=True) == [1, 2]
        assert list(repository.pushed(PRODUCT)) == [1, 2]
        assert repository.prune(PRODUCT, 1, dry_run=False) == [1, 2]
    assert list(repository.pushed(PRODUCT)) == []
    assert not (repository.models / f"{PRODUCT}.map/2").exists()
    assert (repository.models / f"{PRODUCT}.map/3/model.onnx").is_file()
    assert (repository.models / shipped()["teacher"]["model"] / "1/model.onnx").is_file()
