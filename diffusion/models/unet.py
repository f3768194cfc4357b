"""diffusers' UNet2DModel as a network: from a saved pipeline, or from scratch for images of any size."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from limbeck.diffusion.models.embeddings import scalar_embedding, zeroed

_COARSEST = 8
"""Levels halve an image down to this size, or as far as it is even."""
_ATTENDS = 16
"""Levels of this size and below attend."""


class DiffusersUNet2D(nn.Module):
    """diffusers' UNet2DModel, x: [B, C, H, W], time: [B]. pip install 'limbeck[diffusers]'.

    Its sinusoids take time_scale * time. The class (int64 [B], num_classes is the null label), second_time and the
    guidance scale ([B]) are embeddings that are added to the time's. learned_variance: it answers [B, 2C, H, W], the
    second half of which is left out. features: [B, num_features], the mean over the
    middle block's places.
    """

    def __init__(
        self,
        *,
        sample_shape: tuple[int, ...],
        num_classes: int | None,
        config: Mapping[str, Any],
        dropout: float = 0.0,
        time_scale: float = 1.0,
        learned_variance: bool = False,
        second_time: bool = False,
        told_guidance: bool = False,
    ) -> None:
        super().__init__()
        more = num_classes is not None or second_time or told_guidance
        config = {**config, "dropout": dropout} | ({"class_embed_type": "identity"} if more else {})
        self.unet = import_diffusers().UNet2DModel.from_config(config)
        zeroed(self.unet.conv_out)
        self.time_scale = time_scale
        self.channels = self.unet.config.out_channels // (2 if learned_variance else 1)
        self.has_second_time, self.told_guidance = second_time, told_guidance
        self.num_features = self.unet.config.block_out_channels[-1]
        width = self.unet.time_embedding.linear_2.out_features
        self.classes = None if num_classes is None else nn.Embedding(num_classes + 1, width)
        self.second_time = scalar_embedding(width) if second_time else None
        self.guidance = scalar_embedding(width) if told_guidance else None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Down, middle, up."""
        unet = self.unet
        return [*unet.down_blocks, *filter(None, [unet.mid_block]), *unet.up_blocks]

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        condition: Tensor | None,
        second_time: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        answer = self.unet(x, self.time_scale * time, self._embedded(condition, second_time, guidance)).sample
        return answer[:, : self.channels]

    def features(
        self,
        x: Tensor,
        time: Tensor,
        condition: Tensor | None,
        second_time: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        unet, more = self.unet, self._embedded(condition, second_time, guidance)
        embedding = unet.time_embedding(unet.time_proj(self.time_scale * time).to(x.dtype))
        embedding = embedding if more is None else embedding + more
        h = unet.conv_in(2 * x - 1 if unet.config.center_input_sample else x)
        for block in unet.down_blocks:
            h = block(h, embedding)[0]
        h = h if unet.mid_block is None else unet.mid_block(h, embedding)
        return h.mean(dim=(2, 3))

    def _embedded(self, condition: Tensor | None, second_time: Tensor | None, guidance: Tensor | None) -> Tensor | None:
        """The sum of the embeddings besides the time, [B, width]; None for a network of time alone."""
        inputs = ((self.classes, condition), (self.second_time, second_time), (self.guidance, guidance))
        embeddings = [embed(value) for embed, value in inputs if embed is not None]
        return sum(embeddings[1:], start=embeddings[0]) if embeddings else None


def unet_spec(sample_shape: Sequence[int], *, width: int, depth: int, time_scale: float) -> dict[str, Any]:
    """The spec, in full, of a UNet for images [C, H, W]: `width` channels at full size, twice that below.

    Each level has `depth` blocks. Levels halve the image down to 8; those of 16 and below attend. A small one of
    Dhariwal & Nichol 2021.
    """
    if len(sample_shape) != 3:
        raise ValueError(f"network unet needs images [C, H, W], the data has {list(sample_shape)}; use residual_mlp")
    channels, *size = sample_shape
    sizes = _level_sizes(size)
    attends = [max(level) <= _ATTENDS for level in sizes]
    groups = math.gcd(width, 32)
    config = {
        "sample_size": list(size),
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": [width] + [2 * width] * (len(sizes) - 1),
        "down_block_types": ["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": ["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        "layers_per_block": depth,
        "attention_head_dim": min(width, 64),
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,
        "resnet_time_scale_shift": "scale_shift",
    }
    return {"name": "diffusers_unet2d", "config": config, "time_scale": time_scale}


def _level_sizes(size: Sequence[int]) -> list[tuple[int, ...]]:
    """Sizes of the levels, from the image's on; at least two where it is even."""
    sizes = [tuple(size)]
    while all(side % 2 == 0 for side in sizes[-1]) and (len(sizes) == 1 or min(sizes[-1]) > _COARSEST):
        sizes.append(tuple(side // 2 for side in sizes[-1]))
    return sizes


def import_diffusers() -> Any:
    """The package, which only those who name such a model need."""
    try:
        import diffusers
    except ImportError as error:
        raise ValueError("a diffusers model needs its package: pip install 'limbeck[diffusers]'") from error
    return diffusers
