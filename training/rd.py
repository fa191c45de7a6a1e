"""Reverse distillation (Deng & Li, CVPR 2022): teacher, bottleneck, student and the map between them.

Recipe of the official code: cosine of the whole flattened tensors as loss, map = sum over levels of 1 - cosine, score =
maximum of the smoothed map. Ours: the map has the size of level 1 (64 x 64 at 256), smoothing lies in the graph, and
bottleneck and student use basic blocks whatever the backbone. Built by `methods`; holds no optimiser and no file.
"""

from typing import ClassVar

from torch import Tensor, nn

from training.modules.bottleneck import Bottleneck
from training.modules.decoder import Decoder
from training.modules.distances import distillation_loss
from training.modules.maps import SummedMap
from training.modules.resnet import Features
from training.stages import LEVELS, FeatureSource, Parameters, Wiring
from training.teacher import AnyTeacher


class ReverseDistillation(nn.Module):
    """The four served stages: `teacher` frozen, `bottleneck` and `student` trained, `map` fixed."""

    wiring: ClassVar[Wiring] = {
        "teacher": (("image",), LEVELS),
        "bottleneck": (LEVELS, ("embedding", "descriptor")),
        "student": (("embedding",), ("d1", "d2", "d3")),
        "map": ((*LEVELS, "d1", "d2", "d3"), ("anomaly_map", "map_score")),
    }

    def __init__(self, teacher: AnyTeacher, width: int, image_size: int) -> None:
        super().__init__()
        self.teacher = teacher.requires_grad_(False)
        self.bottleneck = Bottleneck(teacher.channels, width)
        self.student = Decoder(teacher.channels, width)
        self.map = SummedMap(image_size // 4)

    def prepare(self, normals: FeatureSource) -> None:
        """Nothing to fit before training."""

    def parameters_by_rate(self) -> Parameters:
        """All trained weights at the full rate."""
        return {"full": [*self.bottleneck.parameters(), *self.student.parameters()]}

    def loss(self, features: Features) -> Tensor:
        """Distillation loss of a batch of the teacher's levels: a scalar from 0 (equal) to 6."""
        return distillation_loss(features, self.student(self.bottleneck.embedding(*features)))

    def settle(self, normals: FeatureSource) -> None:
        """Nothing to fit after training."""
