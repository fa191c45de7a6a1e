"""DSKD: two students, one for detail and one for context, after Contextual Affinity Distillation.

Zhang, Suganuma, Okatani, WACV 2024 (arXiv 2307.03101), of which the idea could be read and the exact layers, weights
and schedules could not: those are ours. The local student is reverse distillation. The global student sees the picture
only through a condensed context and learns, besides features, their affinity: how alike each position is to every
other. Built by `methods` to compare with.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.modules.bottleneck import Bottleneck, describe
from training.modules.decoder import Decoder
from training.modules.distances import cosine_distance, distillation_loss
from training.modules.maps import NormedMap
from training.modules.resnet import Features, ResidualBlock
from training.stages import LEVELS, FeatureSource, Parameters, Wiring, rebuild
from training.teacher import AnyTeacher

AFFINITY_LOSS = 1.0
# Channels that the condensed context keeps of the embedding.
CONDENSED_CHANNELS = 32
LOCAL, GLOBAL = ("d1", "d2", "d3"), ("e1", "e2", "e3")
# From the positions of each level to those of level 3.
POOLS = (4, 2, 1)
SETTLE_BATCH = 16


class Condensing(nn.Module):
    """Global context condensing: embedding (B, width, h, w) through few channels without place, and back.

    Channels are cut down, then each position is rebuilt from the condensed vector of the whole picture.
    """

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.reduce = nn.Conv2d(width, CONDENSED_CHANNELS, 1)
        self.whole = nn.Conv2d(CONDENSED_CHANNELS, width, side)
        self.spread = nn.ConvTranspose2d(width, width, side)
        self.refine = ResidualBlock(width, width, 1)

    def forward(self, embedding: Tensor) -> Tensor:
        """Same shape as the embedding."""
        vector = torch.relu(self.whole(torch.relu(self.reduce(embedding))))
        spread: Tensor = self.refine(torch.relu(self.spread(vector)))
        return spread


class TwoBottlenecks(nn.Module):
    """Stage `bottleneck`: levels to (local embedding, condensed context, descriptor)."""

    def __init__(self, channels: tuple[int, int, int], width: int, image_size: int) -> None:
        super().__init__()
        self.local_embedding = Bottleneck(channels, width)
        self.global_embedding = Bottleneck(channels, width)
        self.condense = Condensing(width, image_size // 32)

    def forward(self, f1: Tensor, f2: Tensor, f3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, width, H/32, W/32) twice, and the descriptor."""
        detail = self.local_embedding.embedding(f1, f2, f3)
        context = self.global_embedding.embedding(f1, f2, f3)
        return detail, self.condense(context), describe(f1, f2, f3)


class TwoStudents(nn.Module):
    """Stage `student`: both embeddings to the levels that each student rebuilds."""

    def __init__(self, channels: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.local_student = Decoder(channels, width)
        self.global_student = Decoder(channels, width)

    def forward(self, detail: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        """(d1, d2, d3, e1, e2, e3), d from the local and e from the global student."""
        return (*self.local_student(detail), *self.global_student(context))


class TwoMaps(nn.Module):
    """Stage `map`: cosine distances to the local student, affinity distances to the global one, normed and summed."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.normed = NormedMap(image_size // 4, maps=6)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """f, d and e of levels 1 to 3 to anomaly_map (B, side, side) and map_score (B, 1)."""
        anomaly_map, map_score = self.normed(self.distances(*tensors))
        return anomaly_map, map_score

    def distances(self, *tensors: Tensor) -> list[Tensor]:
        """Six maps (B, 1, h, w): three cosine distances of the local student, three affinities of the global one."""
        features, local_levels, global_levels = tensors[:3], tensors[3:6], tensors[6:]
        maps = [cosine_distance(f, d) for f, d in zip(features, local_levels, strict=True)]
        return maps + affinity_distances(features, global_levels)


class DualStudent(nn.Module):
    """The four served stages: `teacher` frozen, `bottleneck` and `student` trained, `map` fitted after training."""

    wiring: ClassVar[Wiring] = {
        "teacher": (("image",), LEVELS),
        "bottleneck": (LEVELS, ("embedding", "context", "descriptor")),
        "student": (("embedding", "context"), (*LOCAL, *GLOBAL)),
        "map": ((*LEVELS, *LOCAL, *GLOBAL), ("anomaly_map", "map_score")),
    }

    def __init__(self, teacher: AnyTeacher, width: int, image_size: int) -> None:
        super().__init__()
        self.teacher = teacher.requires_grad_(False)
        self.bottleneck = TwoBottlenecks(teacher.channels, width, image_size)
        self.student = TwoStudents(teacher.channels, width)
        self.map = TwoMaps(image_size)

    def prepare(self, normals: FeatureSource) -> None:
        """Nothing to fit before training."""

    def parameters_by_rate(self) -> Parameters:
        """All trained weights at the full rate."""
        return {"full": [*self.bottleneck.parameters(), *self.student.parameters()]}

    def loss(self, features: Features) -> Tensor:
        """Both students' distillation loss plus the affinity loss of the global one."""
        known = rebuild(self, self.wiring, features)
        local_levels, global_levels = ([known[name] for name in names] for names in (LOCAL, GLOBAL))
        loss = distillation_loss(features, local_levels) + distillation_loss(features, global_levels)
        affinities = affinity_distances(features, global_levels)
        return loss + AFFINITY_LOSS * torch.stack([distance.mean() for distance in affinities]).sum()

    def settle(self, normals: FeatureSource) -> None:
        """Fits the maps' norms on held-out normals."""
        self.map.normed.settle(self._distances(features) for features in normals.features(SETTLE_BATCH))

    @torch.inference_mode()
    def _distances(self, features: Features) -> list[Tensor]:
        known = rebuild(self, self.wiring, features)
        return self.map.distances(*(known[name] for name in self.wiring["map"][0]))


def affinity_distances(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> list[Tensor]:
    """Affinity distance maps of the levels, all on the positions of level 3: three of (B, 1, H/16, W/16)."""
    pairs = zip(teacher, student, POOLS, strict=True)
    return [affinity_distance(F.avg_pool2d(f, pool), F.avg_pool2d(e, pool)) for f, e, pool in pairs]


def affinity_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """How differently each position relates to all others: (B, C, h, w) twice to (B, 1, h, w), range 0 to 2.

    Affinity of two positions = cosine of their features; the distance at a position is 1 - cosine between its row of
    the teacher's affinities and its row of the student's, each less its mean.
    """
    rows = [_affinities(level) for level in (teacher, student)]
    rows = [row - row.mean(dim=2, keepdim=True) for row in rows]
    distance = 1 - F.cosine_similarity(rows[0], rows[1], dim=2, eps=1e-6)
    return distance.reshape(-1, 1, *teacher.shape[2:])


def _affinities(level: Tensor) -> Tensor:
    vectors = F.normalize(level.flatten(2), dim=1)
    return torch.matmul(vectors.transpose(1, 2), vectors)
