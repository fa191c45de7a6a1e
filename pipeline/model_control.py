"""Tells every replica of Triton which models to load, and tries a version before anything of it is served.

Speaks Triton's model control, which a production server keeps behind a key and offers in its mode `explicit` alone. All
replicas are told, or none: one that cannot be reached ends the work before it begins. Writes no file. Called by
`promotion`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf import json_format
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from pipeline import replicas
from pipeline.cameras import read_secret
from pipeline.errors import CheckError, ConfigError, DependencyError, LineError
from pipeline.manifest import ensemble_of
from pipeline.releases import TEACHER_VERSION, ModelConfig, Release, is_ensemble, pinned
from pipeline.replicas import Resolve
from pipeline.servers import Triton as TritonSettings
from pipeline.tensors import INPUT, OUTPUTS, signature_faults

KEY_HEADER = "triton-grpc-protocol-logicrd"
_TRIAL = ".trial"
_READY_TIMEOUT_S = 5.0
_LOAD_TIMEOUT_S = 900.0  # a GPU server builds its engines while it loads
_INFER_TIMEOUT_S = 60.0
# Of the score, and in it: engines are built anew for what is served, and their sums differ in the last digits.
_RELATIVE, _ABSOLUTE = 0.05, 0.5

Array = npt.NDArray[Any]
Scores = dict[str, float]
"""The score of the trial's picture by the replica that gave it."""


