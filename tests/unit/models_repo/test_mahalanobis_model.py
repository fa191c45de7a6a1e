"""The served distance step: numpy's answer, errors a request at a time, and no start on damaged statistics."""

from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]
TEMPLATE = ROOT / "training/templates/mahalanobis_model.py"
FUSION = np.array([0.5, 0.1, 20.0, 4.0, 2.0])


@pytest.fixture
def arrays(load_model):
    """Statistics of two modes, eight channels and five directions with their checksum, as export writes them."""
    generator = np.random.default_rng(0)
    directions, _ = np.linalg.qr(generator.standard_normal((8, 5)))
    values = {
        "means": generator.standard_normal((2, 8)),
        "scale": generator.uniform(0.5, 2, 8),
        "directions": directions.T,
        "weights": generator.uniform(0.5, 2, 5),
        "outer": np.array(7.0),
        "fusion": FUSION,
    }
    checksum = load_model(TEMPLATE).checksum(*values.values())
    return {**values, "sha256": np.frombuffer(checksum, dtype=np.uint8)}


def dense(arrays: dict[str, np.ndarray], descriptor: np.ndarray) -> np.ndarray:
    """Distance to the nearest mode by the whole (8, 8) precision matrix."""
    inner = arrays["directions"].T @ np.diag(arrays["weights"]) @ arrays["directions"]
    outside = np.eye(8) - arrays["directions"].T @ arrays["directions"]
    precision = np.diag(arrays["scale"]) @ (inner + arrays["outer"] * outside) @ np.diag(arrays["scale"])
    centred = descriptor[:, None, :] - arrays["means"]
    return np.sqrt(np.einsum("nki,ij,nkj->nk", centred, precision, centred).min(axis=1))[:, None]


@pytest.fixture
def start(load_model, tmp_path):
    """Starts the model on given statistics."""

    def build(arrays):
        (tmp_path / "1").mkdir(exist_ok=True)
        np.savez(tmp_path / "1" / "statistics.npz", **arrays)
        model = load_model(TEMPLATE).TritonPythonModel()
        model.initialize({"model_repository": str(tmp_path), "model_version": "1"})
        return model

    return build


def batch(n: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    return generator.standard_normal((n, 8)).astype(np.float32), generator.random((n, 1), dtype=np.float32)


@pytest.mark.parametrize("n", [1, 8])
def test_distance_and_score_are_numpys(arrays, start, request_of, n):
    """Distance to the nearest mode; score = z(map) + weight * z(distance); FP32, one row a picture."""
    descriptor, map_score = batch(n)
    (response,) = start(arrays).execute([request_of(descriptor, map_score)])
    expected = dense(arrays, descriptor.astype(np.float64))
    assert response.error is None
    assert {name: (t.dtype, t.shape) for name, t in response.outputs.items()} == {
        "mahalanobis": (np.float32, (n, 1)),
        "score": (np.float32, (n, 1)),
    }
    assert response.outputs["mahalanobis"] == pytest.approx(expected, rel=1e-6)
    assert response.outputs["score"] == pytest.approx((map_score - 0.5) / 0.1 + 2 * (expected - 20) / 4, rel=1e-5)


@pytest.mark.parametrize("where", ["descriptor", "map_score"])
def test_nan_passes_through_its_own_row_alone(arrays, start, request_of, where):
    """A picture that cannot be scored says so; its neighbours keep their scores."""
    descriptor, map_score = batch(3)
    {"descriptor": descriptor, "map_score": map_score}[where][1, 0] = np.nan
    (response,) = start(arrays).execute([request_of(descriptor, map_score)])
    assert np.isnan(response.outputs["score"][:, 0]).tolist() == [False, True, False]


def test_scores_are_never_clamped(arrays, start, request_of):
    descriptor, map_score = batch(2)
    map_score[:] = [[1e6], [-1e6]]
    (response,) = start(arrays).execute([request_of(descriptor, map_score)])
    assert response.outputs["score"][0] > 1e6
    assert response.outputs["score"][1] < -1e6


@pytest.mark.parametrize(("columns", "rows"), [(7, 2), (9, 2), (8, 1)])
def test_wrong_shape_is_an_error_of_one_request(arrays, start, request_of, columns, rows):
    """The others of the same call are answered, in order."""
    good = request_of(*batch(2))
    bad = request_of(np.zeros((2, columns), dtype=np.float32), np.zeros((rows, 1), dtype=np.float32))
    first, second, third = start(arrays).execute([good, bad, good])
    assert first.error is None
    assert third.error is None
    assert "expected (n, 8) and (n, 1)" in second.error.message
    assert second.outputs == {}


@pytest.mark.parametrize("name", ["means", "scale", "directions", "weights", "outer", "fusion", "sha256"])
def test_missing_array_stops_the_start(arrays, start, name):
    del arrays[name]
    with pytest.raises(ValueError, match=rf"statistics\.npz.*'{name}' is missing"):
        start(arrays)


def test_damaged_statistics_stop_the_start(arrays, start):
    arrays["means"] = arrays["means"] + 1e-9
    with pytest.raises(ValueError, match=r"statistics\.npz.*checksum"):
        start(arrays)


@pytest.mark.parametrize("name", ["means", "scale", "directions", "weights", "fusion"])
def test_shapes_that_do_not_belong_together_stop_the_start(arrays, start, load_model, name):
    """Even with a right checksum: one column less than the others have."""
    arrays[name] = arrays[name][..., :-1]
    held = [array for key, array in arrays.items() if key != "sha256"]
    arrays["sha256"] = np.frombuffer(load_model(TEMPLATE).checksum(*held), dtype=np.uint8)
    with pytest.raises(ValueError, match="do not belong together"):
        start(arrays)


def test_pickled_statistics_are_refused(arrays, start):
    """An object array would need pickle to load; numpy is told never to."""
    arrays["means"] = np.array([{"code": "run me"}], dtype=object)
    with pytest.raises(ValueError, match="allow_pickle"):
        start(arrays)


@pytest.mark.parametrize("path", sorted(ROOT.glob("models_repo/*.mahalanobis/*/model.py")), ids=lambda p: p.parts[-3])
def test_shipped_models_start(load_model, path):
    """Every model in the repository has this code and sound statistics."""
    assert path.read_bytes() == TEMPLATE.read_bytes()
    model = load_model(path).TritonPythonModel()
    model.initialize({"model_repository": str(path.parents[1]), "model_version": path.parent.name})
    assert model.means.shape[1] == model.directions.shape[1] == model.size
