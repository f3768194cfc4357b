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
