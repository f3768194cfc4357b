"""diffusers' models by their class: how each is called, and what its configuration says of classes.

A model family is a row of FAMILIES. Everything else (solve, objectives, parity) speaks x_0 and knows none by name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn

from limbeck.diffusion.models.unet import import_diffusers

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One class of models.

    component: its folder in a pipeline. num_classes: the classes of a configuration, whose number is the null label;
    None for a model without; ValueError for labels that can't be taken. call: (model, x [B, C, ...], time [B],
    label int64 [B] or None) -> its answer [B, C or 2C, ...]. has_variance: whether the answer's second half is a
    variance whatever the scheduler says. blocks: what runs again for the gradient under activation checkpointing.
    """

    component: str
    num_classes: Callable[[Config], int | None]
    call: Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]
    has_variance: Callable[[Config], bool]
    blocks: Callable[[Any], Sequence[nn.Module]]


def _no_labels(config: Config) -> None:
    if config["num_class_embeds"] or config["class_embed_type"]:
        raise ValueError("takes class labels, and does not say which one is null: wrap it by python:MODULE:FACTORY")


def _call_unet2d(model: nn.Module, x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
    answer: Tensor = model(x, time).sample
    return answer


def _call_dit(model: nn.Module, x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
    answer: Tensor = model(x, timestep=time, class_labels=label).sample
    return answer


FAMILIES: Mapping[str, Family] = {
    "UNet2DModel": Family(
        component="unet",
        num_classes=_no_labels,
        call=_call_unet2d,
        has_variance=lambda config: False,
        blocks=lambda model: [*model.down_blocks, *filter(None, [model.mid_block]), *model.up_blocks],
    ),
    # Latents of images, labels 0 .. num_embeds_ada_norm - 1. Peebles & Xie 2023.
    "DiTTransformer2DModel": Family(
        component="transformer",
        num_classes=lambda config: int(config["num_embeds_ada_norm"]),
        call=_call_dit,
        has_variance=lambda config: bool(config["out_channels"] == 2 * config["in_channels"]),
        blocks=lambda model: model.transformer_blocks,
    ),
}


class DiffusersModel(nn.Module):
    """A model of diffusers, x: [B, *sample_shape], time: [B], condition: int64 [B]. pip install 'limbeck[diffusers]'.

    It is shown time_scale * time. learned_variance: its answer's second half, along channels, is left out. It takes
    neither a second time nor a guidance scale.
    """

    def __init__(
        self,
        *,
        sample_shape: tuple[int, ...],
        num_classes: int | None,
        model: str,
        config: Config,
        dropout: float = 0.0,
        time_scale: float = 1.0,
        learned_variance: bool = False,
    ) -> None:
        super().__init__()
        if model not in FAMILIES:
            raise ValueError(f"model {model!r} of diffusers is not known here; use one of {', '.join(FAMILIES)}")
        self.family = FAMILIES[model]
        if dropout and "dropout" not in config:
            raise ValueError(f"model {model} of diffusers has no dropout: leave network.dropout out")
        known = {"dropout": dropout} if "dropout" in config else {}
        self.model = getattr(import_diffusers(), model).from_config({**config, **known})
        for module in self.model.modules():
            if hasattr(module, "dropout_prob"):  # of labels, at random in every training step
                module.dropout_prob = 0.0
        self.channels = sample_shape[0]
        self.time_scale = time_scale
        if learned_variance != (self.model.config.out_channels == 2 * self.channels):
            raise ValueError(f"model {model} answers {self.model.config.out_channels} channels to {self.channels}")

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """In the order in which they run."""
        return self.family.blocks(self.model)

    @property
    def num_features(self) -> NoReturn:
        raise ValueError(f"{type(self.model).__name__} shows a discriminator no features: leave objective.gan out")

    def forward(self, x: Tensor, time: Tensor, condition: Tensor | None) -> Tensor:
        return self.family.call(self.model, x, self.time_scale * time, condition)[:, : self.channels]
