"""How far a student's features are from the teacher's, per position and per picture.

Used by the methods (`rd`, `logicrd`, `dskd`) and by the gate in `nii`; holds no weights.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine over channels at each position: (B, C, H, W) twice to (B, 1, H, W)."""
    dot = (a * b).sum(dim=1, keepdim=True)
    norms = (a.square().sum(dim=1, keepdim=True) * b.square().sum(dim=1, keepdim=True)).sqrt()
    return 1 - dot / norms.clamp_min(1e-8)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean square of the difference over channels at each position: (B, C, H, W) twice to (B, 1, H, W)."""
    return (a - b).square().mean(dim=1, keepdim=True)


def distillation_loss(features: Sequence[Tensor], rebuilt: Sequence[Tensor]) -> Tensor:
    """Sum over levels of the batch mean of 1 - cosine of the whole flattened tensors: the official code's loss.

    The paper prints a per-position form instead, which trains measurably worse (RD4AD issue 22).
    """
    pairs = zip(features, rebuilt, strict=True)
    levels = [1 - F.cosine_similarity(f.flatten(1), d.flatten(1)).mean() for f, d in pairs]
    return torch.stack(levels).sum()
