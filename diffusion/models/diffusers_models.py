"""A saved diffusers pipeline as a checkpoint of ours: its UNet2DModel, its betas, what it predicts."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from limbeck.diffusion.models.checkpoint import Checkpoint, pack
from limbeck.diffusion.models.schedulers import check_class, check_fields
from limbeck.diffusion.models.spec import model_from_spec, process_spec
from limbeck.diffusion.models.unet import import_diffusers
from limbeck.diffusion.process import DiscreteVP

_PATIENCE = 5.0
"""Seconds for the hub's first answer."""


def pipeline_checkpoint(source: str, *, ignore: Collection[str] = ()) -> Checkpoint:
    """The UNet2DModel and the scheduler of a pipeline, in a folder or under a hub id, with `unet` and `scheduler`.

    The process is DiscreteVP over the scheduler's betas, the prediction its prediction_type. Raises ValueError for
    another kind of pipeline, for a scheduler that schedulers.py doesn't know as such but for fields to ignore, and for
    class labels: a UNet2DModel does not say which label is null. A folder is never looked for on a network, and a hub
    that can't be asked is asked once. Weights are safetensors, or refused.
    """
    diffusers = import_diffusers()
    unasked = "" if Path(source).is_dir() else _unasked(source)
    offline = {"local_files_only": unasked is not None}
    try:
        unet = diffusers.UNet2DModel.from_pretrained(
            source, subfolder="unet", low_cpu_mem_usage=False, use_safetensors=True, **offline
        )
        written = diffusers.DDPMScheduler.load_config(source, subfolder="scheduler", **offline)
    except (OSError, ValueError, TypeError) as error:
        if unasked:
            problem = f"diffusers:{source} is no folder, not among what was fetched before, and the hub can't be asked"
            raise ValueError(f"{problem} ({unasked}): name a folder, or mend the network") from error
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"diffusers:{source} is no pipeline of a UNet2DModel and a scheduler ({reason})") from error
    scheduler = _table_of_betas(source, written, ignore)
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    if config["in_channels"] != config["out_channels"]:
        problem = f"diffusers:{source} answers {config['out_channels']} channels to {config['in_channels']}"
        raise ValueError(f"{problem}, as with a learned variance: wrap it by python:MODULE:FACTORY")
    if config["num_class_embeds"] or config["class_embed_type"]:
        raise ValueError(f"diffusers:{source} takes class labels: wrap it by python:MODULE:FACTORY")
    size = config["sample_size"]
    spec = {
        "kind": "network",
        "sample_shape": [config["in_channels"], *([size, size] if isinstance(size, int) else size)],
        "num_classes": None,
        "process": process_spec(DiscreteVP(tuple(scheduler.betas.double().tolist()))),
        "prediction": {"name": scheduler.config.prediction_type},
        "network": {"name": "diffusers_unet2d", "config": config, "dropout": config["dropout"]},
    }
    spec = json.loads(json.dumps(spec))
    denoiser = model_from_spec(spec)
    denoiser.get_submodule("network.unet").load_state_dict(unet.state_dict())
    return Checkpoint(spec, pack(denoiser), about={"source": source})


def _table_of_betas(source: str, written: dict[str, Any], ignore: Collection[str]) -> Any:
    """The scheduler, of its own class: another one's defaults may be other betas."""
    name = str(written.get("_class_name", ""))
    try:
        check_class(name)
        scheduler = getattr(import_diffusers(), name).from_config(written)
        check_fields({**written, **scheduler.config}, ignore=ignore)
    except (ValueError, ImportError, TypeError, NotImplementedError) as error:
        raise ValueError(f"diffusers:{source}: {' '.join(str(error).split())}") from error
    return scheduler


def _unasked(source: str) -> str | None:
    """Why the hub can't be asked for a name, None where it answers: one request, without the client's many tries."""
    from huggingface_hub import model_info

    try:
        model_info(source, timeout=_PATIENCE)
    except Exception as error:  # of the client's own, of its transport's, of the name's form
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return None
