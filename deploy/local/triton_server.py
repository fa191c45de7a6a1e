"""The embedded Triton server: tritonserver and its Python backend out of the nvidia-pytriton wheel, on CPU.

Assembles the backend folder, builds the command line, and asks the ensembles a canary question: when a backend's
process dies, Triton still calls itself ready while every request fails, so readiness alone proves nothing. Loopback
only: this server version predates security fixes. Used by the supervisor; serves whatever the model repository holds.
"""

from __future__ import annotations

import hashlib
import os
import queue
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from processes import LOOPBACK, StackError, answers
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

BACKENDS = Path(__file__).parent / "backends"
# Room for the largest message of a batch of 8 (both feature pyramids, 29 MB), so that it never grows while serving.
SHARED_MEMORY_BYTES = 64 * 1024 * 1024
CANARY_PERIOD_S = 5.0
# Longer than any queue that still makes sense: past this the canary counts as "busy", which is no fault.
CANARY_TIMEOUT_S = 30.0
# Triton's words for a request it refused or gave up in a full queue: busy too, though the status is that of a fault.
BUSY_WORDS = ("maximum queue size", "timeout expired", "Request timeout")

ModelConfig: TypeAlias = Any  # a protobuf message of tritonclient, which has no types


@dataclass(frozen=True, slots=True)
class TritonPorts:
    """The three listeners."""

    grpc: int
    http: int
    metrics: int


