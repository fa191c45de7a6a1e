"""Triton Python backend of the distance branch: Mahalanobis distance of a descriptor, and the fused score.

Takes `descriptor` (n, D) and `map_score` (n, 1) FP32, gives `mahalanobis` (n, 1) and `score` (n, 1) FP32. Reads
statistics.npz beside it and refuses to start on one that is damaged. Never clamps: NaN in is NaN out, and a request of
the wrong shape gets an error of its own while the others of its batch are answered. Numpy only; run by Triton.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

Array = npt.NDArray[Any]
ARRAYS = ("means", "scale", "directions", "weights", "outer", "fusion")
FUSION = ("map_mean", "map_std", "mahalanobis_mean", "mahalanobis_std", "weight")


class TritonPythonModel:
    """Named by Triton: it makes one a model instance and calls the methods below."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads and checks the statistics; an exception here marks the model as not ready, with its message."""
        path = Path(args["model_repository"]) / args["model_version"] / "statistics.npz"
        with np.load(path, allow_pickle=False) as arrays:
            held = {name: checked(path, arrays, name) for name in ARRAYS}
            expected = bytes(checked(path, arrays, "sha256"))
        if checksum(*held.values()) != expected:
            raise ValueError(f"{path}: checksum differs, the file is damaged; export the product again")
        self.means, self.scale, self.directions, self.weights, self.outer, self.fusion = (
            array.astype(np.float64) for array in held.values()
        )
        self.size, rank = self.means.shape[-1], self.weights.shape[-1]
        shapes = tuple(array.shape for array in held.values())
        if shapes != ((len(self.means), self.size), (self.size,), (rank, self.size), (rank,), (), (len(FUSION),)):
            raise ValueError(f"{path}: shapes {shapes} do not belong together; export the product again")

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in order."""
        return [self.respond(request) for request in requests]

    def respond(self, request: Any) -> Any:  # noqa: ANN401 - types of the server, not importable here
        """Scores one request, or says what is wrong with it."""
        descriptor = pb_utils.get_input_tensor_by_name(request, "descriptor").as_numpy()
        map_score = pb_utils.get_input_tensor_by_name(request, "map_score").as_numpy()
        if descriptor.shape != (len(descriptor), self.size) or map_score.shape != (len(descriptor), 1):
            message = f"descriptor {descriptor.shape} and map_score {map_score.shape}: "
            message += f"expected (n, {self.size}) and (n, 1)"
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message))
        distance, score = self.measure(descriptor, map_score)
        tensors = [pb_utils.Tensor("mahalanobis", distance), pb_utils.Tensor("score", score)]
        return pb_utils.InferenceResponse(output_tensors=tensors)

    def measure(self, descriptor: Array, map_score: Array) -> tuple[Array, Array]:
        """(n, D) and (n, 1) to distance and fused score, (n, 1) FP32 each; the sums run in float64."""
        squares = [self.squared(descriptor.astype(np.float64) - mean) for mean in self.means]
        distance = np.sqrt(np.min(squares, axis=0))[:, None]
        map_mean, map_std, mahalanobis_mean, mahalanobis_std, weight = self.fusion
        z_map = (map_score.astype(np.float64) - map_mean) / map_std
        score = z_map + weight * (distance - mahalanobis_mean) / mahalanobis_std
        return distance.astype(np.float32), score.astype(np.float32)

    def squared(self, centred: Array) -> Array:
        """(n, D) off one mode's mean to squared distances (n,)."""
        scaled = centred * self.scale
        inner = scaled @ self.directions.T
        rest = scaled - inner @ self.directions
        return np.asarray(inner**2 @ self.weights + self.outer * (rest**2).sum(axis=1))


def checked(path: Path, arrays: Mapping[str, Array], name: str) -> Array:
    """The array of that name, or an error that names the file."""
    if name not in arrays:
        raise ValueError(f"{path}: array '{name}' is missing; export the product again")
    return arrays[name]


def checksum(*arrays: Array) -> bytes:
    """sha256 over the bytes of the arrays in the order of ARRAYS."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()
