"""The normals of one product on disk: pictures at model size and, if wanted, the teacher's features of them.

Memory does not grow with the data set: both lie in memory-mapped files, features as float16. A cache is found again by
a key over pictures, size and teacher, so that many runs on the same data share it. Called by `fit` and `compare`.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data import PREPROCESSING, read_region_of, to_model_size
from training.errors import DataError
from training.modules.resnet import Features
from training.region import RegionOfInterest
from training.stages import LEVELS
from training.teacher import AnyTeacher, weights_sha256

FILL_BATCH = 16
FLOAT16_LIMIT = 65504.0


class Normals:
    """n pictures; `images` is (n, size, size, 3) uint8, memory-mapped. Made by `open_normals`."""

    def __init__(self, images: NDArray[np.uint8], levels: Sequence[NDArray[np.float16]], teacher: AnyTeacher) -> None:
        self.images = images
        self._levels = levels
        self._teacher = teacher

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: NDArray[np.intp]) -> Features:
        """The levels of some pictures, float32; from the cache, or through the teacher where there is none."""
        device = next(self._teacher.parameters()).device
        if self._levels:
            f1, f2, f3 = (torch.from_numpy(level[indices]).to(device).float() for level in self._levels)
            return f1, f2, f3
        return features_of(self._teacher, torch.from_numpy(self.images[indices]).to(device))

    def features(self, batch_size: int) -> Iterator[Features]:
        """All pictures in order."""
        for start in range(0, len(self), batch_size):
            yield self.take(np.arange(start, min(start + batch_size, len(self))))


def open_normals(
    files: Sequence[Path],
    size: int,
    teacher: AnyTeacher,
    folder: Path,
    *,
    cache_features: bool,
    region: RegionOfInterest | None = None,
) -> Normals:
    """Reads every file once into `folder` (or finds it there from an earlier run) and returns the normals.

    Raises DataError that names the first file that cannot be read, and for pictures that are all one constant.
    """
    key = _key(files, size, teacher if cache_features else None, region)
    place = folder / key
    if not (place / "complete.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=folder))
        try:
            _fill(partial, files, size, teacher if cache_features else None, region)
            (partial / "complete.json").write_text(json.dumps({"pictures": len(files), "size": size}), encoding="utf-8")
            _move_in(partial, place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    images = np.load(place / "images.npy", mmap_mode="r", allow_pickle=False)
    levels = [np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in LEVELS if cache_features]
    return Normals(images, levels, teacher)


def features_of(teacher: AnyTeacher, images: Tensor) -> Features:
    """(B, H, W, 3) uint8 to the three levels, without gradients."""
    with torch.no_grad():
        f1, f2, f3 = teacher(images)
    return f1, f2, f3


def _move_in(partial: Path, place: Path) -> None:
    if place.is_dir() and not (place / "complete.json").is_file():
        shutil.rmtree(place)
    try:
        partial.rename(place)
    except OSError:
        # Another process was faster; its files are the same.
        if not (place / "complete.json").is_file():
            raise


def _fill(
    folder: Path, files: Sequence[Path], size: int, teacher: AnyTeacher | None, region: RegionOfInterest | None
) -> None:
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (len(files), size, size, 3))
    varies = False
    for index, path in enumerate(files):
        images[index] = to_model_size(read_region_of(path, region), size, size)
        varies = varies or bool((images[index] != images[0]).any())
    if not varies:
        raise DataError(f"data '{files[0].parent}': all {len(files)} pictures are the same; there is nothing to learn")
    images.flush()
    if teacher is not None:
        _fill_levels(folder, images, teacher)


def _fill_levels(folder: Path, images: NDArray[np.uint8], teacher: AnyTeacher) -> None:
    device = next(teacher.parameters()).device
    stores: list[NDArray[np.float16]] = []
    for start in range(0, len(images), FILL_BATCH):
        levels = features_of(teacher, torch.from_numpy(images[start : start + FILL_BATCH].copy()).to(device))
        if not stores:
            shapes = [(len(images), *level.shape[1:]) for level in levels]
            names = zip(LEVELS, shapes, strict=True)
            stores = [np.lib.format.open_memmap(folder / f"{n}.npy", "w+", np.float16, shape) for n, shape in names]
        for name, store, level in zip(LEVELS, stores, levels, strict=True):
            if not bool((level.abs() <= FLOAT16_LIMIT).all()):
                raise DataError(f"teacher: level '{name}' does not fit FP16; train without the feature cache")
            store[start : start + len(level)] = level.cpu().numpy().astype(np.float16)


def _key(files: Sequence[Path], size: int, teacher: AnyTeacher | None, region: RegionOfInterest | None) -> str:
    digest = hashlib.sha256(f"{PREPROCESSING} {size}".encode())
    digest.update(b"" if teacher is None else f"{teacher.arch} {weights_sha256(teacher)}".encode())
    for path in files:
        digest.update(path.name.encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    if region is not None:
        digest.update(region.model_dump_json().encode())
    return digest.hexdigest()[:24]
