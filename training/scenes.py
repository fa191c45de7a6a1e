"""Renders products as data sets in the MVTec LOCO layout, with masks, saturation and the truth of every test picture.

Each picture has a generator of its own, seeded by (seed, product, split, index): the same picture comes out whatever
else is rendered, on any number of processes. Called by `cli`.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from training.data import TEST_KINDS
from training.errors import ConfigError, DataError, TrainingError
from training.products import bottle, cable_set, fastener_tray, parts_bag, pin_grid
from training.products.rendered import Defect, Rendered, Saturation

SPLITS = ("train", "validation", "good", "logical", "structural")
# Least and greatest side of a picture: scratches still show, and a thousand pictures still fit a disk.
SIDES = (128, 4096)
# zlib level 1: sensor noise does not compress, and higher levels cost more than the rendering.
PNG_OPTIONS = (cv2.IMWRITE_PNG_COMPRESSION, 1)


class Product(Protocol):
    """What a module of `products` offers."""

    NAME: str
    BASE: tuple[int, int]
    LOGICAL: tuple[str, ...]
    STRUCTURAL: tuple[str, ...]
    SATURATION: dict[str, Saturation]

    def render(self, defect: str | None, generator: np.random.Generator) -> Rendered:
        """One picture, good or with one defect."""


# The place in this table is part of every picture's seed: append, never reorder.
PRODUCTS: dict[str, Product] = {m.NAME: m for m in (fastener_tray, cable_set, pin_grid, bottle, parts_bag)}


@dataclass(frozen=True, slots=True)
class Amounts:
    """Pictures of each split; `test` counts each of good, logical and structural."""

    train: int = 300
    validation: int = 60
    test: int = 60

    def of(self, split: str) -> int:
        """Pictures of one of SPLITS."""
        return {"train": self.train, "validation": self.validation}.get(split, self.test)


@dataclass(frozen=True, slots=True)
class _Job:
    root: Path
    product: str
    split: str
    index: int
    seed: int
    size: tuple[int, int] | None

    @property
    def defect(self) -> str | None:
        """Types take turns, so that every type is there however few pictures are asked for."""
        product = PRODUCTS[self.product]
        types = {"logical": product.LOGICAL, "structural": product.STRUCTURAL}.get(self.split)
        return None if types is None else types[self.index % len(types)]

    @property
    def file(self) -> Path:
        """The picture's path below the root."""
        folder = Path(self.split, "good") if self.split not in TEST_KINDS else Path("test", TEST_KINDS[self.split])
        return folder / f"{self.index:03d}.png"


