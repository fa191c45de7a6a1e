"""What a version is, and what may become of it."""

from __future__ import annotations

import pytest
from exported import MODELS, PRODUCT, graph, shipped

from pipeline.errors import CheckError
from pipeline.releases import (
    CONFIG,
    Event,
    Release,
    before,
    compatible,
    config_faults,
    name_faults,
    outside_files,
    parse_config,
    path_fault,
    pinned,
    prunable,
    steps_of,
    versions_of,
)


def release(**changes):
    return Release.model_validate(shipped() | changes)


def configs():
    models = dict.fromkeys(path.partition("/")[0] for path in shipped()["files"])
    return {model: parse_config((MODELS / model / CONFIG).read_text(), model) for model in models}


def event(action, version, previous=None):
    return Event(at="2026-01-01T00:00:00+00:00", action=action, version=version, previous=previous, by="anna")


def test_the_shipped_product_is_a_version():
    """What the training room writes has no fault: names, configurations, and graphs that keep every tensor inside."""
    assert name_faults(release()) == []
    assert config_faults(release(), configs()) == []
    graphs = [MODELS / path for path in shipped()["files"] if path.endswith(".onnx")]
    assert graphs
    assert all(outside_files(path.read_bytes()) == [] for path in graphs)


@pytest.mark.parametrize(
    "path",
    [
        "../outside/model.onnx",
        "/etc/passwd",
        f"{PRODUCT}.map/../x/model.onnx",
        f"{PRODUCT}.map/77777/model.onnx",
        f"{PRODUCT}.map/model.onnx",
        "cable-set.map/1/model.onnx",
        f"{PRODUCT}.map/1/.hidden",
        f"{PRODUCT}.map/1/deep/model.onnx",
    ],
)
def test_a_file_of_anything_else_is_refused_by_name(path):
    """A manifest cannot name a file outside its version: not by `..`, not of another product, version or depth."""
    assert any(repr(path) in fault for fault in name_faults(release(files=shipped()["files"] | {path: "0" * 64})))


def test_a_manifest_that_lies_about_its_weights_is_refused():
    """The identity in the manifest is that of its files, and the teacher bears the name of its weights."""
    assert name_faults(release(model_sha256="0" * 64)) == ["`model_sha256` is not the hash of the weight files"]
    teacher = shipped()["teacher"] | {"sha256": "f" * 64}
    assert "is not named after its weights" in name_faults(release(teacher=teacher))[0]


@pytest.mark.parametrize("attribute", ["default_model_filename", "library", "backend", "environment"])
def test_a_configuration_may_not_lead_elsewhere(attribute):
    """A file name, a library, an environment or a backend of its own choice is a fault of the configuration."""
    changed = configs()
    config = changed[f"{PRODUCT}.map"]
    if attribute == "default_model_filename":
        config.default_model_filename = "../../other/model.onnx"
    elif attribute == "library":
        config.model_operations.op_library_filename.append("/other/library.so")
    elif attribute == "backend":
        config.backend = "dali"
    else:
        config.parameters["EXECUTION_ENV_PATH"].string_value = "/other/environment.tar.gz"
    assert len(config_faults(release(), changed)) == 1


def test_an_ensemble_that_joins_other_models_is_refused():
    """The steps are the models of the version, each with files."""
    changed = configs()
    changed[PRODUCT].ensemble_scheduling.step[1].model_name = "cable-set.bottleneck"
    assert "joins" in config_faults(release(), changed)[0]


def test_a_pinned_ensemble_names_a_number_for_every_step():
    """No step of a promoted ensemble is left to be 'the latest': it could be another version's."""
    config = pinned(configs()[PRODUCT], release(), [7])
    assert versions_of(config) == [7]
    numbers = {step.model_name: step.model_version for step in config.ensemble_scheduling.step}
    assert numbers.pop(shipped()["teacher"]["model"]) == 1
    assert set(numbers.values()) == {shipped()["version"]}
    assert steps_of(config) == steps_of(configs()[PRODUCT])


def test_tuning_fits_and_other_tensors_do_not():
    """Batching and instances may differ between two versions; a tensor's shape may not."""
    name = f"{PRODUCT}.student"
    tuned, changed = configs()[name], configs()[name]
    tuned.instance_group[0].count = 3
    changed.input[0].dims[0] += 1
    assert compatible(configs()[name], tuned)
    assert not compatible(configs()[name], changed)


def test_tensors_in_other_files_are_found_wherever_they_are():
    """A location deep in a graph is found; it must be a file of the version in the same folder."""
    assert outside_files(graph("weights.bin")) == ["weights.bin"]
    files = {"p.map/3/weights.bin": ""}
    assert path_fault("weights.bin", "p.map/3", files) == ""
    assert "does not list" in path_fault("more.bin", "p.map/3", files)
    for path in ("../weights.bin", "/etc/passwd", "a/../../b", "..\\b"):
        assert "outside its folder" in path_fault(path, "p.map/3", files)


@pytest.mark.parametrize("content", [b"", b"junk", graph()[:-3]])
def test_what_is_no_graph_is_refused(content):
    """Bytes that are not an ONNX graph, an empty file among them."""
    with pytest.raises(CheckError, match="not an ONNX graph"):
        outside_files(content)


def test_a_rollback_takes_back_the_last_promotion():
    """Twice rolled back is two versions back, not to and fro; without an earlier version there is none."""
    history = [event("promote", 3, 2), event("promote", 5, 3)]
    assert before([]) is None
    assert before(history) == 3
    history.append(event("rollback", 3, 5))
    assert before(history) == 2
    history.append(event("rollback", 2, 3))
    assert before(history) is None
    assert before([*history, event("promote", 6, 2)]) == 2


def test_pruning_keeps_what_serves_and_what_served_last():
    """The promoted, the loaded, newer ones and the last `keep` stay; versions never promoted go."""
    history = [event("promote", 2, 1), event("promote", 3, 2), event("promote", 6, 3), event("promote", 8, 6)]
    assert prunable([1, 2, 3, 4, 5, 6, 7, 8, 9], 8, [6, 8], history, keep=2) == [1, 2, 4, 5, 7]
    assert prunable([1, 2, 8], 8, [2], [], keep=1) == [1]
