"""The `onnxruntime` backend of the embedded Triton server: runs `<version>/model.onnx` in the onnxruntime package.

Triton's own onnxruntime backend is compiled for its container only; this file stands in for it on a machine that has
just the Python backend, so that one model repository serves both. It never changes a tensor and never reads another
model. Triton's Python stub imports it once a model instance. Model parameter read from config.pbtxt:
`intra_op_thread_count` (as in the compiled backend; default: all cores).
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils

# Concatenating requests costs one more copy of every input. Measured on 2 cores, a convolution over 2 x 4 images is as
# fast as one over 8, so requests are joined only up to this many images.
JOIN_UP_TO = 4

# Objects of Triton's stub and of onnxruntime, neither of which has types.
Request: TypeAlias = Any
Response: TypeAlias = Any
Array: TypeAlias = np.ndarray[Any, Any]


class TritonPythonModel:
    """One model instance: one process with one session on all cores, which it holds while it computes.

    The stages of different batches take turns; what overlaps is computing and copying. On 2 cores of a virtual machine
    a sleeping core takes longer to wake than a small convolution to run, so the session's threads spin between two
    operators, and stop with the last one, so that the next stage finds the cores free.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Open the sessions. Triton reports what is raised here as the model's load error."""
        config = json.loads(args["model_config"])
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        threads = config.get("parameters", {}).get("intra_op_thread_count", {}).get("string_value", "")
        self._session = _session(path, int(threads) if threads else len(os.sched_getaffinity(0)))
        self._input_names = [tensor["name"] for tensor in config["input"]]
        self._output_names = [tensor["name"] for tensor in config["output"]]
        self._batched = int(config["max_batch_size"]) > 0
        # Held during a run by one session of this server at a time.
        self._cores = Path(__file__).with_name("cores").open("w")

    def execute(self, requests: list[Request]) -> list[Response]:
        """Answer every request, in order; a request that cannot be run gets its own error, the others their tensors."""
        responses: list[Response] = []
        for group in self._groups(requests):
            responses.extend(self._run(group))
        return responses

    def _groups(self, requests: list[Request]) -> list[list[Request]]:
        """Cut the requests into runs: neighbours with equal shapes together, at most JOIN_UP_TO images a run."""
        groups: list[list[Request]] = []
        size, shape = 0, None
        for request in requests:
            first = pb_utils.get_input_tensor_by_name(request, self._input_names[0]).shape()
            images = first[0] if self._batched else JOIN_UP_TO
            if groups and first[1:] == shape and size + images <= JOIN_UP_TO:
                groups[-1].append(request)
                size += images
            else:
                groups.append([request])
                size, shape = images, first[1:]
        return groups

    def _run(self, group: list[Request]) -> list[Response]:
        """One session run for one or several requests. Inputs of a single request are read in place, without a copy."""
        feeds = {name: _joined(group, name) for name in self._input_names}
        fcntl.flock(self._cores, fcntl.LOCK_EX)
        try:
            outputs = self._session.run(self._output_names, feeds)
        except Exception as error:  # noqa: BLE001  top frame: whatever the session says is this request's answer
            answer = pb_utils.InferenceResponse(error=pb_utils.TritonError(f"onnxruntime: {error}"))
            return [answer for _ in group]
        finally:
            fcntl.flock(self._cores, fcntl.LOCK_UN)
        if len(group) == 1:
            return [self._response(outputs)]
        return [self._response(part) for part in _split(outputs, [self._images(request) for request in group])]

    def _images(self, request: Request) -> int:
        return int(pb_utils.get_input_tensor_by_name(request, self._input_names[0]).shape()[0])

    def _response(self, outputs: list[Array]) -> Response:
        named = zip(self._output_names, outputs, strict=True)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, output) for name, output in named])


def _session(path: Path, threads: int) -> ort.InferenceSession:
    """Open the graph with this many threads, which sleep between two runs: other sessions need the same cores."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    options.log_severity_level = 3
    return ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


def _joined(group: list[Request], name: str) -> Array:
    arrays: list[Array] = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in group]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _split(outputs: list[Array], sizes: list[int]) -> list[list[Array]]:
    """Cut each output along the batch axis into pieces of the given sizes."""
    edges = np.cumsum(sizes)[:-1]
    return [list(parts) for parts in zip(*(np.split(output, edges) for output in outputs), strict=True)]
