"""Scores a test split or a folder of pictures with an exported model or a bundle, and measures how well it tells them.

Reports; picks nothing. Called by `cli` and, for the bundle's own report, after `fit`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from pydantic import BaseModel

from training.data import DataFolder, Layout, data_sha256, load_at_model_size, picture_size
from training.detector import Detector
from training.errors import DataError
from training.masks import CONFIG, GroundTruth, open_masks
from training.metrics import ANOMALIES, AuSpro, DefectMetrics, ImageAuroc, TestReport, auroc, image_auroc, image_metrics
from training.region import RegionOfInterest, map_in_picture
from training.spro import LabelledMap, SproAreas, au_spro, mean_areas

# Pictures held in memory at a time.
CHUNK = 32
BRANCHES = ("map_score", "mahalanobis")


class ScoreRecord(BaseModel):
    """The scores of one picture file; `kind` is its test folder, or None outside a test split."""

    file: str
    kind: str | None
    score: float
    map_score: float
    mahalanobis: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The report and what it was made from: a record and an (h, w) map, at the model's map size, of each picture.

    `maps` is (n, h, w) float32 in the order of `records`; `truth` None where the data have no masks. `region` is the
    part of the pictures that the maps cover, None for all.
    """

    report: TestReport
    data: DataFolder
    truth: GroundTruth | None
    records: list[ScoreRecord]
    maps: NDArray[np.float32]
    region: RegionOfInterest | None = None

    def labelled_map(self, index: int) -> LabelledMap:
        """One picture's map at its original size, with its masks."""
        record = self.records[index]
        file = Path(record.file)
        channels = () if self.truth is None else self.truth.channels(file)
        return LabelledMap(str(file), str(record.kind), self.map_of_picture(index), channels)

    def map_of_picture(self, index: int) -> NDArray[np.float32]:
        """One picture's map at its original size."""
        if self.region is not None:
            return map_in_picture(self.maps[index], self.region)
        return enlarged(self.maps[index], *picture_size(Path(self.records[index].file)))


def score_files(detector: Detector, files: Sequence[Path], kind: str | None = None) -> list[ScoreRecord]:
    """Scores picture files in order; raises DataError that names the first one that cannot be read."""
    region = detector.description.region
    return [record for records, _ in _scored(detector, files, kind, region) for record in records]


def evaluate(detector: Detector, data: DataFolder) -> Evaluation:
    """Scores the whole test split and measures it; reads every mask before the first picture.

    The region is the data folder's own, else the one the model was trained with, as in the line.

    Needs a test split (`open_data(need_test=True)`). Raises DataError for masks that cannot be used (see
    `masks.open_masks`), pictures that cannot be read, and scores or maps that are not finite.
    """
    truth = open_masks(data)
    region = data.region if data.region is not None else detector.description.region
    scored = [part for kind, files in data.test.items() for part in _scored(detector, files, kind, region)]
    if not scored:
        raise DataError(f"data '{data.root}': has no test split to evaluate")
    records = [record for chunk, _ in scored for record in chunk]
    maps = np.concatenate([maps for _, maps in scored])
    about = detector.description
    measured = [*(file for files in data.test.values() for file in files), *(truth.all_files if truth else ())]
    if (data.root / CONFIG).is_file():
        measured.append(data.root / CONFIG)
    report = TestReport(
        product=about.product,
        method=about.method,
        layout=data.layout.value,
        data_sha256=about.data_sha256,
        test_sha256=data_sha256(measured, data.root),
        image=image_metrics(by_kind(records, "score")),
        branches={branch: branch_auroc(records, branch) for branch in BRANCHES},
        au_spro=None,
        defects=(),
    )
    evaluation = Evaluation(report, data, truth, records, maps, region)
    areas = None if truth is None else _areas(evaluation)
    found = {"au_spro": None if areas is None else _au_spro(areas), "defects": _defects(evaluation, areas)}
    return Evaluation(report.model_copy(update=found), data, truth, records, maps, region)


