"""The state of a run on disk, so that a killed run goes on exactly where it was: weights, optimiser, counters.

One safetensors file, replaced in one step; nothing in it is executed when it is read. Orders of pictures and random
draws need no state: they are derived from seed and step. Called by `fit`; `pretrain` keeps its own counters in the same
form.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from training.errors import DataError

FILE = "checkpoint.safetensors"
_STATE = "state"


@dataclass(frozen=True, slots=True)
class Counters:
    """Steps done, seconds of training spent, and the plateau rule's memory; `identity` names settings and data."""

    identity: str
    step: int
    spent_s: float
    best_loss: float
    looks_left: int


def save_checkpoint(folder: Path, network: nn.Module, optimiser: torch.optim.Optimizer, counters: Counters) -> None:
    """Writes all but the teacher; a kill while writing leaves the previous checkpoint whole."""
    fields = {name: getattr(counters, name) for name in Counters.__slots__}
    replace_file(folder / FILE, state_tensors(_own(network), optimiser), {_STATE: json.dumps(fields)})


def load_checkpoint(
    folder: Path, network: nn.Module, optimiser: torch.optim.Optimizer, identity: str
) -> Counters | None:
    """Fills network and optimiser and returns the counters, or None where there is no checkpoint.

    Raises DataError for a damaged file and for one of other settings, data or teacher.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        metadata, tensors = read_file(path)
        counters = Counters(**json.loads(metadata[_STATE]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"checkpoint '{path}': cannot be used ({error}); remove it to start anew") from error
    if counters.identity != identity:
        raise DataError(f"checkpoint '{path}': is of other settings, data or teacher; remove it to start anew")
    weights = network_state(tensors)
    if {name: value.shape for name, value in weights.items()} != {n: v.shape for n, v in _own(network).items()}:
        raise DataError(f"checkpoint '{path}': its weights do not fit this version's network; remove it to start anew")
    network.load_state_dict(weights, strict=False)
    restore_optimiser(optimiser, tensors)
    return counters


def state_tensors(weights: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and the optimiser's state as tensors by name, as a checkpoint holds them."""
    tensors = {f"network.{name}": value.contiguous() for name, value in weights.items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": value.contiguous() for name, value in state.items()}
    return tensors


def network_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights among a checkpoint's tensors."""
    return _under("network.", tensors)


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Fills the optimiser from a checkpoint's tensors; its settings stay its own."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _under("optimiser.", tensors).items():
        index, _, field = name.partition(".")
        state.setdefault(int(index), {})[field] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})


def replace_file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file in one step; a kill while writing leaves the previous one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # Not save_file: it makes files that only their owner can read.
    partial.write_bytes(save(tensors, metadata=metadata))
    partial.replace(path)


def read_file(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file; raises what safetensors raises, and TypeError without metadata."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict


def _own(network: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in network.state_dict().items() if not name.startswith("teacher.")}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