class Triton:
    """One tritonserver process and its backend processes."""

    name = "triton"
    start_timeout_s = 180.0
    cause_pattern = r"UNAVAILABLE:|failed to load|error while loading|^error:"

    def __init__(
        self,
        state_dir: Path,
        models: Path,
        environment: Path,
        ports: TritonPorts,
        control_key: str = "",
        trace_url: str = "",
    ) -> None:
        """`environment`: the virtual environment that holds nvidia-pytriton and onnxruntime.

        `control_key`: models are loaded and unloaded on demand, by who has this key; '': they stay as they are.
        `trace_url`: a collector for the spans of traced requests, OTLP over HTTP; '': none are made.
        """
        self._control_key = control_key
        self._trace_url = trace_url
        self._state_dir = state_dir
        self._folder = state_dir / "triton"
        self._models = models
        self._environment = environment
        self._ports = ports
        self._canary = Canary(f"{LOOPBACK}:{ports.grpc}", control_key)

    def endpoints(self) -> dict[str, str]:
        """Where clients find it."""
        return {
            "triton": f"{LOOPBACK}:{self._ports.grpc}",
            "triton_http": f"{LOOPBACK}:{self._ports.http}",
            "triton_metrics": f"{LOOPBACK}:{self._ports.metrics}",
        }

    def require(self) -> None:
        """Raises StackError when the models or the server's environment are not there."""
        if not self._models.is_dir():
            raise StackError(f"triton: no model repository '{self._models}'; give another with --models", 3)
        if not any(self._models.glob("*/config.pbtxt")):
            raise StackError(f"triton: no model in '{self._models}'; export one with `logicrd-train export`", 3)
        if not self._server().exists():
            raise StackError(f"triton: no server in '{self._environment}'; run `make setup`", 3)

    def prepare(self) -> None:
        """Assemble the backend folder. Copies, because Triton refuses a link that leaves it."""
        self._canary = Canary(f"{LOOPBACK}:{self._ports.grpc}", self._control_key)
        self.clean()
        target = self._folder / "backends"
        shutil.rmtree(target, ignore_errors=True)
        (target / "python").mkdir(parents=True)
        wheel = self._server().parents[1]
        stub = wheel / "python_backend_stubs" / self._python_version() / "triton_python_backend_stub"
        for source in (*(wheel / "backends/python").glob("*.*"), stub):
            shutil.copy2(source, target / "python")
        for backend in BACKENDS.iterdir():
            shutil.copytree(backend, target / backend.name, ignore=shutil.ignore_patterns("__pycache__"))

    def command(self) -> list[str]:
        """tritonserver on loopback, with the configurations exactly as the repository has them."""
        return [
            str(self._server()),
            f"--model-repository={self._models}",
            f"--backend-directory={self._folder / 'backends'}",
            "--disable-auto-complete-config",
            f"--grpc-address={LOOPBACK}",
            f"--http-address={LOOPBACK}",
            f"--metrics-address={LOOPBACK}",
            f"--grpc-port={self._ports.grpc}",
            f"--http-port={self._ports.http}",
            f"--metrics-port={self._ports.metrics}",
            "--allow-gpu-metrics=false",
            "--pinned-memory-pool-byte-size=0",
            "--exit-timeout-secs=5",
            f"--backend-config=python,shm-default-byte-size={SHARED_MEMORY_BYTES}",
            f"--backend-config=python,shm-region-prefix-name={_shm_prefix(self._state_dir)}",
            *self._control(),
            *self._tracing(),
        ]

    def _control(self) -> list[str]:
        """Options of model control. Triton takes a key as an argument only, which this machine's users can read.

        With strict readiness a server calls itself not ready while a model is loaded, and for good after one that could
        not be: one version that is tried would take the others from the line.
        """
        if not self._control_key:
            return []
        key = f"--grpc-restricted-protocol=model-repository:logicrd={self._control_key}"
        return ["--model-control-mode=explicit", "--load-model=*", "--strict-readiness=false", key]

    def _tracing(self) -> list[str]:
        """Options of tracing. A request that comes with a sampled trace is always traced, of the others none."""
        if not self._trace_url:
            return []
        settings = (
            "mode=opentelemetry",
            "level=TIMESTAMPS",
            f"rate={2**31 - 1}",
            f"opentelemetry,url={self._trace_url}",
        )
        return [f"--trace-config={setting}" for setting in settings]

    def environment(self) -> dict[str, str]:
        """PATH and libraries. The backend's processes find their packages by the first `python3` on PATH, not else."""
        libraries = [str(self._site_packages() / "nvidia_pytriton.libs"), str(self._python_home() / "lib")]
        return {
            "PATH": f"{self._environment / 'bin'}:{os.defpath}",
            "LD_LIBRARY_PATH": ":".join(libraries),
            "PYTHONPATH": "",
            "PYTHONHOME": "",
            "PYTHONDONTWRITEBYTECODE": "1",
            # A Python model's BLAS keeps its threads spinning after each product: 50 ms of CPU a request, measured.
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            # Feature maps are megabytes: memory that is kept costs no page faults (12.6 -> 16.4 images/s at batch 8).
            "MALLOC_MMAP_THRESHOLD_": "1073741824",
            "MALLOC_TRIM_THRESHOLD_": "1073741824",
            "MALLOC_ARENA_MAX": "2",
        }

    def check(self) -> str | None:
        """The canary's newest answer, see `Canary.poll`; None until the server listens."""
        return self._canary.poll() if answers(self._ports.grpc) else None

    def clean(self) -> None:
        """Remove shared memory that killed processes left behind."""
        remove_shared_memory(self._state_dir)

    def _site_packages(self) -> Path:
        return self._environment / "lib" / f"python{self._python_version()}" / "site-packages"

    def _server(self) -> Path:
        return self._site_packages() / "pytriton/tritonserver/bin/tritonserver"

    def _python_version(self) -> str:
        folders = sorted((self._environment / "lib").glob("python3.*"))
        return folders[0].name.removeprefix("python") if folders else "3.11"

    def _python_home(self) -> Path:
        """The installation that the virtual environment was made from."""
        return (self._environment / "bin/python3").resolve().parents[1]


