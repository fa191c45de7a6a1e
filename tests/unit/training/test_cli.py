"""The command: exit codes, one-line errors, JSON, from fit to evaluate."""

import fcntl
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from safetensors.torch import save_file

from training import cli
from training.checkpoint import FILE as CHECKPOINT
from training.config import CONFIGS
from training.pretrain import pretrain
from training.teacher import SHIPPED, load_teacher, random_teacher, weights_sha256

GREY = np.full((72, 96, 3), 90)


def run(monkeypatch, *arguments: object) -> int:
    """Runs main() and gives its exit code."""
    monkeypatch.setattr(sys, "argv", ["logicrd-train", *(str(a) for a in arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text("width: 8\nimage_size: 64\nbatch_size: 4\nmax_steps: 2\n")
    return path


def refuse_to_train(*_: object) -> None:
    """Stands in for `fit` where training must not begin."""
    raise AssertionError("training began")


def spoiled_teacher(path: Path) -> None:
    """A teacher's file with one weight that is not a number."""
    tensors = dict(random_teacher(0).state_dict())
    tensors["bn1.weight"][3] = np.nan
    save_file(tensors, path)


def test_fit_export_evaluate(monkeypatch, capsys, loco, tmp_path, settings):
    """The whole way by commands; evaluate gives one record a picture, the same from bundle and from export.

    The export keeps the statistics of the distance branch as FP32, so scores agree to its rounding.
    """
    bundle, models = tmp_path / "bundle", tmp_path / "models"
    assert run(monkeypatch, "fit", "--data", loco, "--out", bundle, "--config", settings, "--random-teacher", 1) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["test_images"]["good"] == 3
    assert run(monkeypatch, "export", bundle, "--models", models) == 0
    assert "version 1" in capsys.readouterr().out
    answers = []
    for model in (bundle, models / "tiny-part"):
        assert run(monkeypatch, "evaluate", "--model", model, "--data", loco, "--json") == 0
        answers.append(json.loads(capsys.readouterr().out))
    ours, again = (answer.pop("scores") for answer in answers)
    assert answers[0] == answers[1]
    assert len(ours) == 7
    for name in ("score", "map_score", "mahalanobis"):
        pair = [[record[name] for record in records] for records in (ours, again)]
        assert pair[0] == pytest.approx(pair[1], rel=1e-5, abs=1e-4)
    assert ours[0].keys() == {"file", "kind", "score", "map_score", "mahalanobis"}
    assert run(monkeypatch, "evaluate", "--model", models / "tiny-part", "--images", loco / "test/good") == 0
    assert "002.png" in capsys.readouterr().out
    assert run(monkeypatch, "export", "--fused", tmp_path / "f.onnx", "--product", "tiny-part", "--models", models) == 0
    assert [o.name for o in onnx.load(tmp_path / "f.onnx").graph.output] == ["map_score", "descriptor", "anomaly_map"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["fit", "--data", "none", "--out", "b", "--random-teacher", "0"], 3, "train/good"),
        (["fit", "--data", "none", "--out", "b", "--teacher", "t", "--random-teacher", "0"], 3, "either --teacher"),
        (["fit", "--data", "none", "--out", "b", "--arch", "resnet34"], 3, "weights/teacher.safetensors"),
        (["fit", "--data", "none", "--out", "b", "--config", "no.yaml"], 3, "no.yaml"),
        (["evaluate", "--model", "none", "--data", "none"], 3, "bundle 'none'"),
        (["evaluate", "--model", "none"], 3, "--images"),
        (["export"], 3, "BUNDLE"),
        (["export", "--fused", "f", "--product", "p", "--models", "none"], 3, "model 'p'"),
        (["scenes", "--out", "x", "--product", "tray"], 3, "fastener-tray"),
        (["fit", "--no-such-option"], 2, "no-such-option"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(monkeypatch, capsys, tmp_path, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == code
    answer = capsys.readouterr()
    assert message in answer.err
    assert answer.out == ""
    assert code == 2 or answer.err.count("\n") == 1


def test_bad_test_picture_is_found_before_training(monkeypatch, capsys, loco, tmp_path, settings):
    """A picture that only the report would read is refused at once, and no bundle is begun."""
    data = shutil.copytree(loco, tmp_path / "data")
    (data / "test/good/001.png").write_bytes(b"")
    arguments = ["--out", tmp_path / "b", "--config", settings, "--random-teacher", 1, "--product", "tiny-part"]
    assert run(monkeypatch, "fit", "--data", data, *arguments) == 3
    assert "001.png" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda files: [path.unlink() for path in files[1:]], "needs two pictures"),
        (lambda files: [cv2.imwrite(str(path), GREY.astype(np.uint8)) for path in files], "one flat colour"),
        (lambda files: [shutil.copy(files[0], path) for path in files[1:]], "the same"),
        (lambda files: cv2.imwrite(str(files[1]), GREY.astype(np.uint16)), "16 bits"),
        (lambda files: files[1].write_bytes(files[1].read_bytes()[:-20]), "001.png.*cut"),
    ],
    ids=["one-picture", "constant", "copies", "sixteen-bits", "truncated"],
)
def test_unfit_normals_are_found_before_training(monkeypatch, capsys, loco, tmp_path, settings, split, spoil, message):
    """One line that names file or folder; not a step is trained and no bundle is begun."""
    data = shutil.copytree(loco, tmp_path / "data")
    spoil(sorted((data / split / "good").iterdir()))
    monkeypatch.setattr(cli, "fit", refuse_to_train)
    arguments = ["--out", tmp_path / "b", "--config", settings, "--random-teacher", 1, "--product", "tiny-part"]
    assert run(monkeypatch, "fit", "--data", data, *arguments) == 3
    answer = capsys.readouterr().err
    assert re.search(message, answer)
    assert split in answer
    assert answer.count("\n") == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("nan.safetensors", spoiled_teacher, "bn1.weight.*not finite"),
        ("t.pth", lambda path: path.write_bytes(pickle.dumps({"conv1.weight": [1.0]})), "pickles are refused"),
        ("cut.safetensors", lambda path: path.write_bytes(b"\x08\0\0\0"), "not safetensors"),
    ],
)
def test_unfit_teacher_is_found_before_training(monkeypatch, capsys, loco, tmp_path, settings, name, write, message):
    """Weights that are not finite, a pickle, half a file: named, and nothing is trained."""
    write(tmp_path / name)
    monkeypatch.setattr(cli, "fit", refuse_to_train)
    arguments = ["--out", tmp_path / "b", "--config", settings, "--teacher", tmp_path / name]
    assert run(monkeypatch, "fit", "--data", loco, *arguments) == 3
    answer = capsys.readouterr().err
    assert re.search(f"{name}.*{message}", answer)
    assert answer.count("\n") == 1


