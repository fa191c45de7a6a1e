"""Per-channel standardisation of the teacher's levels by the normals of one product.

After ReLU all features lie in one orthant and a cosine hardly moves; with mean 0 and deviation 1 on normals every
channel has a say (EfficientAD normalises its teacher for the same reason). Fitted once before training, then frozen.
Used by the stages of `logicrd`.
"""

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
