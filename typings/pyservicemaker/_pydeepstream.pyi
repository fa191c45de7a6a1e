"""The compiled half of pyservicemaker: the parts that the line uses, typed by hand. Never run here.

Read from the sources of DeepStream 9.1 (https://github.com/NVIDIA/DeepStream, src/service-maker/sources/python/src at
f9f00ae and 66b8fdb); the file behind each signature stands beside it.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

# bindings/tensor.h: module_tensor_bind. `__dlpack_device__` names CUDA for host tensors too; `device_type` is right.
class Tensor:
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def device_type(self) -> str: ...  # "GPU", "CPU" or "NONE"
    def __dlpack__(self, stream: int | None = None) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

# bindings/metadata.h: module_metadata_bind.
class TensorOutputUserMetadata:
    @property
    def unique_id(self) -> int: ...
    def get_layers(self) -> dict[str, Tensor]: ...

class UserMetadata:
    def as_tensor_output(self) -> TensorOutputUserMetadata: ...

class FrameMetadata:
    @property
    def source_id(self) -> int: ...
    @property
    def batch_id(self) -> int: ...
    @property
    def frame_number(self) -> int: ...
    @property
    def source_width(self) -> int: ...
    @property
    def source_height(self) -> int: ...
    @property
    def tensor_items(self) -> Iterator[UserMetadata]: ...  # one pass, no length

class BatchMetadata:
    @property
    def frame_items(self) -> Iterator[FrameMetadata]: ...  # one pass, no length

# bindings/buffer.h: module_buffer_bind. Python overrides `consume`, which gives a negative value for a fault.
class Buffer:
    @property
    def batch_meta(self) -> BatchMetadata: ...
    def extract(self, batch_id: int) -> Tensor: ...

class BufferRetriever:
    def __init__(self) -> None: ...
    def consume(self, buffer: Buffer) -> int: ...

class Receiver:
    def __init__(self, name: str, retriever: BufferRetriever) -> None: ...

# bindings/probe.h: module_probe_bind.
class BatchMetadataOperator:
    def __init__(self) -> None: ...
    def handle_metadata(self, batch_meta: BatchMetadata) -> None: ...

class Probe:
    def __init__(self, name: str, handler: BatchMetadataOperator) -> None: ...

# bindings/pipeline.h: module_pipeline_bind.
class DynamicSourceMessage:
    @property
    def source_added(self) -> bool: ...
    @property
    def source_id(self) -> int: ...
    @property
    def sensor_id(self) -> str: ...
