"""Per-channel standardisation of the teacher's levels by the normals of one product, and the way back.

After ReLU all features lie in one orthant and a cosine hardly moves; with mean 0 and deviation 1 on normals every
channel has a say (EfficientAD normalises its teacher for the same reason). That is good to learn by and bad to measure
by: a standardised vector is short where the ground is plain, and the angle of a short vector is noise. So the map
compares what the student rebuilt in the teacher's own features. Used by the stages of `logicrd`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Channels that hardly move on the normals (dead ReLUs) get this share of the level's median deviation as their own.
DEVIATION_FLOOR = 0.05


class Standardise(nn.Module):
    """(B, C, h, w) to (x - mean) * scale, both (1, C, 1, 1) and frozen. Starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(1, channels, 1, 1), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1), requires_grad=False)

    def set_normals(self, mean: Tensor, deviation: Tensor) -> None:
        """Takes mean and deviation (C,) of the normals, over pictures and positions."""
        floor = (DEVIATION_FLOOR * deviation.median()).clamp_min(1e-6)
        self.mean.data.copy_(mean.view(1, -1, 1, 1))
        self.scale.data.copy_(1 / torch.maximum(deviation, floor).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return (x - self.mean) * self.scale


class Restore(nn.Module):
    """(B, C, h, w) to slope * x + offset, both (1, C, 1, 1) and frozen: a rebuilt level as the teacher would give it.

    The loss is a cosine, so how large the student rebuilds a level is left open; this settles it. Starts as the
    identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(1, channels, 1, 1), requires_grad=False)
        self.offset = nn.Parameter(torch.zeros(1, channels, 1, 1), requires_grad=False)

    def settle(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Least squares of each channel over batches of (rebuilt, teacher's) levels (B, C, h, w) of held-out normals.

        A channel that the student does not follow gets slope 0 and the teacher's mean.
        """
        sums, count = torch.zeros(4, self.slope.numel(), dtype=torch.float64), 0
        for rebuilt, level in pairs:
            x, y = (values.transpose(0, 1).flatten(1).double() for values in (rebuilt, level))
            sums = sums + torch.stack([x.sum(1), y.sum(1), (x * x).sum(1), (x * y).sum(1)])
            count += x.shape[1]
        mean_x, mean_y, square_x, product = sums / count
        variance = (square_x - mean_x.square()).clamp_min(0)
        floor = (DEVIATION_FLOOR * variance.sqrt().median()).square().clamp_min(1e-12)
        slope = (product - mean_x * mean_y) / torch.maximum(variance, floor)
        self.slope.data.copy_(slope.float().view(1, -1, 1, 1))
        self.offset.data.copy_((mean_y - slope * mean_x).float().view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return self.slope * x + self.offset
