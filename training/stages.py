"""What the three methods have in common: four stages, named tensors between them, and how they are run and trained.

A stage is what one composing model of the served ensemble computes. `wiring` names each stage's tensors; torch, ONNX
and Triton follow the same table. Used by `methods`, `fit`, `detector`, `graphs` and `export`.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from training.modules.resnet import Features
from training.teacher import AnyTeacher

LEVELS = ("f1", "f2", "f3")
STAGES = ("teacher", "bottleneck", "student", "map")
# Stage to the names of what it takes and what it gives.
Wiring = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
# Trained weights by learning rate: "full" for convolutions, "attention" for what the full rate would upset.
Parameters = dict[str, list[nn.Parameter]]


class FeatureSource(Protocol):
    """Normals of one product as the teacher's levels; may be walked through any number of times."""

    def features(self, batch_size: int) -> Iterator[Features]:
        """All pictures in order, in batches of float32 levels."""


@runtime_checkable
class Method(Protocol):
    """What `rd`, `dskd` and `logicrd` offer: the four stages as submodules, and how they are fitted."""

    teacher: AnyTeacher
    wiring: Wiring

    def prepare(self, normals: FeatureSource) -> None:
        """Fits what must be known of the training normals before the first step."""

    def parameters_by_rate(self) -> Parameters:
        """The weights to train."""

    def loss(self, features: Features) -> Tensor:
        """A scalar, smaller is better, of a batch of normals."""

    def settle(self, normals: FeatureSource) -> None:
        """Fits what must be known of held-out normals after the last step."""


def rebuild(network: nn.Module, wiring: Wiring, features: Features) -> dict[str, Tensor]:
    """All tensors by name that bottleneck and student make of the teacher's levels, and these with them."""
    return run_stages(network, wiring, dict(zip(LEVELS, features, strict=True)), until="student")


def run_stages(
    network: nn.Module, wiring: Wiring, tensors: dict[str, Tensor], until: str = STAGES[-1]
) -> dict[str, Tensor]:
    """Runs the stages in order up to `until` and returns all tensors by name; what is given already is not computed."""
    known = dict(tensors)
    for stage in STAGES[: STAGES.index(until) + 1]:
        taken, given = wiring[stage]
        if given[0] in known:
            continue
        results = network.get_submodule(stage)(*(known[name] for name in taken))
        known |= dict(zip(given, results, strict=True))
    return known
