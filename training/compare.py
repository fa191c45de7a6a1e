"""Trains and measures all methods and ablations on any data, on equal terms: one table.

Every network gets the same teacher, pictures, steps, batch size and seeds; what differs is its own recipe
(configs/*.yaml). A run that is done is not repeated, one that was killed goes on. Nothing is selected on test data:
each network is taken as it is after its last step. Called by `cli`.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from training.config import CONFIGS, FitConfig, changed, load_config
from training.data import check_pictures, open_data
from training.detector import save_bundle
from training.errors import DataError, TrainingError
from training.evaluate import evaluate
from training.fit import Places, fit
from training.masks import open_masks
from training.metrics import TestReport
from training.teacher import AnyTeacher, weights_sha256

RESULT, MODEL = "result.json", "model"
# Networks to train: name, recipe, and the modules that differ from it.
NETWORKS: dict[str, tuple[str, dict[str, bool]]] = {
    "rd": ("rd", {}),
    "dskd": ("dskd", {}),
    "none": ("logicrd", {"gse": False, "fcp": False, "nii": False}),
    "gse": ("logicrd", {"fcp": False, "nii": False}),
    "fcp": ("logicrd", {"nii": False}),
    "logicrd": ("logicrd", {}),
}
MAP, FUSED = "map_score", "score"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a trained network, and whether its map alone or the fused score is taken."""

    title: str
    network: str
    score: str


ROWS = (
    Row("RD", "rd", MAP),
    Row("RD + Mahalanobis", "rd", FUSED),
    Row("DSKD", "dskd", MAP),
    Row("LogicRD, no module", "none", MAP),
    Row("+ GSE", "gse", MAP),
    Row("+ FCP", "fcp", MAP),
    Row("+ NII", "logicrd", MAP),
    Row("+ Mahalanobis = LogicRD", "logicrd", FUSED),
)


class Equal(BaseModel):
    """What all runs of a comparison share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_size: int
    steps: int
    batch_size: int
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    teacher_arch: str
    teacher_sha256: str


class Result(BaseModel):
    """result.json of one run: the settings it belongs to, its report, its cost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    product: str
    network: str
    seed: int
    config: FitConfig
    teacher_sha256: str
    report: TestReport
    parameters: int
    modes: int
    training_s: float


@dataclass(frozen=True, slots=True)
class Task:
    """One run to do: everything a worker process needs."""

    data: Path
    out: Path
    network: str
    config: FitConfig
    teacher: AnyTeacher
    # Whether the fitted model stays in `folder` / model, for studies of it.
    keep_model: bool = False

    @property
    def folder(self) -> Path:
        """Where its checkpoint, its result and perhaps its model lie."""
        return self.out / "runs" / self.data.name / self.network / str(self.config.seed)


def product_folders(root: Path) -> list[Path]:
    """`root` itself where it holds one product, else its sub-folders that do; raises DataError for neither."""
    if (root / "train").is_dir() or (root / "good").is_dir():
        return [root]
    found = sorted(folder for folder in root.glob("*") if (folder / "train" / "good").is_dir())
    if not found:
        raise DataError(f"data '{root}': neither a product with train/good nor a folder of such products")
    return found


def tasks_of(
    data: Sequence[Path],
    out: Path,
    teacher: AnyTeacher,
    equal: Equal,
    networks: Sequence[str],
    seeds: Sequence[int],
    *,
    keep_models: bool = False,
) -> list[Task]:
    """All runs, seed by seed, so that an early table covers every product and network."""
    tasks: list[Task] = []
    for seed in seeds:
        for folder in data:
            for name in networks:
                recipe, modules = NETWORKS[name]
                own = load_config(FitConfig, CONFIGS / f"{recipe}.yaml")
                changes = modules | {
                    "mahalanobis": True,
                    "image_size": equal.image_size,
                    "batch_size": equal.batch_size,
                    "precision": equal.precision,
                    "max_steps": equal.steps,
                    # Equal steps for all: neither the clock nor a plateau may end a run early.
                    "max_minutes": 1e6,
                    "patience": 1_000_000,
                    "validate_every": equal.steps,
                    "seed": seed,
                }
                tasks.append(Task(folder, out, name, changed(own, changes, "compare"), teacher, keep_models))
    return tasks


def run_all(tasks: Sequence[Task], jobs: int, report: Callable[[int, str], None]) -> list[Result]:
    """Does what is not done yet, `jobs` runs at a time with an equal share of the cores; `report` hears of each."""
    results: list[Result] = []
    for data in sorted({task.data for task in tasks}):
        folder = open_data(data, need_test=True)
        open_masks(folder)
        check_pictures(folder)
    threads = max(1, torch.get_num_threads() // jobs)
    try:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            for done, result in enumerate(pool.map(partial(run_one, threads=threads), tasks), start=1):
                results.append(result)
                report(done, f"{result.product} {result.network} seed {result.seed}")
    except BrokenProcessPool as error:
        raise TrainingError("compare: a run's process died; is memory short? What is done is kept") from error
    return results


def run_one(task: Task, threads: int) -> Result:
    """One run, or its result from an earlier time; deletes the checkpoint once the result is written."""
    path = task.folder / RESULT
    found = _earlier(path, task)
    if found is not None:
        return found
    torch.set_num_threads(threads)
    data = open_data(task.data, need_test=True)
    started = time.monotonic()
    places = Places(task.out / "cache", task.folder)
    detector = fit(data, task.data.name, task.teacher, task.config, lambda _: None, places)
    spent_s = time.monotonic() - started
    result = Result(
        product=task.data.name,
        network=task.network,
        seed=task.config.seed,
        config=task.config,
        teacher_sha256=detector.description.teacher_sha256,
        report=evaluate(detector, data).report,
        parameters=sum(p.numel() for p in detector.network.parameters()),
        modes=len(detector.statistics.means),
        training_s=spent_s,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    if task.keep_model:
        save_bundle(task.folder / MODEL, detector)
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    partial_path.replace(path)
    for leftover in task.folder.glob("checkpoint.safetensors*"):
        leftover.unlink()
    return result


def _earlier(path: Path, task: Task) -> Result | None:
    if not path.is_file():
        return None
    try:
        result = Result.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"compare '{path}': is damaged or of another version; remove it") from error
    if result.config != task.config or result.teacher_sha256 != weights_sha256(task.teacher):
        raise DataError(f"compare '{path}': is of other settings or another teacher; give another --out or remove it")
    return result
