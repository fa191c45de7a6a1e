"""The residual block that teacher, bottleneck and student are built of, and how its weights start.

Knows nothing of pictures or methods. Used by the other modules and by `teacher`.
"""

import torch
from torch import Tensor, nn

# Levels 1, 2, 3 of a backbone at strides 4, 8, 16, each (B, C, H, W) float32.
Features = tuple[Tensor, Tensor, Tensor]


class ResidualBlock(nn.Module):
    """ResNet's basic block, (B, Cin, H, W) to (B, Cout, H/stride, W/stride); parameters named as torchvision's."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """Residual sum, then ReLU."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


def initialise(module: nn.Module) -> None:
    """Kaiming fan-out for convolutions, as the official code; norms keep their 1 and 0."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
