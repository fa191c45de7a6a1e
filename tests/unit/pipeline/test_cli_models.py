"""The commands `logicrd models`: what they print, and their exit codes."""

from __future__ import annotations

import json
import sys

import pytest
import yaml
from exported import PRODUCT, tiny

from pipeline import cli


@pytest.fixture
def models(tmp_path, monkeypatch, capsys):
    """Run `logicrd models` on a repository that serves version 3; gives exit code, stdout and stderr."""
    tiny(tmp_path / "served", 3)
    line = {
        "line": "line",
        "cameras": [{"id": "cam", "type": "folder", "path": ".", "product": PRODUCT, "station": "s"}],
        "triton": {"address": "127.0.0.1:9", "models_repo": "served"},
    }
    (tmp_path / "line.yaml").write_text(yaml.safe_dump(line))

    def run(*arguments):
        config = ["-c", str(tmp_path / "line.yaml")] if arguments[0] != "sign" else []
        monkeypatch.setattr(sys, "argv", ["logicrd", "models", *map(str, arguments), *config])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run


def test_versions_are_pushed_and_listed(models, tmp_path):
    """A push says what it took; the list tells served from pushed; pruning shows first what it would remove."""
    assert models("push", tiny(tmp_path / "new", 4))[:2] == (0, f"{PRODUCT} version 4 pushed\n")
    assert models("push", tmp_path / "new" / PRODUCT)[1] == f"{PRODUCT} version 4 was pushed before\n"
    models("push", tiny(tmp_path / "old", 2))
    code, out, _ = models("list", "--json")
    assert code == 0
    assert [(row["version"], row["state"]) for row in json.loads(out)] == [(2, "pushed"), (3, "served"), (4, "pushed")]
    assert json.loads(models("list", PRODUCT, "--json")[1])["history"] == []
    assert json.loads(models("prune", PRODUCT, "--dry-run", "--json")[1])["removed"] == [2]


def test_a_broken_push_is_exit_5(models, tmp_path):
    """What is wrong goes to stderr, with the file's name."""
    folder = tiny(tmp_path / "new", 4)
    (folder.parent / f"{PRODUCT}.map/4/model.onnx").write_bytes(b"cut")
    code, out, err = models("push", folder)
    assert (code, out) == (5, "")
    assert f"{PRODUCT}.map/4/model.onnx is not the manifest's" in err


def test_without_triton_nothing_is_promoted(models, tmp_path):
    """An unreachable replica is exit 4, before anything changes; a product that is not there is exit 3."""
    models("push", tiny(tmp_path / "new", 4))
    code, _, err = models("promote", PRODUCT, 4)
    assert code == 4
    assert "127.0.0.1:9" in err
    assert json.loads((tmp_path / "served" / PRODUCT / "manifest.json").read_text())["version"] == 3
    assert models("list", "nothing")[0] == 3


def test_a_trial_is_asked_for_in_words_that_make_sense(models, tmp_path):
    """A share that is none, and a version together with --stop, are exit 3; where nothing is on trial, it is said."""
    models("push", tiny(tmp_path / "new", 4))
    for percent in (0, 101, "nan"):
        assert models("promote", PRODUCT, 4, "--canary", percent)[0] == 3
        assert models("shadow", PRODUCT, 4, "--percent", percent)[0] == 3
    assert models("shadow", PRODUCT, 4, "--stop")[0] == 3
    code, _, err = models("shadow", PRODUCT)
    assert (code, "no version of" in err) == (5, True)
    assert models("shadow", PRODUCT, 4)[0] == 4  # Triton is not there


def test_what_is_on_trial_is_listed(models, tmp_path):
    """The list tells the version on trial, how, and on which share."""
    models("push", tiny(tmp_path / "new", 4))
    words = {"mode": "canary", "version": 4, "model_sha256": "0" * 64, "percent": 12.5, "at": "now", "by": "anna"}
    (tmp_path / "served" / PRODUCT / "rollout.json").write_text(json.dumps(words))
    rows = json.loads(models("list", "--json")[1])
    assert [(row["version"], row["state"]) for row in rows] == [(3, "served"), (4, "canary 12.5 %")]
