"""Tiny pipelines of diffusers, with random weights."""

import json

import torch


def save_unet_pipeline(folder, scheduler, *, out_channels=1, time_embedding="positional", **changed):
    """A UNet2DModel [1, 8, 8] and this scheduler, some fields of whose file are changed after; its uri."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=out_channels, layers_per_block=1, block_out_channels=(8,),
        norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        time_embedding_type=time_embedding,
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return f"diffusers:{folder}"


def save_dit_pipeline(folder, scheduler, *, num_classes=10, variance=True):
    """A DiTTransformer2DModel of latents [4, 8, 8] with classes, and this scheduler; its uri."""
    import diffusers

    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8 if variance else 4, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=num_classes,
    )  # fmt: skip
    for parameter in model.parameters():  # some of which it starts at 0
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    return f"diffusers:{folder}"
