"""The server's side of a Python backend, as small as the models need it, and a loader by path."""

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


class Tensor:
    """A named array, as pb_utils.Tensor."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self._array = name, array

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    """An error that belongs to one request."""

    def __init__(self, message: str) -> None:
        self.message = message


class InferenceResponse:
    """Tensors by name, or an error."""

    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self.outputs = {tensor.name: tensor.as_numpy() for tensor in output_tensors}
        self.error = error


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `import triton_python_backend_utils` work while a test runs."""
    utils = types.ModuleType("triton_python_backend_utils")
    parts = {"Tensor": Tensor, "TritonError": TritonError, "InferenceResponse": InferenceResponse}
    vars(utils).update(parts, get_input_tensor_by_name=lambda request, name: request.get(name))
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)


@pytest.fixture
def load_model() -> Callable[[Path], ModuleType]:
    """Loads a model.py by its path, as the server does."""

    def load(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location("served_model", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def request_of() -> Callable[[np.ndarray, np.ndarray], dict[str, Tensor]]:
    """A request for the distance step."""

    def build(descriptor: np.ndarray, map_score: np.ndarray) -> dict[str, Tensor]:
        return {"descriptor": Tensor("descriptor", descriptor), "map_score": Tensor("map_score", map_score)}

    return build