def test_unfit_product_name_is_found_before_training(monkeypatch, capsys, loco, tmp_path):
    """Not after the training, when the export would refuse it."""
    assert run(monkeypatch, "fit", "--data", loco, "--out", tmp_path, "--random-teacher", 0, "--product", "A B") == 3
    assert "--product" in capsys.readouterr().err


def test_unwritable_path_is_named(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    amounts = ["--train", 2, "--validation", 2, "--test", 1, "--workers", 1]
    assert run(monkeypatch, "scenes", "--out", tmp_path / "file/deeper", "--product", "cable-set", *amounts) == 3
    assert "file" in capsys.readouterr().err


def test_interrupt_ends_with_130(monkeypatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    assert run(monkeypatch) == 130


def test_scenes_command_writes_a_product(monkeypatch, capsys, tmp_path):
    amounts = ["--train", 2, "--validation", 2, "--test", 1, "--workers", 1]
    assert run(monkeypatch, "scenes", "--out", tmp_path, "--product", "cable-set", *amounts) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "cable-set")
    assert (tmp_path / "cable-set/parts.json").is_file()


def test_pretrain_command_writes_weights(monkeypatch, capsys, tmp_path):
    settings = tmp_path / "p.yaml"
    settings.write_text("picture_size: 64\nbatch_size: 4\nmax_steps: 1\n")
    monkeypatch.setattr(cli, "pretrain", lambda config, out, report: pretrain(config, out, report, workers=0))
    assert run(monkeypatch, "pretrain", "--out", tmp_path / "t.safetensors", "--config", settings) == 0
    assert "t.safetensors" in capsys.readouterr().out


def test_default_config_is_shipped():
    assert (CONFIGS / "demo.yaml").is_file()


def test_help_works_from_a_shell():
    answer = subprocess.run(
        [sys.executable, "-c", "from training.cli import main; main()", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(verb in answer.stdout for verb in ("scenes", "pretrain", "fit", "evaluate", "export"))


def test_scores_are_finite(detector):
    assert np.isfinite(detector.score(np.zeros((1, 64, 64, 3), dtype=np.uint8)).score).all()


def test_without_a_teacher_the_shipped_one_is_taken(monkeypatch, loco, tmp_path, settings):
    assert run(monkeypatch, "fit", "--data", loco, "--out", tmp_path / "b", "--config", settings) == 0
    description = json.loads((tmp_path / "b/bundle.json").read_text())
    assert description["teacher_sha256"] == weights_sha256(load_teacher(SHIPPED))


def test_two_runs_into_one_folder_are_refused(monkeypatch, capsys, loco, tmp_path, settings):
    """The second names the folder and touches nothing in it; once the first has ended it may run."""
    out = tmp_path / "b"
    out.mkdir()
    arguments = ["fit", "--data", loco, "--out", out, "--config", settings, "--random-teacher", 1]
    with (out / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (out / CHECKPOINT).write_bytes(b"the first run's")
        assert run(monkeypatch, *arguments) == 3
        assert f"--out '{out}': another run writes there" in capsys.readouterr().err
        assert (out / CHECKPOINT).read_bytes() == b"the first run's"
    assert run(monkeypatch, *arguments) == 0


def test_others_can_read_a_bundle(monkeypatch, loco, tmp_path, settings):
    """safetensors alone would write files that only their owner can read: no server would load them."""
    arguments = ["fit", "--data", loco, "--out", tmp_path / "b", "--config", settings, "--random-teacher", 1]
    old = os.umask(0o022)
    try:
        assert run(monkeypatch, *arguments) == 0
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "b").iterdir()} == {0o644}


def test_a_report_that_cannot_be_written_costs_no_scoring(monkeypatch, capsys, loco, tmp_path, settings):
    bundle = tmp_path / "b"
    assert run(monkeypatch, "fit", "--data", loco, "--out", bundle, "--config", settings, "--random-teacher", 1) == 0
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cli, "evaluate", refuse_to_train)
    out = tmp_path / "file/report"
    assert run(monkeypatch, "evaluate", "--model", bundle, "--data", loco, "--out", out) == 3
    assert str(out) in capsys.readouterr().err