class ModelControl:
    """The replicas of a line's Triton service, at work inside a `with` block; one thread."""

    def __init__(self, settings: TritonSettings, *, resolve: Resolve = replicas.resolve) -> None:
        self._settings = settings
        self._resolve = resolve
        self._headers: dict[str, str] = {}
        self._clients: dict[str, InferenceServerClient] = {}

    def __enter__(self) -> ModelControl:
        """Find every replica and ask each whether it takes the key. Raises DependencyError and ConfigError."""
        if self._settings.control_key_file is not None:
            self._headers = {KEY_HEADER: read_secret(self._settings.control_key_file).get_secret_value()}
        tls = None if self._settings.tls is None else replicas.credentials(self._settings.tls)
        for name in self._settings.addresses:
            try:
                found = self._resolve(name)
            except (OSError, UnicodeError) as error:
                raise DependencyError(f"Triton at {name}: its name is not known: {error}") from None
            self._clients |= {address: replicas.connect(name, address, tls) for address in found}
        try:
            for address in self._clients:
                self._call(address, "", lambda client: client.get_model_repository_index(
                    headers=self._headers, client_timeout=_READY_TIMEOUT_S
                ))  # fmt: skip
        except LineError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for client in self._clients.values():
            client.close()

    @property
    def addresses(self) -> list[str]:
        """The replicas, as `ip:port`."""
        return list(self._clients)

    def load(self, model: str) -> None:
        """Let every replica load a model as the repository has it; the versions before answer until it is loaded, and
        go on if it cannot be. Raises CheckError with the replica's words."""
        for address in self._clients:
            self._call(address, model, lambda client: client.load_model(
                model, headers=self._headers, client_timeout=_LOAD_TIMEOUT_S
            ))  # fmt: skip

    def unload(self, model: str) -> None:
        """Let every replica forget a model; raises as `load` does."""
        for address in self._clients:
            self._forget(address, model)

    def put_back(self, models: Iterable[str], gone: Iterable[str]) -> list[str]:
        """Load what the repository has again, and forget what it has no more; gives what went wrong."""
        faults: list[str] = []
        for model, change in [*((model, self.unload) for model in gone), *((model, self.load) for model in models)]:
            try:
                change(model)
            except LineError as error:
                faults.append(str(error))
        return faults

    def try_out(
        self, release: Release, configs: Mapping[str, ModelConfig], files: Mapping[str, Mapping[str, Path]]
    ) -> Scores:
        """Load a version's models under names that no line asks for, and let them judge a picture step by step.

        The server gets the files with the call: neither the repository nor what is served changes. Raises CheckError
        when a model cannot be loaded, or when the score is not finite.
        """
        steps = [model for model, config in configs.items() if not is_ensemble(config)]
        scores = {}
        for address in self._clients:
            try:
                for model in steps:
                    self._load_trial(address, release, configs[model], files[model])
                scores[address] = self._judge(address, release, configs)
            except CheckError as error:
                if self._call(address, "", lambda client: client.is_server_ready(client_timeout=_READY_TIMEOUT_S)):
                    raise
                words = f"{error}; since then it calls itself not ready"
                raise CheckError(words, hint="restart it with --strict-readiness=false, and try again") from None
            finally:
                for model in steps:
                    with suppress(LineError):  # the trial has its result; what stays costs memory until the next one
                        self._forget(address, model + _TRIAL)
        return scores

    def prove(self, release: Release, scores: Scores, ensemble: str) -> None:
        """Raise CheckError unless every replica's ensemble of that name is the one that was tried."""
        for address in self._clients:
            metadata = self._call(address, ensemble, lambda client: client.get_model_metadata(
                ensemble, as_json=True, headers=self._headers, client_timeout=_READY_TIMEOUT_S
            ))  # fmt: skip
            faults = signature_faults(metadata, release)
            tensors, version = self._infer(address, ensemble, {INPUT: _picture(release)}, OUTPUTS)
            score, tried = float(tensors["score"].ravel()[0]), scores[address]
            if version != str(release.version):
                faults.append(f"version {version} answers, not {release.version}")
            if not math.isclose(score, tried, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE):
                faults.append(f"it scores the trial's picture {score:.3f}, not {tried:.3f} as in the trial")
            if faults:
                raise CheckError(f"Triton at {address}: {ensemble}: {'; '.join(faults)}")

    # One replica

    def _load_trial(self, address: str, release: Release, config: ModelConfig, files: Mapping[str, Path]) -> None:
        version = TEACHER_VERSION if config.name == release.teacher.model else release.version
        trial = pinned(config, release, [version])
        trial.name = config.name + _TRIAL
        contents = {f"file:{version}/{name}": path.read_bytes() for name, path in files.items()}
        text = json_format.MessageToJson(trial, preserving_proto_field_name=True)
        self._call(address, config.name, lambda client: client.load_model(
            trial.name, headers=self._headers, config=text, files=contents, client_timeout=_LOAD_TIMEOUT_S
        ))  # fmt: skip

    def _judge(self, address: str, release: Release, configs: Mapping[str, ModelConfig]) -> float:
        """Let the trial's models judge a picture, each with what the ones before gave, as the ensemble joins them."""
        tensors: dict[str, Array] = {INPUT: _picture(release)}
        for step in configs[ensemble_of(release.product, release.version)].ensemble_scheduling.step:
            inputs = {name: tensors[tensor] for name, tensor in step.input_map.items()}
            outputs, _ = self._infer(address, step.model_name + _TRIAL, inputs, step.output_map)
            tensors |= {step.output_map[name]: tensor for name, tensor in outputs.items()}
        score, shape = float(tensors["score"].ravel()[0]), tensors["anomaly_map"].shape[1:]
        if not math.isfinite(score):
            raise CheckError(f"Triton at {address}: {release.product}: the trial's score is {score}")
        if shape != release.map_shape:
            raise CheckError(f"Triton at {address}: {release.product}: the trial's map is {shape}")
        return score

    def _infer(
        self, address: str, model: str, inputs: Mapping[str, Array], outputs: Iterable[str]
    ) -> tuple[dict[str, Array], str]:
        tensors = []
        for name, array in inputs.items():
            tensor = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensors.append(tensor.set_data_from_numpy(array))
        wanted = [InferRequestedOutput(name) for name in outputs]
        result = self._call(address, model, lambda client: client.infer(
            model, tensors, outputs=wanted, headers=self._headers, client_timeout=_INFER_TIMEOUT_S
        ))  # fmt: skip
        named = {output.name(): result.as_numpy(output.name()) for output in wanted}
        if lacking := [name for name, tensor in named.items() if tensor is None]:
            raise CheckError(f"Triton at {address}: {model}: no tensor {', '.join(lacking)} in its answer")
        return named, result.get_response().model_version

    def _forget(self, address: str, model: str) -> None:
        self._call(address, model, lambda client: client.unload_model(
            model, headers=self._headers, client_timeout=_LOAD_TIMEOUT_S
        ))  # fmt: skip

    def _call(self, address: str, model: str, call: Callable[[InferenceServerClient], Any]) -> Any:  # noqa: ANN401
        try:
            return call(self._clients[address])
        except InferenceServerException as error:
            raise _error(f"Triton at {address}", model, error) from None


def _error(server: str, model: str, error: InferenceServerException) -> LineError:
    """Turn an answer of Triton into an error of ours."""
    words = str(error.message() or error.status()).partition("\n\nAt:")[0].strip()
    if "protocol is restricted" in words:
        return ConfigError(
            f"{server} keeps model control behind a key, and this is not it",
            hint=f"triton.control_key_file holds the value that Triton was started with for the header {KEY_HEADER}",
        )
    if "not allowed" in words and "explicit" in words:
        return ConfigError(f"{server}: {words}", hint="start Triton with --model-control-mode=explicit")
    if str(error.status()) in {"StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"}:
        return DependencyError(f"{server} does not answer: {words}", hint="every replica has to be told; start it")
    return CheckError(f"{server}: {model}: {words}" if model else f"{server}: {words}")


def _picture(release: Release) -> Array:
    """Noise: it excites every channel, and no part looks like it."""
    shape = (1, release.input.height, release.input.width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
