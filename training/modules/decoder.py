"""The student of reverse distillation: a mirrored ResNet18 that rebuilds the teacher's features from the embedding.

Strided convolutions become transposed ones of kernel 2, stride 2; no skip connections, as in the official code.
Built by `rd`; never sees the teacher's features.
"""

import torch
from torch import Tensor, nn

from training.modules.resnet import Features, ResidualBlock, initialise


class GrowingBlock(nn.Module):
    """Basic block that doubles height and width: (B, Cin, H, W) to (B, Cout, 2H, 2W)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(c_in, c_out, 2, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.upsample = nn.Sequential(nn.ConvTranspose2d(c_in, c_out, 2, 2, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """Residual sum, then ReLU."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.upsample(x))


class Decoder(nn.Module):
    """`embedding` (B, width, H/32, W/32) to d1, d2, d3, shaped as the teacher's f1, f2, f3."""

    def __init__(self, channels: tuple[int, int, int], width: int) -> None:
        super().__init__()
        c1, c2, c3 = channels
        self.stage3 = nn.Sequential(GrowingBlock(width, c3), ResidualBlock(c3, c3, 1))
        self.stage2 = nn.Sequential(GrowingBlock(c3, c2), ResidualBlock(c2, c2, 1))
        self.stage1 = nn.Sequential(GrowingBlock(c2, c1), ResidualBlock(c1, c1, 1))
        initialise(self)

    def forward(self, embedding: Tensor) -> Features:
        """Returns (d1, d2, d3)."""
        d3 = self.stage3(embedding)
        d2 = self.stage2(d3)
        return self.stage1(d2), d2, d3
