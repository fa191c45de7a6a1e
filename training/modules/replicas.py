"""Training on several processes as if on one: batch norms and running limits over the whole batch.

PyTorch's SyncBatchNorm needs CUDA; this one runs wherever its collectives do. Without a process group everything here
is the plain thing. Used by `fit` and `nii`.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


def replicas() -> int:
    """Processes that train together; 1 outside torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_replicas(values: Tensor) -> Tensor:
    """The mean over processes, not differentiable."""
    if replicas() == 1:
        return values
    summed = values.clone()
    dist.all_reduce(summed)
    return summed / replicas()


class ReplicaNorm(nn.BatchNorm2d):
    """Batch norm whose mean and variance are those of all processes' batches together, each of the same size."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        if not self.training or replicas() == 1:
            return super().forward(x)
        moments = torch.stack([x.mean(dim=(0, 2, 3)), x.square().mean(dim=(0, 2, 3))])
        mean, square = all_reduce(moments) / replicas()  # type: ignore[no-untyped-call]
        variance = (square - mean.square()).clamp_min(0)
        self._remember(mean.detach(), variance.detach(), x.numel() // x.shape[1] * replicas())
        normed = (x - mean[:, None, None]) * torch.rsqrt(variance + self.eps)[:, None, None]
        return torch.as_tensor(normed * self.weight[:, None, None] + self.bias[:, None, None])

    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        momentum = 0.1 if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * count / max(count - 1, 1), momentum)
        self.num_batches_tracked += 1


def norms_over_replicas(module: nn.Module) -> None:
    """Replaces the batch norms of `module` in place by ones over all processes, weights kept."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            norm = ReplicaNorm(child.num_features, child.eps, child.momentum)
            # The same tensors, not copies of them: an optimiser holds them already.
            norm.weight, norm.bias = child.weight, child.bias
            norm.running_mean, norm.running_var = child.running_mean, child.running_var
            norm.num_batches_tracked = child.num_batches_tracked
            setattr(module, name, norm)
        else:
            norms_over_replicas(child)
