"""Feature Compensation Pathway (FCP): gives the student back the fine detail that the embedding lost.

The paper states the purpose (detail lost in the global semantics is compensated across layers, for the student's
reconstruction); the form is ours. The skips do not correspond, as in SK-RD4AD: level l + 1 of the teacher helps the
student to rebuild level l, so that no level can be copied onto itself. What flows is decided by `nii`. Built by
`logicrd`.
"""

from torch import Tensor, nn


class Compensation(nn.Module):
    """A gated level of the teacher (B, C, h, w) to an addition for the student there (B, hidden, h, w)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)

    def forward(self, passed: Tensor, kept: Tensor | None = None) -> Tensor:
        """`kept` (B, 1, 1, 1) of 0 and 1 shuts the pathway for some pictures while training."""
        added: Tensor = self.norm(self.project(passed))
        return added if kept is None else added * kept
