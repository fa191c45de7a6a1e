"""Folds every batch norm into the convolution before it, so that a graph holds one weight and one bias a layer.

Relies on the order of registration: a norm directly follows its convolution in every module of this package and of the
teacher. Works in place on evaluation copies; called by `detector` before weights are rounded, stored or exported.
"""

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from training.errors import ConfigError


def fuse_batch_norms(module: nn.Module) -> None:
    """Replaces each (convolution, batch norm) pair among the children by (fused convolution, identity), recursively."""
    previous: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            if previous is None or not isinstance(previous[1], nn.Conv2d | nn.ConvTranspose2d):
                where = f"batch norm '{name}' of {type(module).__name__}"
                raise ConfigError(f"network: {where} does not follow a convolution; take another backbone")
            before = previous[1]
            fused = fuse_conv_bn_eval(before, child, transpose=isinstance(before, nn.ConvTranspose2d))
            setattr(module, previous[0], fused)
            # timm's norms carry the activation that follows them.
            setattr(module, name, getattr(child, "act", nn.Identity()))
        else:
            fuse_batch_norms(child)
        previous = (name, child)
