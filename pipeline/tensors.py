"""The tensors of a product's ensemble: their names, and whether what Triton shows and answers is the manifest's.

Talks to nobody. Called by `inference` and `model_control`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import InferInput, InferResult

from pipeline.manifest import Manifest
from pipeline.types import Batch, Image

INPUT = "image"
OUTPUTS = ("score", "map_score", "mahalanobis", "anomaly_map")


def signature_faults(metadata: Mapping[str, Any], manifest: Manifest) -> list[str]:
    """Compare Triton's model metadata with a manifest; gives one sentence a difference, none when it fits."""
    size = [manifest.input.height, manifest.input.width, 3]
    expected = {f"input {INPUT}": ("UINT8", size)}
    expected |= {f"output {name}": ("FP32", [1]) for name in OUTPUTS[:3]}
    expected[f"output {OUTPUTS[3]}"] = ("FP32", list(manifest.map_shape))
    actual = {
        f"{side[:-1]} {tensor['name']}": (tensor["datatype"], [int(size) for size in tensor["shape"]][1:])
        for side in ("inputs", "outputs")
        for tensor in metadata.get(side, [])
    }
    faults = [
        f"{name} is {_shown(actual.get(name))}, not {_shown(kind)}"
        for name, kind in expected.items()
        if actual.get(name) != kind
    ]
    faults += [f"{name} is asked for" for name in actual if name.startswith("input") and name not in expected]
    if (versions := metadata.get("versions")) and str(manifest.version) not in versions:
        faults.append(f"version {', '.join(versions)} is loaded, not {manifest.version}")
    return faults


def mismatch(manifest: Manifest, count: int, result: InferResult) -> str:
    """Compare an answer's version and shapes with the manifest's; '' when they fit.

    A replica that was started anew behind the same address may serve another version from one batch to the next.
    """
    version = result.get_response().model_version
    if version != str(manifest.version):
        return f"version {version} answers, not {manifest.version}"
    shapes = [tensor(result, name).shape for name in OUTPUTS]
    if shapes != [(count, 1)] * 3 + [(count, *manifest.map_shape)]:
        return f"tensors of the shapes {shapes}"
    return ""


def tensor(result: InferResult, name: str) -> npt.NDArray[np.float32]:
    """Give an output of an answer; an empty array where it has none of that name."""
    found: npt.NDArray[np.float32] | None = result.as_numpy(name)
    return found if found is not None else np.empty(0, np.float32)


def _shown(kind: tuple[str, list[int]] | None) -> str:
    return "absent" if kind is None else f"{kind[0]} {kind[1]}"


def pictures_of(batch: Batch) -> InferInput:
    """Make a request's input of a batch's frames, each of which has its picture."""
    return input_of(np.stack([frame.image for frame in batch.frames if frame.image is not None]))


def input_of(images: Image) -> InferInput:
    """Make a request's input of pictures, NHWC."""
    made = InferInput(INPUT, list(images.shape), "UINT8")
    made.set_data_from_numpy(images)
    return made
