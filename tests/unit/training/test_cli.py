"""The command: exit codes, one-line errors, JSON, from fit to evaluate."""

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest

from training import cli
from training.config import CONFIGS
from training.pretrain import pretrain


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


def test_fit_export_evaluate(monkeypatch, capsys, loco, tmp_path, settings):
    """The whole way by commands; evaluate gives one record a picture, equal from bundle and from export."""
    bundle, models = tmp_path / "bundle", tmp_path / "models"
    assert run(monkeypatch, "fit", "--data", loco, "--out", bundle, "--config", settings, "--random-teacher", 1) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["test_images"]["good"] == 3
    assert run(monkeypatch, "export", bundle, "--models", models) == 0
    assert "version 1" in capsys.readouterr().out
    answers = []
    for model in (bundle, models / "tiny-part"):
        assert run(monkeypatch, "evaluate", "--model", model, "--data", loco, "--json") == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    assert len(answers[0]["scores"]) == 7
    assert answers[0]["scores"][0].keys() == {"file", "kind", "score", "map_score", "mahalanobis"}
    assert run(monkeypatch, "evaluate", "--model", models / "tiny-part", "--images", loco / "test/good") == 0
    assert "002.png" in capsys.readouterr().out
    assert run(monkeypatch, "export", "--fused", tmp_path / "f.onnx", "--product", "tiny-part", "--models", models) == 0
    assert [o.name for o in onnx.load(tmp_path / "f.onnx").graph.output] == ["map_score", "descriptor", "anomaly_map"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["fit", "--data", "none", "--out", "b", "--random-teacher", "0"], 3, "train/good"),
        (["fit", "--data", "none", "--out", "b"], 3, "--teacher"),
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