class Canary:
    """Sends every ensemble a black picture: all of them at the start, then one of them in turn every few
    seconds; one that answered with an error is asked again at once."""

    def __init__(self, address: str, control_key: str = "") -> None:
        self._address = address
        self._headers = {"triton-grpc-protocol-logicrd": control_key} if control_key else {}
        self._client: triton.InferenceServerClient | None = None
        self._ensembles: list[str] = []
        self._unproven: list[str] = []
        self._turn = 0
        self._suspect = ""
        self._next_s = 0.0
        self._waiting_for = ""
        self._answers: queue.Queue[str | None] = queue.Queue()

    def poll(self) -> str | None:
        """'' when an ensemble answered well (at the start: when all did), the fault when one answered with an error,
        None when there is nothing new: not asked, no answer yet, or busy. Never blocks for an inference."""
        if not self._ensembles and not self._is_ready():
            return None
        try:
            fault = self._answers.get_nowait()
        except queue.Empty:
            self._ask_when_due()
            return None
        name, self._waiting_for, self._suspect = self._waiting_for, "", ""
        if fault:
            self._next_s, self._suspect = 0.0, name
            return f"the canary inference on '{name}' failed: {fault}"
        if name in self._unproven and fault == "":
            self._unproven.remove(name)
        self._next_s = 0.0 if self._unproven else time.monotonic() + CANARY_PERIOD_S
        return "" if fault == "" and not self._unproven else None

    def _is_ready(self) -> bool:
        """Ask the server whether it is ready, and then for its ensembles."""
        self._client = self._client or triton.InferenceServerClient(self._address)
        try:
            if not self._client.is_server_ready(client_timeout=1.0):
                return False
            index = self._client.get_model_repository_index(self._headers, client_timeout=2.0)
            names = [model.name for model in index.models if model.state == "READY"]
            configs = [self._client.get_model_config(name, client_timeout=2.0).config for name in names]
        except InferenceServerException:
            return False
        ensembles = [config.name for config in configs if config.HasField("ensemble_scheduling")]
        # Those of products: the ones of single versions, `product.v5`, come and go while the server runs.
        self._ensembles = [name for name in ensembles if "." not in name] or names
        self._unproven = list(self._ensembles)
        return bool(self._ensembles)

    def _ask_when_due(self) -> None:
        if self._waiting_for or time.monotonic() < self._next_s or self._client is None:
            return
        name = self._waiting_for = self._suspect or self._next_in_turn()
        try:
            inputs = _zeros(self._client.get_model_config(name, client_timeout=2.0).config)
            self._client.async_infer(name, inputs, partial(_answered, self._answers), client_timeout=CANARY_TIMEOUT_S)
        except InferenceServerException as error:
            self._answers.put(_fault(error))

    def _next_in_turn(self) -> str:
        if self._unproven:
            return self._unproven[0]
        self._turn += 1
        return self._ensembles[self._turn % len(self._ensembles)]


def remove_shared_memory(state_dir: Path) -> None:
    """Remove the segments that a killed server of this stack left behind. Only when it does not run."""
    for segment in Path("/dev/shm").glob(f"{_shm_prefix(state_dir)}*"):
        segment.unlink(missing_ok=True)


def _shm_prefix(state_dir: Path) -> str:
    """A prefix for each stack: after a SIGKILL the segments stay, and only this name tells whose they are."""
    return f"logicrd-{hashlib.sha256(str(state_dir).encode()).hexdigest()[:12]}-"


def _zeros(config: ModelConfig) -> list[triton.InferInput]:
    """An all-zero request of one image for this model; open dimensions become 1."""
    inputs = []
    for tensor in config.input:
        shape = [1] * (config.max_batch_size > 0) + [max(1, size) for size in tensor.dims]
        dtype = triton.model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
        values = np.zeros(shape, triton_to_np_dtype(dtype))
        inputs.append(triton.InferInput(tensor.name, shape, dtype).set_data_from_numpy(values))
    return inputs


def _answered(replies: queue.Queue[str | None], result: object, error: InferenceServerException | None) -> None:
    del result
    replies.put("" if error is None else _fault(error))


def _fault(error: InferenceServerException) -> str | None:
    """The server's words; None when they only say that it is busy."""
    words = str(error.message())
    if "DEADLINE_EXCEEDED" in str(error.status()) or any(busy in words for busy in BUSY_WORDS):
        return None
    return words
