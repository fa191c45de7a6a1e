"""LogicRD: reverse distillation with global semantics, gated compensation and standardised levels.

After "LogicRD" (Yang et al., JOCA 2025, 10.11772/j.issn.1001-9081.2025020229), of which only the abstract is public:
what its modules are for is the paper's; every shape, loss and constant is ours. Each module can be switched off; with
all off this is reverse distillation that learns on standardised levels and measures both angle and size of what it
missed. Built by `methods`; holds no optimiser.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from training.modules.bottleneck import Bottleneck, describe
from training.modules.decoder import Decoder
from training.modules.distances import cosine_distance, distillation_loss, squared_distance
from training.modules.fcp import Compensation
from training.modules.gse import GlobalSemantics
from training.modules.maps import NormedMap
from training.modules.nii import Inhibition
from training.modules.resnet import Features
from training.modules.standard import Restore, Standardise
from training.stages import LEVELS, FeatureSource, Parameters, Wiring, rebuild
from training.teacher import AnyTeacher

# Weight of the loss that has GSE's field at level 3 say what the teacher sees there: worth 2 points of logical AUROC of
# the map on three development products. The field is no map of its own: as one it cost structural AUROC.
GLOBAL_LOSS = 0.5
# What the student gives, level by level.
REBUILT = ("d1", "d2", "d3")
# How often the compensation pathway is shut for a picture while training, so that the student can do without it.
PATHWAY_DROPOUT = 0.1
# Channels inside the student, as a share of the teacher's: 0.75 was no better on development data, and a tenth slower.
HIDDEN_SHARE = 0.5
# Directions of the normal subspace at levels 2 and 3, as a share of the channels.
SUBSPACE_SHARE = 0.5
# Positions of validation normals that the gates' limits are read from, at most.
MAX_POSITIONS = 1_000_000
LIMIT_QUANTILES = (0.5, 0.99)
SETTLE_BATCH = 16


@dataclass(frozen=True, slots=True)
class Switches:
    """Which modules take part; the gate needs the pathway."""

    gse: bool = True
    fcp: bool = True
    nii: bool = True


class Semantics(nn.Module):
    """Stage `bottleneck`: levels to `embedding`, the global fields where GSE is on, and `descriptor`."""

    def __init__(self, channels: tuple[int, int, int], width: int, image_size: int, switches: Switches) -> None:
        super().__init__()
        self.standard = nn.ModuleList(Standardise(c) for c in channels)
        self.bottleneck = Bottleneck(channels, width)
        fields = (*hidden_channels(channels)[1:], width)
        self.gse = GlobalSemantics(channels, fields, image_size) if switches.gse else None

    def forward(self, f1: Tensor, f2: Tensor, f3: Tensor) -> tuple[Tensor, ...]:
        """(embedding, descriptor), or with GSE (embedding, g2, g3, descriptor)."""
        s1, s2, s3 = (standard(f) for standard, f in zip(self.standard, (f1, f2, f3), strict=True))
        embedding = self.bottleneck.embedding(s1, s2, s3)
        if self.gse is None:
            return embedding, describe(s1, s2, s3)
        g4, g3, g2, _ = self.gse(s1, s2, s3)
        return embedding + g4, g2, g3, describe(s1, s2, s3)


class Student(nn.Module):
    """Stage `student`: rebuilds the standardised levels from the embedding, the global fields and the gated skips.

    Level l never sees level l of the teacher, only level l + 1 through the gate; d3 sees no skip at all.
    """

    def __init__(self, channels: tuple[int, int, int], width: int, switches: Switches, takes: tuple[str, ...]) -> None:
        super().__init__()
        self.takes = takes
        hidden = hidden_channels(channels)
        self.decoder = Decoder(hidden, width)
        self.heads = nn.ModuleList(nn.Conv2d(h, c, 1) for h, c in zip(hidden, channels, strict=True))
        self.skip2 = Skip(channels[1], hidden[1], gated=switches.nii) if switches.fcp else None
        self.skip3 = Skip(channels[2], hidden[2], gated=switches.nii) if switches.fcp else None

    def forward(self, *tensors: Tensor) -> Features:
        """Takes the tensors named in `takes`, returns (d1, d2, d3)."""
        given = dict(zip(self.takes, tensors, strict=True))
        hidden = self.decoder.stage3(given["embedding"])
        d3 = self.heads[2](hidden)
        hidden = self.decoder.stage2(self._enhanced(hidden, d3, given.get("g3"), given.get("f3"), self.skip3))
        d2 = self.heads[1](hidden)
        hidden = self.decoder.stage1(self._enhanced(hidden, d2, given.get("g2"), given.get("f2"), self.skip2))
        return self.heads[0](hidden), d2, d3

    @staticmethod
    def _enhanced(
        hidden: Tensor, rebuilt: Tensor, field: Tensor | None, level: Tensor | None, skip: "Skip | None"
    ) -> Tensor:
        hidden = hidden if field is None else hidden + field
        return hidden if skip is None or level is None else hidden + skip(level, rebuilt)


class Skip(nn.Module):
    """A compensation pathway with its gate: teacher's and student's level to an addition of `hidden` channels."""

    def __init__(self, channels: int, hidden: int, *, gated: bool) -> None:
        super().__init__()
        self.standard = Standardise(channels)
        self.gate = Inhibition(channels, round(SUBSPACE_SHARE * channels)) if gated else None
        self.compensation = Compensation(channels, hidden)

    def forward(self, level: Tensor, rebuilt: Tensor) -> Tensor:
        """(B, C, h, w) twice to (B, hidden, h, w)."""
        passed = self.standard(level)
        if self.gate is not None:
            passed = self.gate(passed, rebuilt)
        kept = None
        if self.training:
            kept = (torch.rand(len(level), 1, 1, 1, device=level.device) >= PATHWAY_DROPOUT).to(level.dtype)
        added: Tensor = self.compensation(passed, kept)
        return added


class Comparison(nn.Module):
    """Stage `map`: each level's cosine and squared distance to what the student rebuilt, in the teacher's own features.

    The cosine sees what is unlike, however faint; the square sees how much is missing or too much, and where nothing
    stands it is quiet.
    """

    def __init__(self, channels: tuple[int, int, int], image_size: int) -> None:
        super().__init__()
        self.restore = nn.ModuleList(Restore(c) for c in channels)
        self.normed = NormedMap(image_size // 4, maps=2 * len(channels))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """f1, f2, f3, d1, d2, d3 to anomaly_map (B, side, side) and map_score (B, 1)."""
        anomaly_map, map_score = self.normed(self.distances(*tensors))
        return anomaly_map, map_score

    def distances(self, *tensors: Tensor) -> list[Tensor]:
        """Both maps of each level (B, 2, h, w) at the sizes of the levels."""
        rebuilt = [restore(d) for restore, d in zip(self.restore, tensors[3:], strict=True)]
        pairs = zip(tensors[:3], rebuilt, strict=True)
        return [torch.cat([cosine_distance(f, d), squared_distance(f, d)], dim=1) for f, d in pairs]


class LogicRD(nn.Module):
    """The four served stages: `teacher` frozen, `bottleneck` and `student` trained, `map` fitted after training."""

    def __init__(self, teacher: AnyTeacher, width: int, image_size: int, switches: Switches) -> None:
        super().__init__()
        self.switches = switches
        self.wiring = wiring_of(switches)
        channels = teacher.channels
        self.teacher = teacher.requires_grad_(False)
        self.bottleneck = Semantics(channels, width, image_size, switches)
        self.student = Student(channels, width, switches, self.wiring["student"][0])
        self.map = Comparison(channels, image_size)
        # For training alone: no stage uses it.
        self.expect = nn.Conv2d(hidden_channels(channels)[2], channels[2], 1) if switches.gse else None

    def prepare(self, normals: FeatureSource) -> None:
        """Fits standardisation and normal subspaces on the training normals."""
        for index, moments in enumerate(_moments(normals)):
            mean, second = moments
            variance = (second.diagonal() - mean.square()).clamp_min(0)
            skip = (None, self.student.skip2, self.student.skip3)[index]
            standards = [cast(Standardise, self.bottleneck.standard[index])] + ([] if skip is None else [skip.standard])
            for standard in standards:
                standard.set_normals(mean.float(), variance.sqrt().float())
            if skip is not None and skip.gate is not None:
                scale = standards[0].scale.double().flatten()
                skip.gate.set_subspace((second - torch.outer(mean, mean)) * torch.outer(scale, scale))

    def parameters_by_rate(self) -> Parameters:
        """Attention learns at its own rate: the convolutions' rate upsets it."""
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        slow = [p for name, p in trained if name.startswith("bottleneck.gse.")]
        return {"full": [p for name, p in trained if not name.startswith("bottleneck.gse.")], "attention": slow}

    def loss(self, features: Features) -> Tensor:
        """Distillation loss on standardised levels, with GSE that of its field too: a scalar from 0 (equal) to 7."""
        known = rebuild(self, self.wiring, features)
        levels = [standard(f) for standard, f in zip(self.bottleneck.standard, features, strict=True)]
        loss = distillation_loss(levels, [known[name] for name in REBUILT])
        if self.expect is not None:
            loss = loss + GLOBAL_LOSS * distillation_loss([levels[2]], [self.expect(known["g3"])])
        return loss

    @torch.no_grad()
    def settle(self, normals: FeatureSource) -> None:
        """Fits on held-out normals the gates' limits, then the way back to the teacher's features, then the norms.

        In this order: each decides what the next sees.
        """
        if self.switches.nii:
            self._settle_gates(normals)
        for restore, level, rebuilt in zip(self.map.restore, LEVELS, REBUILT, strict=True):
            cast(Restore, restore).settle((known[rebuilt], known[level]) for known in self._walk(normals))
        taken = self.wiring["map"][0]
        self.map.normed.settle(self.map.distances(*(known[n] for n in taken)) for known in self._walk(normals))

    def _settle_gates(self, normals: FeatureSource) -> None:
        # Deep gates first: what they let pass decides what the shallower level rebuilds.
        for skip, level, rebuilt in ((self.student.skip3, "f3", "d3"), (self.student.skip2, "f2", "d2")):
            if skip is None or skip.gate is None:
                continue
            measures: list[list[Tensor]] = [[], []]
            for known in self._walk(normals):
                _, residual, agreement = skip.gate.measure(skip.standard(known[level]), known[rebuilt])
                measures[0].append(residual.flatten())
                measures[1].append(agreement.flatten())
            limits = [_limits(torch.cat(seen)) for seen in measures]
            skip.gate.set_limits(*limits)

    def _walk(self, normals: FeatureSource) -> Iterator[dict[str, Tensor]]:
        for features in normals.features(SETTLE_BATCH):
            with torch.inference_mode():
                known = rebuild(self, self.wiring, features)
            yield known


