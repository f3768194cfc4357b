"""diffusers' schedulers by their class and fields: which are a table of betas, and what of them an ODE can't have.

A field is used, or known not to matter where a grid and a solver of ours take the scheduler's place, or it must have
its neutral value. Whatever else there is, a class or a field, is refused by name: it may change numbers.
"""

from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

Ignorable = Literal["clip_sample", "thresholding"]
"""What a pipeline does to its samples and an ODE can't: left out only where the user says so."""

IGNORABLE: tuple[Ignorable, ...] = get_args(Ignorable)

TABLES_OF_BETAS = (
    *("DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "PNDM", "LCM", "TCD", "UniPCMultistep", "DEISMultistep"),
    *("DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE", "EulerDiscrete", "EulerAncestralDiscrete"),
    *("HeunDiscrete", "LMSDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"),
)

_USED = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"}

_OF_ITS_OWN_STEPS = {
    # where they lie
    *("timestep_spacing", "steps_offset", "set_alpha_to_one", "sigma_min", "sigma_max", "final_sigmas_type"),
    *("interpolation_type", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
    *("lambda_min_clipped", "original_inference_steps", "flow_shift", "shift_terminal", "time_shift_type"),
    # how they are made
    *("skip_prk_steps", "solver_order", "algorithm_type", "solver_type", "lower_order_final", "euler_at_final"),
    *("predict_x0", "disable_corrector", "solver_p", "noise_sampler_seed", "timestep_scaling"),
    # what only counts beside clip_sample and thresholding
    *("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"),
}

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "timestep_type": ("discrete",),
    "rescale_betas_zero_snr": (False, None),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "clip_sample": (False, None),
    "thresholding": (False, None),
}

_WAY_OUT = "wrap the pipeline by python:MODULE:FACTORY"


def check_class(name: str) -> None:
    """ValueError for a scheduler that isn't known to be a table of betas."""
    if name.removesuffix("Scheduler") not in TABLES_OF_BETAS:
        raise ValueError(f"its scheduler is {name or 'of no class'}, which is no table of betas: {_WAY_OUT}")


def check_fields(config: Mapping[str, Any], *, ignore: Collection[str]) -> None:
    """ValueError for a field that changes numbers and that a table of betas doesn't represent, unless it is ignored."""
    for name, value in config.items():
        if name.startswith("_") or name in ignore or (name in _USED and name not in _NEUTRAL):
            continue
        if name in _NEUTRAL and value in _NEUTRAL[name]:
            continue
        if name not in _OF_ITS_OWN_STEPS:
            why = "changes its samples" if name in IGNORABLE else "may change numbers and is not represented"
            way_out = f"--ignore {name} for the ODE without it, or " if name in IGNORABLE else ""
            raise ValueError(f"its scheduler has {name}: {value}, which {why}: {way_out}{_WAY_OUT}")
