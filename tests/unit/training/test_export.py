"""Export: names, FP16, parity, configs that parse, and a repository that a failure leaves as it was."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from google.protobuf import text_format
from onnx import TensorProto
from tritonclient.grpc import model_config_pb2 as pb

from training import export as module
from training import repository
from training.config import FitConfig
from training.errors import CheckFailedError, ConfigError, DataError
from training.export import build_graphs, check_parity, export, fused_graph, load_exported
from training.fit import fit
from training.mahalanobis import distance
from training.rd import ReverseDistillation
from training.repository import Serving, Target, parse_server_version
from training.stages import STAGES
from training.teacher import random_teacher

PICTURES = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def graphs(detector):
    return build_graphs(detector)


@pytest.fixture(scope="module")
def models(detector, tmp_path_factory) -> Path:
    """A repository with one version of one product; tests must not change it."""
    root = tmp_path_factory.mktemp("export") / "models"
    export(detector, root, Serving())
    return root


@pytest.fixture
def quick(graphs, monkeypatch):
    """Spares tests of the repository the tracing and the parity check of every export."""
    monkeypatch.setattr(module, "build_graphs", lambda _: graphs)
    monkeypatch.setattr(module, "check_parity", lambda *_: 0.0)


def tree(root: Path) -> dict[str, str]:
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in root.rglob("*")
        if p.is_file()
    }


@pytest.fixture(scope="module")
def rival_graphs(rivals, graphs):
    """The graphs of each method."""
    return {name: graphs if name == "logicrd" else build_graphs(rival) for name, rival in rivals.items()}


@pytest.mark.parametrize("method", ["rd", "dskd", "logicrd"])
@pytest.mark.parametrize("stage", STAGES)
def test_initialisers_bear_parameter_names_as_fp16(rivals, rival_graphs, method, stage):
    """One FP16 initialiser a parameter, with its name, shape and values, and no other weight of any size."""
    parameters = dict(rivals[method].network.get_submodule(stage).named_parameters())
    initialisers = rival_graphs[method][stage].graph.initializer
    halves = {i.name: i for i in initialisers if i.data_type == TensorProto.FLOAT16}
    assert halves.keys() == parameters.keys()
    for name, half in halves.items():
        assert np.array_equal(onnx.numpy_helper.to_array(half), parameters[name].half().numpy())


@pytest.mark.parametrize("method", ["rd", "dskd", "logicrd"])
@pytest.mark.parametrize("batch", [1, 8])
def test_graphs_score_as_torch(rivals, rival_graphs, method, batch):
    """ONNX Runtime on the four stages one after the other, numpy for the rest: within 1e-3 on the fused score."""
    detector, graphs = rivals[method], rival_graphs[method]
    tensors = {"image": PICTURES[:batch]}
    for stage in STAGES:
        session = ort.InferenceSession(graphs[stage].SerializeToString(), providers=["CPUExecutionProvider"])
        taken, given = detector.network.wiring[stage]
        assert [o.name for o in session.get_outputs()] == list(given)
        inputs = {name: tensors[name] for name in taken}
        tensors |= dict(zip(given, session.run(list(given), inputs), strict=True))
    mahalanobis = distance(detector.statistics, tensors["descriptor"])
    score = detector.description.calibration.fusion.score(tensors["map_score"][:, 0].astype(float), mahalanobis)
    ours = detector.score(PICTURES[:batch])
    assert np.abs(score - ours.score).max() < 1e-3
    assert np.abs(tensors["anomaly_map"] - ours.anomaly_map).max() < 1e-3


@pytest.mark.parametrize("switch", ["gse", "fcp"])
def test_ablated_networks_are_served_too(folder, tmp_path, switch):
    """A switched-off module takes its tensors with it; parity holds and the export loads again."""
    changes = {switch: False, "nii": False, "max_steps": 1}
    config = FitConfig(width=8, image_size=64, batch_size=4, seed=3).model_copy(update=changes)
    ablated = fit(folder, "tiny-part", random_teacher(0), config, lambda _: None)
    export(ablated, tmp_path / "models", Serving())
    again = load_exported(tmp_path / "models", "tiny-part")
    assert np.array_equal(again.score(PICTURES).map_score, ablated.score(PICTURES).map_score)


@pytest.mark.parametrize("method", ["rd", "dskd"])
def test_rivals_are_served_too(rivals, rival_graphs, method, tmp_path, monkeypatch):
    """The same five steps, with the tensors of that method; nothing is taken that no step gives."""
    monkeypatch.setattr(module, "build_graphs", lambda _: rival_graphs[method])
    manifest = export(rivals[method], tmp_path / "models", Serving())
    assert (manifest.method, manifest.network.method) == (method, method)
    text = (tmp_path / "models/tiny-part/config.pbtxt").read_text()
    known = {"image"}
    for step in text_format.Parse(text, pb.ModelConfig()).ensemble_scheduling.step:
        assert set(step.input_map.values()) <= known
        known |= set(step.output_map.values())
    again = load_exported(tmp_path / "models", "tiny-part")
    assert np.array_equal(again.score(PICTURES).map_score, rivals[method].score(PICTURES).map_score)


def test_load_exported_scores_as_the_bundle(detector, models):
    """The graphs are the only stored weights, and nothing of them is lost; statistics are rounded to FP32."""
    exported = load_exported(models, "tiny-part")
    again, ours = exported.score(PICTURES), detector.score(PICTURES)
    assert np.array_equal(again.anomaly_map, ours.anomaly_map)
    assert np.array_equal(again.map_score, ours.map_score)
    assert again.score == pytest.approx(ours.score, rel=1e-5)
    assert exported.description == detector.description


def test_fused_graph_equals_the_stages(detector, models):
    """One graph from image to map_score, descriptor and map."""
    session = ort.InferenceSession(fused_graph(models, "tiny-part").SerializeToString())
    assert [i.name for i in session.get_inputs()] == ["image"]
    map_score, descriptor, anomaly_map = session.run(["map_score", "descriptor", "anomaly_map"], {"image": PICTURES})
    ours = detector.score(PICTURES)
    assert map_score[:, 0] == pytest.approx(ours.map_score, abs=1e-4)
    assert distance(detector.statistics, descriptor) == pytest.approx(ours.mahalanobis, abs=1e-3)
    assert anomaly_map.shape == (8, 16, 16)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("serving", [Serving(), Serving(Target.GPU, (2, 73))])
def test_configs_parse_back_to_themselves(detector, tmp_path, serving):
    """Text written and parsed again is the same protobuf; shapes agree with the graphs; steps exist."""
    export(detector, tmp_path / "models", serving)
    names = {path.parent.name for path in tmp_path.glob("models/*/config.pbtxt")}
    assert len(names) == 6
    for name in names:
        text = (tmp_path / "models" / name / "config.pbtxt").read_text()
        config = text_format.Parse(text, pb.ModelConfig())
        assert text_format.Parse(repository.config_text(config), pb.ModelConfig()) == config
        assert config.name == name
        assert config.max_batch_size == (8 if serving.target is Target.CPU else 32)
        assert {step.model_name for step in config.ensemble_scheduling.step} <= names
        graph = tmp_path / "models" / name / "1" / "model.onnx"
        if graph.exists():
            inputs = {i.name: i.type.tensor_type.shape for i in onnx.load(graph).graph.input}
            for tensor in config.input:
                assert list(tensor.dims) == [d.dim_value for d in inputs[tensor.name].dim[1:]]


def test_old_servers_get_no_field_they_refuse():
    """Only servers as new as the schema get max_inflight_requests."""
    shapes = {"image": (64, 64, 3), "anomaly_map": (16, 16), "score": (1,), "map_score": (1,), "mahalanobis": (1,)}
    wiring = ReverseDistillation.wiring
    old = repository.ensemble_config("p", "t", wiring, shapes, Serving(server_version=(2, 51)))
    new = repository.ensemble_config("p", "t", wiring, shapes, Serving(server_version=(2, 73)))
    assert "max_inflight" not in str(old)
    assert "max_inflight" in str(new)


def test_manifest_names_every_weight_file(models):
    """Hashes are of the files as they lie, and the model's own hash follows from those of its weights alone."""
    manifest = json.loads((models / "tiny-part/manifest.json").read_text())
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((models / name).read_bytes()).hexdigest() == digest
    on_disk = {name for name in tree(models) if not name.endswith((".gitkeep", "manifest.json"))}
    assert on_disk == manifest["files"].keys()
    weights = {n: d for n, d in manifest["files"].items() if n.endswith((".onnx", ".npz", ".py"))}
    canonical = json.dumps(weights, sort_keys=True, separators=(",", ":")).encode()
    assert manifest["model_sha256"] == hashlib.sha256(canonical).hexdigest()