def hidden_channels(channels: tuple[int, int, int]) -> tuple[int, int, int]:
    """Widths inside the student: narrower than the teacher's levels, which heads widen again. Cheaper, and no copy."""
    c1, c2, c3 = (round(HIDDEN_SHARE * c) for c in channels)
    return c1, c2, c3


def wiring_of(switches: Switches) -> Wiring:
    """The stages' tensors; those of a module that is off do not exist."""
    fields = ("g2", "g3") if switches.gse else ()
    skips = ("f2", "f3") if switches.fcp else ()
    return {
        "teacher": (("image",), LEVELS),
        "bottleneck": (LEVELS, ("embedding", *fields, "descriptor")),
        "student": (("embedding", *fields, *skips), REBUILT),
        "map": ((*LEVELS, *REBUILT), ("anomaly_map", "map_score")),
    }


def _moments(normals: FeatureSource) -> list[tuple[Tensor, Tensor]]:
    """Mean (C,) and mean outer product (C, C) of each level over all pictures and positions, in float64."""
    sums: list[tuple[Tensor, Tensor]] = []
    counts = [0, 0, 0]
    for features in normals.features(SETTLE_BATCH):
        for index, level in enumerate(features):
            vectors = level.transpose(0, 1).flatten(1)
            counts[index] += vectors.shape[1]
            found = (vectors.sum(dim=1).double(), (vectors @ vectors.t()).double())
            if index == len(sums):
                sums.append(found)
            else:
                sums[index] = (sums[index][0] + found[0], sums[index][1] + found[1])
    return [(total / count, outer / count) for (total, outer), count in zip(sums, counts, strict=True)]


def _limits(values: Tensor) -> tuple[float, float]:
    step = max(1, len(values) // MAX_POSITIONS)
    low, high = np.quantile(values[::step].numpy(), LIMIT_QUANTILES)
    return float(low), float(high)
