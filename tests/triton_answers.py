"""What Triton says of the ensemble `tray` and answers for it, made up, and batches to ask it for."""

from types import SimpleNamespace

import numpy as np

from pipeline.tensors import OUTPUTS
from pipeline.types import Batch


def metadata(**changes):
    """Give the metadata that Triton shows of a good ensemble, as JSON: integers are words. Keywords replace tensors."""
    shapes = {
        "image": ("UINT8", [-1, 256, 256, 3]),
        "score": ("FP32", [-1, 1]),
        "map_score": ("FP32", [-1, 1]),
        "mahalanobis": ("FP32", [-1, 1]),
        "anomaly_map": ("FP32", [-1, 64, 64]),
    } | changes
    tensors = [
        {"name": name, "datatype": kind[0], "shape": [str(size) for size in kind[1]]}
        for name, kind in shapes.items()
        if kind is not None
    ]
    inputs = [tensor for tensor in tensors if tensor["name"] not in OUTPUTS]
    outputs = [tensor for tensor in tensors if tensor["name"] in OUTPUTS]
    return {"name": "tray", "versions": ["1"], "platform": "ensemble", "inputs": inputs, "outputs": outputs}


class Answer:
    """An answer of Triton with these tensors, by this version of the ensemble."""

    def __init__(self, version="1", **tensors):
        self._tensors = tensors
        self._version = version

    def get_response(self):
        return SimpleNamespace(model_version=self._version)

    def as_numpy(self, name):
        return self._tensors.get(name)


def answer(count, **changes):
    column = np.arange(count, dtype=np.float32).reshape(count, 1)
    anomaly_map = np.zeros((count, 64, 64), np.float32)
    tensors = {"score": column, "map_score": column + 10, "mahalanobis": column + 20, "anomaly_map": anomaly_map}
    return Answer(**(tensors | changes))


def batch_of(make_frame, count, **fields):
    return Batch("tray", tuple(make_frame(number=number, **fields) for number in range(1, count + 1)))
