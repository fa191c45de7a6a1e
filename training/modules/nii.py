"""Normal Information Inhibition (NII): the gate that keeps anomalies from leaking through the compensation pathway.

The paper states the purpose alone: to remove the leakage risk that the pathway opens. Our form has three parts, all
fitted on normals: a projection onto the subspace of normal features (what lies outside cannot pass at all), a gate on
the residual of that projection (unknown patches), and a gate on the agreement of teacher and student (normal patches
where the global semantics expect something else: the logical anomaly). Built by `logicrd`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.modules.distances import cosine_distance
from training.modules.replicas import mean_over_replicas

# How open the residual gate is for the median position of normals: logit(0.98).
MEDIAN_LOGIT = 3.89
# Share of the limits seen in one training batch that moves the running ones.
MOMENTUM = 0.05
MIN_SPREAD = 1e-3


class Inhibition(nn.Module):
    """Teacher's level and the student's rebuilt level, standardised (B, C, h, w) each, to what may pass, same shape.

    `directions` (rank, C, 1, 1) spans the normal subspace. `residual` holds the median and the upper limit of the share
    of energy outside it, `agreement` the median and the upper limit of the cosine distance of teacher and student; both
    run along while training and are refitted on held-out normals by `set_limits`.
    """

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.directions = nn.Parameter(torch.zeros(rank, channels, 1, 1), requires_grad=False)
        self.residual = nn.Parameter(torch.tensor([0.1, 0.9]), requires_grad=False)
        self.agreement = nn.Parameter(torch.tensor([0.9, 1.1]), requires_grad=False)

    def set_subspace(self, second_moment: Tensor) -> None:
        """Takes the mean outer product (C, C) of standardised normal features and keeps its leading directions."""
        _, vectors = torch.linalg.eigh(second_moment.double())
        rank = self.directions.shape[0]
        self.directions.data.copy_(vectors.flip(1)[:, :rank].t()[:, :, None, None])

    def set_limits(self, residual: tuple[float, float], agreement: tuple[float, float]) -> None:
        """Takes (median, upper limit) of both measures on held-out normals."""
        self.residual.data.copy_(torch.tensor(residual))
        self.agreement.data.copy_(torch.tensor(agreement))

    def forward(self, teacher: Tensor, student: Tensor) -> Tensor:
        """The part of the normal subspace, times how open both gates are; no gradient runs through the gates."""
        normal, residual, agreement = self.measure(teacher, student.detach())
        if self.training:
            self._run_along(residual, agreement)
        return normal * self.opening(residual, agreement)

    def measure(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projected features (B, C, h, w), residual share and cosine distance (B, 1, h, w) each."""
        code = F.conv2d(teacher, self.directions)
        energy = teacher.square().sum(dim=1, keepdim=True).clamp_min(1e-8)
        residual = 1 - code.square().sum(dim=1, keepdim=True) / energy
        return F.conv_transpose2d(code, self.directions), residual, cosine_distance(teacher, student)

    def opening(self, residual: Tensor, agreement: Tensor) -> Tensor:
        """How much may pass at each position, 0 to 1."""
        middle, limit = self.residual[0], self.residual[1]
        known = torch.sigmoid(MEDIAN_LOGIT * (limit - residual) / (limit - middle).clamp_min(MIN_SPREAD))
        middle, limit = self.agreement[0], self.agreement[1]
        agreed = ((limit - agreement) / (limit - middle).clamp_min(MIN_SPREAD)).clamp(0, 1)
        return known * agreed

    @torch.no_grad()
    def _run_along(self, residual: Tensor, agreement: Tensor) -> None:
        for running, seen in ((self.residual, residual), (self.agreement, agreement)):
            values, _ = seen.flatten().sort()
            limits = torch.stack([values[len(values) // 2], values[int(0.99 * (len(values) - 1))]])
            running.data.lerp_(mean_over_replicas(limits.to(running.dtype)), MOMENTUM)
