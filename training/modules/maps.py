"""From level-wise distances to the served anomaly map and its score: upsampling, smoothing, summing.

Smoothing is two products with a fixed matrix: exact at the borders, and the graph needs no padding operator. Used as
the last stage by every method.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.modules.distances import cosine_distance

# Sigma 4 of the official code at 256 pixels is 1 at 64; four sigmas each side, as scipy truncates.
SMOOTHING_SIGMA = 1.0
SMOOTHING_RADIUS = 4


class Smoothing(nn.Module):
    """Level-wise maps of any size, the first of them (side, side), upsampled to that and smoothed."""

    matrix: Tensor

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.register_buffer("matrix", smoothing_matrix(side), persistent=False)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Any number of maps a level, (B, n, h, w) each, to (B, maps, side, side)."""
        size = (self.side, self.side)
        grown = [F.interpolate(level, size=size, mode="bilinear", align_corners=False) for level in levels[1:]]
        return torch.matmul(torch.matmul(self.matrix, torch.cat([levels[0], *grown], dim=1)), self.matrix.t())


class SummedMap(nn.Module):
    """Teacher's and student's levels to `anomaly_map` (B, side, side) and `map_score` (B, 1), its maximum.

    Follows the official code of reverse distillation, but for the map's size (64 x 64 at 256).
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.smoothing = Smoothing(side)

    def forward(self, f1: Tensor, f2: Tensor, f3: Tensor, d1: Tensor, d2: Tensor, d3: Tensor) -> tuple[Tensor, Tensor]:
        """Range 0 to 6 in theory, 0 to 3 after ReLU features; never clamped."""
        levels = [cosine_distance(f, d) for f, d in ((f1, d1), (f2, d2), (f3, d3))]
        smooth = self.smoothing(levels).sum(dim=1)
        return smooth, smooth.amax(dim=(1, 2)).unsqueeze(1)


class NormedMap(nn.Module):
    """Several maps, each brought to mean 0 and deviation 1 on held-out normals, then summed; nothing is clamped.

    A plain sum listens to its noisiest level. The score is the mean of the `share` highest positions: less moved by one
    position than the maximum. Starts with offset 0 and gain 1; `set_normals` fits both.
    """

    def __init__(self, side: int, maps: int, share: float = 0.01) -> None:
        super().__init__()
        self.smoothing = Smoothing(side)
        self.highest = max(1, round(share * side * side))
        self.offset = nn.Parameter(torch.zeros(maps), requires_grad=False)
        self.gain = nn.Parameter(torch.ones(maps), requires_grad=False)

    def set_normals(self, mean: Tensor, deviation: Tensor) -> None:
        """Takes mean and deviation (maps,) of the smoothed maps of held-out normals."""
        self.offset.data.copy_(mean)
        self.gain.data.copy_(1 / deviation.clamp_min(1e-4))

    def settle(self, distances: Iterable[list[Tensor]]) -> None:
        """Fits the norms from batches of maps of held-out normals, each list as `forward` takes it."""
        total, squares, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
        for levels in distances:
            maps = self.smoothing(levels).double()
            total = total + maps.sum(dim=(0, 2, 3))
            squares = squares + maps.square().sum(dim=(0, 2, 3))
            count += maps[:, 0].numel()
        mean = total / count
        self.set_normals(mean.float(), (squares / count - mean.square()).clamp_min(0).sqrt().float())

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns anomaly_map (B, side, side) and map_score (B, 1)."""
        normed = (self.smoothing(levels) - self.offset[:, None, None]) * self.gain[:, None, None]
        anomaly_map = normed.sum(dim=1)
        highest = anomaly_map.flatten(1).topk(self.highest, dim=1).values
        return anomaly_map, highest.mean(dim=1, keepdim=True)


def smoothing_matrix(side: int) -> Tensor:
    """(side, side) matrix S such that S x is x convolved with the Gaussian along its rows, mirrored at the borders."""
    matrix = torch.zeros(side, side, dtype=torch.float64)
    for row in range(side):
        for offset in range(-SMOOTHING_RADIUS, SMOOTHING_RADIUS + 1):
            column = abs(row + offset)
            column = min(column, 2 * (side - 1) - column)
            matrix[row, column] += math.exp(-0.5 * (offset / SMOOTHING_SIGMA) ** 2)
    return (matrix / matrix.sum(dim=1, keepdim=True)).float()