@pytest.mark.usefixtures("quick")
def test_second_export_is_a_new_version(detector, tmp_path):
    """Version 1 stays as it was, the teacher is shared, the manifest moves on."""
    export(detector, tmp_path / "models", Serving())
    before = tree(tmp_path / "models")
    manifest = export(detector, tmp_path / "models", Serving())
    after = tree(tmp_path / "models")
    assert manifest.version == 2
    assert all(after[name] == digest for name, digest in before.items() if "/1/" in name)
    assert not (tmp_path / "models" / manifest.teacher.model / "2").exists()
    assert load_exported(tmp_path / "models", "tiny-part").description.product == "tiny-part"


@pytest.mark.usefixtures("quick")
def test_two_products_share_a_teacher(detector, tmp_path):
    """The second product's manifest names the same teacher file and hash."""
    first = export(detector, tmp_path / "models", Serving())
    about = detector.description.model_copy(update={"product": "other-part"})
    second = export(dataclasses.replace(detector, description=about), tmp_path / "models", Serving())
    assert first.teacher == second.teacher
    assert len(list(tmp_path.glob("models/teacher.*"))) == 1


def test_failed_parity_changes_nothing(detector, graphs, tmp_path, monkeypatch):
    """A graph that scores differently is not exported; exit code 5."""
    export(detector, tmp_path / "models", Serving())
    before = tree(tmp_path)
    monkeypatch.setattr(module, "build_graphs", lambda _: graphs)
    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    with pytest.raises(CheckFailedError, match="differ") as caught:
        export(detector, tmp_path / "models", Serving())
    assert caught.value.exit_code == 5
    assert tree(tmp_path) == before


