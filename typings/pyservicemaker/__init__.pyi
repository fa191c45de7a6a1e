"""The parts of pyservicemaker that the line uses, typed by hand. Never run here: it needs DeepStream and a GPU.

Read from the sources of DeepStream 9.1 (https://github.com/NVIDIA/DeepStream, src/service-maker/sources/python/src at
f9f00ae and 66b8fdb). What `__init__.py` there does not export is not exported here.
"""

from collections.abc import Callable, Mapping

from ._pydeepstream import BatchMetadataOperator as BatchMetadataOperator
from ._pydeepstream import Buffer as Buffer
from ._pydeepstream import BufferRetriever as BufferRetriever
from ._pydeepstream import DynamicSourceMessage as DynamicSourceMessage
from ._pydeepstream import Probe as Probe
from ._pydeepstream import Receiver as Receiver

Properties = Mapping[str, str | int | float | bool]

# pyservicemaker/pipeline.py. The callback is called with the message alone.
class Pipeline:
    def __init__(self, name: str, config_file: str | None = None) -> None: ...
    def add(self, type_name: str, name: str, properties: Properties | None = None) -> Pipeline: ...
    def link(self, *args: str) -> Pipeline: ...
    def attach(self, target: str, what: Probe | Receiver, name: str = "", tips: str = "") -> Pipeline: ...
    def prepare(self, on_message: Callable[[object], None] | None = None) -> Pipeline: ...
    def activate(self) -> Pipeline: ...
    def wait(self) -> Pipeline: ...  # without the interpreter's lock, until the pipeline ends
    def stop(self) -> Pipeline: ...
