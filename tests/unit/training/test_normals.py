"""Normals on disk: read once, found again, mapped and not loaded, and never half of them."""

import json

import cv2
import numpy as np
import pytest
import torch

from training import normals as module
from training.data import load_at_model_size
from training.errors import DataError
from training.normals import open_normals
from training.teacher import Teacher, random_teacher


@pytest.fixture(scope="module")
def files(tmp_path_factory, normal_pictures):
    root = tmp_path_factory.mktemp("pictures")
    for index in range(5):
        assert cv2.imwrite(str(root / f"{index}.png"), normal_pictures[index])
    return tuple(sorted(root.iterdir()))


@pytest.fixture(scope="module")
def cache(tmp_path_factory, files, teacher):
    """A folder with one cache; tests must not change it."""
    folder = tmp_path_factory.mktemp("cache")
    open_normals(files, 64, teacher, folder, cache_features=True)
    return folder


def keys(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_features_are_the_teachers(cache, files, teacher):
    """As FP16 on disk, FP32 in use; in the order of the files; the last batch smaller."""
    normals = open_normals(files, 64, teacher, cache, cache_features=True)
    with torch.no_grad():
        levels = teacher(torch.from_numpy(load_at_model_size(files, 64)))
    assert len(normals) == 5
    batches = list(normals.features(2))
    assert [len(batch[0]) for batch in batches] == [2, 2, 1]
    for level, *parts in zip(levels, *batches, strict=True):
        assert parts[0].dtype == torch.float32
        assert torch.allclose(torch.cat(parts), level, rtol=1e-3, atol=1e-4)
    f1, _, f3 = normals.take(np.array([3, 0]))
    assert torch.allclose(f1, levels[0][[3, 0]], rtol=1e-3, atol=1e-4)
    assert torch.allclose(f3, levels[2][[3, 0]], rtol=1e-3, atol=1e-4)


def test_without_the_cache_the_teacher_is_asked(files, teacher, tmp_path):
    """Only pictures lie on disk, and the features are exact."""
    normals = open_normals(files, 64, teacher, tmp_path, cache_features=False)
    with torch.no_grad():
        levels = teacher(torch.from_numpy(load_at_model_size(files, 64)))
    (batch,) = normals.features(8)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(batch, levels, strict=True))
    assert {path.name for path in next(tmp_path.iterdir()).iterdir()} == {"images.npy", "complete.json"}


def test_cache_is_found_again(cache, files, teacher, monkeypatch):
    """No picture is decoded and no feature computed a second time."""
    before = keys(cache)
    monkeypatch.setattr(module, "read_region_of", lambda path, _: pytest.fail(f"{path} read again"))
    monkeypatch.setattr(Teacher, "forward", lambda *_: pytest.fail("features computed again"))
    normals = open_normals(files, 64, teacher, cache, cache_features=True)
    assert normals.take(np.array([4]))[0].shape == (1, 64, 16, 16)
    assert keys(cache) == before


def test_arrays_are_mapped_not_loaded(cache, files, teacher):
    """So that memory does not grow with the data set; and nobody can write into the cache."""
    normals = open_normals(files, 64, teacher, cache, cache_features=True)
    for array in (normals.images, *normals._levels):
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
    normals.take(np.array([0]))[0].zero_()
    assert normals.take(np.array([0]))[0].abs().max() > 0


def test_another_teacher_size_or_picture_is_another_cache(cache, files, teacher, tmp_path):
    """Four folders, none of which is taken for another."""
    folder = tmp_path / "cache"
    open_normals(files, 64, teacher, folder, cache_features=True)
    assert keys(folder) == keys(cache)
    open_normals(files, 64, random_teacher(1), folder, cache_features=True)
    open_normals(files, 96, teacher, folder, cache_features=True)
    open_normals(files[:4], 64, teacher, folder, cache_features=True)
    changed = tmp_path / files[0].name
    assert cv2.imwrite(str(changed), np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    open_normals((changed, *files[1:]), 64, teacher, folder, cache_features=True)
    assert len(keys(folder)) == 5


def test_half_a_fill_is_not_taken_for_complete(files, teacher, tmp_path, monkeypatch):
    """A run that dies while filling leaves nothing behind that a later run would use."""
    read = module.read_region_of

    def dies(path, region):
        if path == files[3]:
            raise KeyboardInterrupt
        return read(path, region)

    monkeypatch.setattr(module, "read_region_of", dies)
    with pytest.raises(KeyboardInterrupt):
        open_normals(files, 64, teacher, tmp_path, cache_features=True)
    assert keys(tmp_path) == set()
    monkeypatch.setattr(module, "read_region_of", read)
    assert len(open_normals(files, 64, teacher, tmp_path, cache_features=True)) == 5


def test_folder_without_its_last_file_is_filled_anew(files, teacher, tmp_path):
    """What a killed process could not tidy up: arrays there, the mark of completion not."""
    open_normals(files, 64, teacher, tmp_path, cache_features=True)
    place = next(tmp_path.iterdir())
    (place / "complete.json").unlink()
    np.save(place / "f1.npy", np.zeros((5, 64, 16, 16), np.float16))
    normals = open_normals(files, 64, teacher, tmp_path, cache_features=True)
    assert normals.take(np.array([0]))[0].abs().max() > 0
    assert json.loads((place / "complete.json").read_text()) == {"pictures": 5, "size": 64}


def test_unreadable_picture_is_named(files, teacher, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(files[0].read_bytes()[:200])
    with pytest.raises(DataError, match=r"bad\.png"):
        open_normals((*files, bad), 64, teacher, tmp_path / "cache", cache_features=True)
    assert keys(tmp_path / "cache") == set()


def test_pictures_all_alike_are_refused(files, teacher, tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(files[0].read_bytes())
    same = tuple(sorted(tmp_path.iterdir()))
    with pytest.raises(DataError, match=r"all 3 pictures are the same"):
        open_normals(same, 64, teacher, tmp_path / "cache", cache_features=True)


def test_features_beyond_fp16_are_refused(files, tmp_path):
    """With the remedy: the cache would turn them into infinities."""
    loud = random_teacher(0)
    with torch.no_grad():
        loud.layer1[1].bn2.weight.mul_(1e6)
    with pytest.raises(DataError, match=r"'f1' does not fit FP16; train without the feature cache"):
        open_normals(files, 64, loud, tmp_path, cache_features=True)
    assert len(open_normals(files, 64, loud, tmp_path, cache_features=False)) == 5