def test_nan_fails_parity(detector, graphs):
    """Scores that are not finite are never within tolerance."""
    broken = dataclasses.replace(detector.statistics, means=detector.statistics.means * np.nan)
    wrong = dataclasses.replace(detector, statistics=broken)
    with pytest.raises(CheckFailedError):
        check_parity(wrong, module.joined(graphs, detector.network.wiring))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fail_at", [1, 4, 7, 10])
def test_failed_move_is_undone(detector, tmp_path, monkeypatch, fail_at):
    """Whichever rename fails, the repository is what it was and no scratch folder stays."""
    export(detector, tmp_path / "models", Serving())
    before = tree(tmp_path)
    moves = iter(range(1, 100))
    real = repository._move

    def failing(*arguments):
        if next(moves) == fail_at:
            raise OSError("disk full")
        real(*arguments)

    monkeypatch.setattr(repository, "_move", failing)
    with pytest.raises(OSError, match="disk full"):
        export(detector, tmp_path / "models", Serving())
    assert tree(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["models"]


@pytest.mark.usefixtures("quick")
def test_failed_first_export_leaves_an_empty_repository(detector, tmp_path, monkeypatch):
    """Folders made on the way are removed again."""

    def failing(*_):
        raise OSError("disk full")

    monkeypatch.setattr(repository.Path, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        export(detector, tmp_path / "models", Serving())
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize("name", ["Tray", "a b", "", "x" * 41, "../up", "9lives"])
def test_unfit_product_names_are_refused(detector, tmp_path, name):
    about = detector.description.model_copy(update={"product": name})
    with pytest.raises(ConfigError, match="product"):
        export(dataclasses.replace(detector, description=about), tmp_path / "models", Serving())


@pytest.mark.usefixtures("quick")
def test_changed_file_is_found_by_name(detector, tmp_path):
    export(detector, tmp_path / "models", Serving())
    path = tmp_path / "models/tiny-part.student/1/model.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"tiny-part\.student/1/model\.onnx"):
        load_exported(tmp_path / "models", "tiny-part")


@pytest.mark.usefixtures("quick")
def test_operators_may_tune_configs(detector, tmp_path):
    """A config is not a weight: changing a queue delay does not disown the model."""
    export(detector, tmp_path / "models", Serving())
    path = tmp_path / "models/tiny-part.student/config.pbtxt"
    path.write_text(path.read_text() + "# tuned\n")
    load_exported(tmp_path / "models", "tiny-part")


def test_unknown_product_lists_those_there(models):
    with pytest.raises(DataError, match="tiny-part"):
        load_exported(models, "tinny-part")


@pytest.mark.parametrize(("text", "version"), [("2.51", (2, 51)), ("2.51.0", (2, 51)), ("2.73.0", (2, 73))])
def test_server_versions(text, version):
    assert parse_server_version(text) == version


@pytest.mark.parametrize("text", ["24.10-py3", "2", "", "2.x"])
def test_odd_server_versions_are_refused(text):
    with pytest.raises(ConfigError, match="server version"):
        parse_server_version(text)
