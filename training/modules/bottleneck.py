"""One-class bottleneck of reverse distillation: multi-scale fusion (MFF), then the one-class embedding (OCE).

Follows the official code (hq-deng/RD4AD) less its two unused layers. Width 512 is the published size for ResNet18.
Also gives the descriptor that the Mahalanobis branch measures. Built by `rd`; never sees pictures, only features.
"""

import torch
from torch import Tensor, nn

from training.modules.resnet import ResidualBlock, initialise

# Keeps the deviation of a channel that does not move apart from nothing; far below any that does.
EPSILON = 1e-6


class Bottleneck(nn.Module):
    """f1, f2, f3 of widths (c1, c2, c3) at strides 4, 8, 16 to `embedding` (B, width, H/32, W/32) and `descriptor`."""

    def __init__(self, channels: tuple[int, int, int], width: int) -> None:
        super().__init__()
        c1, c2, c3 = channels
        self.fuse1a, self.norm1a = _halving(c1, c2)
        self.fuse1b, self.norm1b = _halving(c2, c3)
        self.fuse2, self.norm2 = _halving(c2, c3)
        self.embed = nn.Sequential(ResidualBlock(3 * c3, width, 2), ResidualBlock(width, width, 1))
        initialise(self)

    def forward(self, f1: Tensor, f2: Tensor, f3: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (embedding, descriptor); no trained weight stands in the descriptor's way, see `describe`."""
        return self.embedding(f1, f2, f3), describe(f1, f2, f3)

    def embedding(self, f1: Tensor, f2: Tensor, f3: Tensor) -> Tensor:
        """The embedding alone, for a stage that describes the picture in another way."""
        g1 = torch.relu(self.norm1a(self.fuse1a(f1)))
        g1 = torch.relu(self.norm1b(self.fuse1b(g1)))
        g2 = torch.relu(self.norm2(self.fuse2(f2)))
        embedding: Tensor = self.embed(torch.cat([g1, g2, f3], dim=1))
        return embedding


def describe(*levels: Tensor) -> Tensor:
    """Mean, then deviation, of each channel over all positions: (B, C, h, w) each to (B, twice the sum of C).

    What a picture holds, wherever it lies: the mean says how much of it, the deviation in how many pieces and how sure.
    """
    means = [level.mean(dim=(2, 3), keepdim=True) for level in levels]
    variances = [(level - mean).square().mean(dim=(2, 3)) for level, mean in zip(levels, means, strict=True)]
    return torch.cat([mean.flatten(1) for mean in means] + [(v + EPSILON).sqrt() for v in variances], dim=1)


def _halving(c_in: int, c_out: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return nn.Conv2d(c_in, c_out, 3, 2, 1, bias=False), nn.BatchNorm2d(c_out)
