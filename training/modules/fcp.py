"""Feature Compensation Pathway (FCP): gives the student back the fine detail that the embedding lost.

The paper states the purpose (detail lost in the global semantics is compensated across layers, for the student's
reconstruction); the form is ours. The skips do not correspond, as in SK-RD4AD: level l + 1 of the teacher helps the
student to rebuild level l, so that no level can be copied onto itself. What flows is decided by `nii`. Built by
`logicrd`.
"""

import torch
from torch import Tensor, nn


class Compensation(nn.Module):
    """A gated level of the teacher (B, C, h, w) to an addition for the student at that level, same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, passed: Tensor, kept: Tensor | None = None) -> Tensor:
        """`kept` (B, 1, 1, 1) of 0 and 1 shuts the pathway for some pictures while training."""
        added = self.norm(self.project(passed))
        return torch.as_tensor(added if kept is None else added * kept)
