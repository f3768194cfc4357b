"""A saved diffusers pipeline as a checkpoint of ours: its model, and what its scheduler says of that."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.diffusion.models.checkpoint import Checkpoint, pack
from limbeck.diffusion.models.families import FAMILIES, Family
from limbeck.diffusion.models.schedulers import Described, check_class, describe
from limbeck.diffusion.models.spec import model_from_spec, process_spec
from limbeck.diffusion.models.unet import import_diffusers

_PATIENCE = 5.0
"""Seconds for the hub's first answer."""


@dataclass(frozen=True)
class Pipeline:
    """A saved pipeline's model and scheduler. written: the scheduler's file; described: what that means."""

    source: str
    family: Family
    network: Any
    scheduler: Any
    written: Mapping[str, Any]
    described: Described

    def scheduler_of(self, name: str, config: Mapping[str, Any]) -> Any:
        """Another of diffusers' schedulers with this configuration."""
        return getattr(import_diffusers(), name).from_config(dict(config))


def open_pipeline(source: str, *, ignore: Collection[str] = ()) -> Pipeline:
    """The pipeline in a folder or under a hub id, with a model of FAMILIES and a scheduler.

    Raises ValueError for another kind of pipeline, and for a scheduler that schedulers.py doesn't know but for fields
    to ignore. A folder is never looked for on a network, and a hub that can't be asked is asked once. Weights are
    safetensors, or refused.
    """
    diffusers = import_diffusers()
    unasked = "" if Path(source).is_dir() else _unasked(source)
    offline = {"local_files_only": unasked is not None}
    try:
        name = _model_class(source, offline)
        family = FAMILIES[name]
        network = getattr(diffusers, name).from_pretrained(
            source, subfolder=family.component, low_cpu_mem_usage=False, use_safetensors=True, **offline
        )
        written = diffusers.DDPMScheduler.load_config(source, subfolder="scheduler", **offline)
    except (OSError, ValueError, TypeError) as error:
        if unasked:
            problem = f"diffusers:{source} is no folder, not among what was fetched before, and the hub can't be asked"
            raise ValueError(f"{problem} ({unasked}): name a folder, or mend the network") from error
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"diffusers:{source} is no pipeline of a known model and a scheduler ({reason})") from error
    name = str(written.get("_class_name", ""))
    try:
        check_class(name)
        scheduler = getattr(diffusers, name).from_config(written)  # of its own class: another's defaults are others
        return Pipeline(source, family, network, scheduler, written, describe(scheduler, written, ignore=ignore))
    except (ValueError, ImportError, TypeError, NotImplementedError) as error:
        raise ValueError(f"diffusers:{source}: {' '.join(str(error).split())}") from error


def _model_class(source: str, offline: Mapping[str, bool]) -> str:
    """The class of the pipeline's model. ValueError for one that isn't known, OSError where there is none."""
    load, found = import_diffusers().UNet2DModel.load_config, None
    for component in dict.fromkeys(family.component for family in FAMILIES.values()):
        try:
            found = load(source, subfolder=component, **offline).get("_class_name")
        except OSError as error:
            absent = error
        if found in FAMILIES:
            return str(found)
    if found is None:
        raise absent
    raise ValueError(f"its model is a {found}, known are {', '.join(FAMILIES)}: wrap it by python:MODULE:FACTORY")


def pipeline_checkpoint(source: str, *, ignore: Collection[str] = ()) -> Checkpoint:
    """`open_pipeline` as a checkpoint of ours, with the grid of the scheduler's own steps in `about`.

    A variance that the network answers too is left out. ValueError for labels that the model's family can't take.
    """
    pipeline = open_pipeline(source, ignore=ignore)
    described = pipeline.described
    config = {key: value for key, value in pipeline.network.config.items() if not key.startswith("_")}
    try:
        num_classes = pipeline.family.num_classes(config)
    except ValueError as error:
        raise ValueError(f"diffusers:{source} {error}") from None
    size, model = config["sample_size"], type(pipeline.network).__name__
    network: dict[str, Any] = {"name": "diffusers", "model": model, "config": config}
    if model == "UNet2DModel":  # ours can take more inputs
        network = {"name": "diffusers_unet2d", "config": config, "dropout": config["dropout"]}
    # Fields of their own only where they say something: recipes from before there were any keep their ids.
    if described.time_scale != 1:
        network["time_scale"] = described.time_scale
    if _learned_variance(pipeline):
        network["learned_variance"] = True
    spec = {
        "kind": "network",
        "sample_shape": [config["in_channels"], *([size, size] if isinstance(size, int) else size)],
        "num_classes": num_classes,
        "process": process_spec(described.process),
        "prediction": described.prediction,
        "network": network,
    }
    spec = json.loads(json.dumps(spec))
    denoiser = model_from_spec(spec)
    inner = "network.unet" if model == "UNet2DModel" else "network.model"
    denoiser.get_submodule(inner).load_state_dict(pipeline.network.state_dict())
    return Checkpoint(spec, pack(denoiser), about={"source": source, "grid": described.grid})


def _learned_variance(pipeline: Pipeline) -> bool:
    """Whether a variance comes after the prediction. ValueError where channels and scheduler don't say the same."""
    config, variance = pipeline.network.config, str(pipeline.scheduler.config.get("variance_type"))
    learned = variance.startswith("learned") or pipeline.family.has_variance(config)
    answered, wanted = config["out_channels"], config["in_channels"] * (2 if learned else 1)
    if answered != wanted:
        problem = f"diffusers:{pipeline.source} answers {answered} channels to {config['in_channels']}, not {wanted}"
        raise ValueError(f"{problem} as with variance_type {variance}: wrap it by python:MODULE:FACTORY")
    return learned


def _unasked(source: str) -> str | None:
    """Why the hub can't be asked for a name, None where it answers: one request, without the client's many tries."""
    from huggingface_hub import model_info

    try:
        model_info(source, timeout=_PATIENCE)
    except Exception as error:  # of the client's own, of its transport's, of the name's form
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return None