def branch_auroc(records: Sequence[ScoreRecord], column: str) -> ImageAuroc:
    """AUROC of one score column: 'score', 'map_score' or 'mahalanobis'."""
    return image_auroc(by_kind(records, column))


def by_kind(records: Sequence[ScoreRecord], column: str) -> dict[str, NDArray[np.float64]]:
    """One score column (n,) of each kind; a kind without pictures is empty."""
    return {k: np.array([getattr(r, column) for r in records if r.kind == k]) for k in ("good", *ANOMALIES)}


def enlarged(anomaly_map: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """(h, w) map to (height, width), bilinear, pixel centres aligned; never clamped."""
    return np.asarray(cv2.resize(anomaly_map, (width, height), interpolation=cv2.INTER_LINEAR), dtype=np.float32)


def write_maps(folder: Path, evaluation: Evaluation) -> Path:
    """Writes float32 TIFFs at original picture size as the official LOCO script reads them; gives their folder.

    <folder>/<data folder's name>/test/<kind folder>/<id>.tiff; run the script with --anomaly_maps_dir <folder>.
    """
    root = folder / evaluation.data.root.resolve().name / "test"
    for index, record in enumerate(evaluation.records):
        file = Path(record.file)
        path = root / _folder_of(record) / f"{file.stem}.tiff"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, evaluation.map_of_picture(index))
    return root


def _folder_of(record: ScoreRecord) -> str:
    # In a plain folder the held-out good pictures may lie in the root; the script knows the good by this name.
    return "good" if record.kind == "good" else Path(record.file).parent.name


def _scored(
    detector: Detector, files: Sequence[Path], kind: str | None, region: RegionOfInterest | None
) -> Iterator[tuple[list[ScoreRecord], NDArray[np.float32]]]:
    for start in range(0, len(files), CHUNK):
        chunk = files[start : start + CHUNK]
        scores = detector.score(load_at_model_size(chunk, detector.description.image_size, region))
        columns = zip(chunk, scores.score, scores.map_score, scores.mahalanobis, strict=True)
        records = [ScoreRecord(file=str(f), kind=kind, score=s, map_score=m, mahalanobis=d) for f, s, m, d in columns]
        for record in records:
            if not np.isfinite([record.score, record.map_score, record.mahalanobis]).all():
                raise DataError(f"picture '{record.file}': scores {record.score}; are the model's weights finite?")
        yield records, np.asarray(scores.anomaly_map, dtype=np.float32)


def _areas(evaluation: Evaluation) -> SproAreas:
    return au_spro(lambda: (evaluation.labelled_map(index) for index in range(len(evaluation.records))))


def _au_spro(areas: SproAreas) -> AuSpro:
    logical, structural = (areas.kinds.get(kind) for kind in ANOMALIES)
    return AuSpro(logical=logical, structural=structural, mean=mean_areas([logical, structural]))


def _defects(evaluation: Evaluation, areas: SproAreas | None) -> tuple[DefectMetrics, ...]:
    """By name. Without masks a sub-folder's name is the type; LOCO's two folders name none."""
    good = by_kind(evaluation.records, "score")["good"]
    shown = {Path(r.file): _types_of(evaluation, Path(r.file)) for r in evaluation.records if r.kind != "good"}
    found = []
    for name in sorted({defect for defects in shown.values() for defect in defects}):
        bad = np.array([r.score for r in evaluation.records if name in shown.get(Path(r.file), ())])
        found.append(
            DefectMetrics(
                defect=name,
                images=len(bad),
                channels=sum(defects.count(name) for defects in shown.values()) if areas else 0,
                image_auroc=auroc(good, bad),
                au_spro=None if areas is None else areas.defects.get(name),
            )
        )
    return tuple(found)


def _types_of(evaluation: Evaluation, picture: Path) -> tuple[str, ...]:
    if evaluation.truth is not None:
        return evaluation.truth.defects[picture]
    return () if evaluation.data.layout is Layout.LOCO else (picture.parent.name,)