def render_scenes(
    root: Path,
    product: str,
    amounts: Amounts,
    seed: int,
    report: Callable[[float], None],
    workers: int | None = None,
    size: tuple[int, int] | None = None,
) -> None:
    """Writes one product to `root`, which must not exist yet; `report` gets the share done.

    `size` is (width, height) in pixels, each within SIDES; None is the product's own. Raises ConfigError for an
    unknown product or a size out of range, DataError where the folder is taken or cannot be written.
    """
    if product not in PRODUCTS:
        raise ConfigError(f"product '{product}': unknown; there are {', '.join(PRODUCTS)}")
    if size is not None and not all(SIDES[0] <= side <= SIDES[1] for side in size):
        raise ConfigError(f"size '{size[0]}x{size[1]}': each side must lie in {SIDES[0]}..{SIDES[1]} pixels")
    if root.exists():
        raise DataError(f"scenes '{root}': exists already; give another folder or remove it")
    partial = root.with_name(f".{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    jobs = [_Job(partial, product, split, i, seed, size) for split in SPLITS for i in range(amounts.of(split))]
    try:
        _make_folders(jobs)
        _render_all(jobs, report, workers or os.cpu_count() or 1)
        _describe(partial, product, jobs, size)
        partial.rename(root)
    except OSError as error:
        raise DataError(f"scenes '{root}': cannot be written ({error.strerror})") from error
    except BrokenProcessPool as error:
        raise TrainingError(f"scenes '{root}': a rendering process died; is memory short? try --workers 1") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _render_all(jobs: list[_Job], report: Callable[[float], None], workers: int) -> None:
    if workers == 1:
        for done, job in enumerate(jobs, start=1):
            _render_one(job)
            report(done / len(jobs))
        return
    # Spawned, not forked: the parent may hold threads of torch or OpenCV.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for done, _ in enumerate(pool.map(_render_one, jobs, chunksize=4), start=1):
            report(done / len(jobs))


def _render_one(job: _Job) -> None:
    cv2.setNumThreads(1)
    place = (job.seed, list(PRODUCTS).index(job.product), SPLITS.index(job.split), job.index)
    rendered = _resized(PRODUCTS[job.product].render(job.defect, np.random.default_rng(place)), job.size)
    _write_png(job.root / job.file, np.ascontiguousarray(rendered.picture[..., ::-1]))
    if rendered.defects:
        folder = job.root / "ground_truth" / TEST_KINDS[job.split] / f"{job.index:03d}"
        folder.mkdir(parents=True)
        for number, defect in enumerate(rendered.defects):
            _write_png(folder / f"{number:03d}.png", _mask_picture(job.product, defect))


def _resized(rendered: Rendered, size: tuple[int, int] | None) -> Rendered:
    """The same scene at (width, height): area means where both sides shrink, else linear; masks by nearest pixel."""
    rows, columns = rendered.picture.shape[:2]
    if size is None or size == (columns, rows):
        return rendered
    smaller = size[0] <= columns and size[1] <= rows
    picture = cv2.resize(rendered.picture, size, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
    defects = tuple(Defect(defect.name, _nearest(defect.mask, size)) for defect in rendered.defects)
    return Rendered(np.asarray(picture, dtype=np.uint8), defects)


def _nearest(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    resized = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(resized, dtype=np.bool_)


def _mask_picture(product: str, defect: Defect) -> NDArray[np.uint8]:
    return np.asarray(defect.mask * np.uint8(pixel_value(product, defect.name)), dtype=np.uint8)


def pixel_value(product: str, defect: str) -> int:
    """The grey value that names a defect type in the masks of a product: 255 downwards in order of its table."""
    return 255 - list(PRODUCTS[product].SATURATION).index(defect)


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) from 'WIDTHxHEIGHT'; raises ConfigError for anything else."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if found is None:
        raise ConfigError(f"size '{text}': must be WIDTHxHEIGHT in pixels, e.g. 640x480")
    return int(found[1]), int(found[2])


def _make_folders(jobs: list[_Job]) -> None:
    for folder in {(job.root / job.file).parent for job in jobs}:
        folder.mkdir(parents=True)


def _describe(root: Path, product: str, jobs: list[_Job], size: tuple[int, int] | None) -> None:
    """Writes defects_config.json as LOCO has it, and parts.json: file, kind and defect of every test picture."""
    base = PRODUCTS[product].BASE
    area = 1 if size is None else size[0] * size[1] / (base[0] * base[1])
    config = [
        {
            "defect_name": name,
            "pixel_value": pixel_value(product, name),
            "saturation_threshold": saturation.threshold if saturation.relative else saturation.threshold * area,
            "relative_saturation": saturation.relative,
        }
        for name, saturation in PRODUCTS[product].SATURATION.items()
    ]
    tests = [job for job in jobs if job.split in TEST_KINDS]
    parts = [{"file": job.file.as_posix(), "kind": job.split, "defect": job.defect} for job in tests]
    for name, content in (("defects_config.json", config), ("parts.json", parts)):
        (root / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _write_png(path: Path, picture: NDArray[np.uint8]) -> None:
    done, encoded = cv2.imencode(".png", picture, PNG_OPTIONS)
    if not done:
        raise DataError(f"scenes '{path}': the picture cannot be encoded")
    path.write_bytes(encoded.tobytes())
