"""Gradient checkpointing: memory for time."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from limbeck.diffusion.models.families import DiffusersModel
from limbeck.diffusion.models.networks import ResidualMLP
from limbeck.diffusion.models.unet import DiffusersUNet2D


def checkpoint_activations(module: nn.Module) -> None:
    """Have every block of the networks in `module` keep its inputs alone, and run again for the gradient.

    Same weights, names and gradients: dropout draws the same numbers again. One forward pass more a step. A network
    without blocks stays as it is. Chen et al. 2016.
    """
    for network in module.modules():
        if isinstance(network, ResidualMLP | DiffusersUNet2D | DiffusersModel):
            for block in network.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
