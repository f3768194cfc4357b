"""diffusers' schedulers by their class and fields: the process, the prediction and the grid that each stands for.

A field is used, or known not to matter where a grid and a solver of ours take the scheduler's place, or it must have
its neutral value. Whatever else there is, a class or a field, is refused by name: it may change numbers.

    table of betas   DDPM, DDIM, PNDM, Euler, Heun, LMS, DPM-Solver, UniPC, DEIS, ...    DiscreteVP; epsilon, sample, v
    flow             FlowMatch*, and the solvers above with use_flow_sigmas              RectifiedFlow; velocity
    EDM              EDMEuler, EDMDPMSolverMultistep                                     VE; EDM's preconditioning
    score            ScoreSdeVe                                                          VE; the score itself
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

from limbeck.diffusion.process import VE, DiscreteVP, Process, RectifiedFlow

Ignorable = Literal["clip_sample", "thresholding"]
"""What a pipeline does to its samples and an ODE can't: left out only where the user says so."""

IGNORABLE: tuple[Ignorable, ...] = get_args(Ignorable)


Rivals = Mapping[str, tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Described:
    """What a scheduler says of its network.

    prediction: as in a model's spec. time_scale: the network's time is our process's times this. grid: the options of
    make_grid that give the times of the scheduler's own steps, or None where none of our grids has them. rivals: for a
    solver of ours, the deterministic scheduler that takes the same steps, and its settings.
    """

    process: Process
    prediction: Mapping[str, Any]
    time_scale: float = 1.0
    grid: Mapping[str, Any] | None = None
    rivals: Rivals = field(default_factory=dict)


@dataclass(frozen=True)
class _Kind:
    """Schedulers that are read alike. used: fields that `describe` reads; neutral: the values that others must have.

    reads: what they stand for, in words.
    """

    reads: str
    describe: Callable[[Any], Described]
    used: frozenset[str]
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rivals: Rivals = field(default_factory=dict)


_NOT_OF_AN_ODE: Mapping[str, tuple[Any, ...]] = {
    "clip_sample": (False, None),
    "thresholding": (False, None),
    "use_dynamic_shifting": (False, None),
    "invert_sigmas": (False,),
    "stochastic_sampling": (False,),
    "scale_factors": (None,),
}

_OF_ITS_OWN_STEPS = {
    # where they lie
    *("timestep_spacing", "steps_offset", "set_alpha_to_one", "sigma_min", "sigma_max", "final_sigmas_type"),
    *("interpolation_type", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
    *("lambda_min_clipped", "original_inference_steps", "shift", "flow_shift", "shift_terminal", "time_shift_type"),
    *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "sampling_eps"),
    # how they are made
    *("skip_prk_steps", "solver_order", "algorithm_type", "solver_type", "lower_order_final", "euler_at_final"),
    *("predict_x0", "disable_corrector", "solver_p", "noise_sampler_seed", "timestep_scaling", "snr", "correct_steps"),
    *("predictor_order", "corrector_order", "tau_func", "upscale_mode"),
    # what only counts beside clip_sample and thresholding
    *("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"),
}

_WAY_OUT = "wrap the pipeline by python:MODULE:FACTORY"


_SPACINGS = ("trailing", "leading", "linspace")


def _table_of_betas(
    scheduler: Any, *, spacing: str = "leading", spare: int = 0, grids: Sequence[str] = _SPACINGS
) -> Described:
    """spacing: where the scheduler has none; spare: as in grids.py; grids: spacings by which it places its steps."""
    config = scheduler.config
    process = DiscreteVP(tuple(scheduler.betas.double().tolist()))
    grid = _whole_timesteps(config, config.get("timestep_spacing", spacing), spare=spare)
    # A last step from the table's first time to itself is none.
    idle = grid.get("end") and not grid.get("spare") and not grid.get("offset") and grid["name"] != "trailing"
    if _places_sigmas(config) or grid["name"] not in grids or idle:
        return Described(process, {"name": config["prediction_type"]})
    return Described(process, {"name": config["prediction_type"]}, grid=grid)


def _whole_timesteps(config: Mapping[str, Any], spacing: str, *, spare: int) -> dict[str, Any]:
    # DPM-Solver's kind ends at the table's first time unless it says otherwise, the others at data.
    to_data = (
        config.get("set_alpha_to_one", True)
        and config.get("final_sigmas_type", "sigma_min" if spare else "zero") == "zero"
    )
    options = {
        "end": 0 if to_data else 1,
        "spare": spare if spacing != "trailing" else 0,
        "offset": config.get("steps_offset", 0) if spacing == "leading" else 0,
    }
    return {"name": spacing, **{name: value for name, value in options.items() if value}}


def _places_sigmas(config: Mapping[str, Any]) -> bool:
    """Whether its sigmas are placed by a rule of their own, or some of its timesteps are left out."""
    rules = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
    return (
        any(config.get(rule) for rule in rules)
        or config.get("interpolation_type", "linear") != "linear"
        or config.get("lambda_min_clipped", -math.inf) != -math.inf
    )


def _flow(scheduler: Any) -> Described:
    """t in [0, 1], of which the network is shown t * num_train_timesteps."""
    config = scheduler.config
    count, shift = config["num_train_timesteps"], config.get("shift")
    grid = None
    if shift is not None and not (_places_sigmas(config) or config.get("shift_terminal")):
        first = shift / (count + shift - 1)  # 1/count, shifted: the least of its sigmas, which are shifted once more
        grid = {"name": "uniform_time", "t_min": first, **({} if shift == 1 else {"shift": shift})}
    return Described(RectifiedFlow(), {"name": "velocity"}, time_scale=float(count), grid=grid)


def _edm(scheduler: Any) -> Described:
    config = scheduler.config
    ends = {"r_max": config["sigma_max"], "r_min": config["sigma_min"]}
    grid = {"name": "karras", "rho": config["rho"], **ends}
    if config["sigma_schedule"] == "exponential":
        grid = {"name": "uniform_logsnr", **ends}
    return Described(VE(config["sigma_max"]), {"name": "edm", "sigma_data": config["sigma_data"]}, grid=grid)


def _score(scheduler: Any) -> Described:
    """sigma falls geometrically; the network is shown it, and answers the score."""
    config = scheduler.config
    grid = {"name": "uniform_logsnr", "r_max": config["sigma_max"], "r_min": config["sigma_min"]}
    return Described(VE(config["sigma_max"]), {"name": "score"}, grid=grid)


_BETAS = frozenset({"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"})

_OF_A_TABLE: Mapping[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "variance_type": (
        *(None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
        *("learned", "learned_range"),  # that of a stochastic step, which the network answers beside its prediction
    ),
    "timestep_type": ("discrete",),
    "rescale_betas_zero_snr": (False, None),
}

_PLUS_PLUS = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False}
_AS_DDIM: Rivals = {"ddim": ("DDIMScheduler", {"clip_sample": False, "thresholding": False})}
_AS_DPM: Rivals = {
    "ddim": ("DPMSolverMultistepScheduler", {**_PLUS_PLUS, "thresholding": False, "solver_order": 1}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {**_PLUS_PLUS, "thresholding": False, "solver_order": 2}),
    "unipc": (
        "UniPCMultistepScheduler",
        {"solver_order": 2, "solver_type": "bh2", "thresholding": False, "predict_x0": True, "disable_corrector": []},
    ),
}

_A_TABLE = "a table of betas; epsilon, sample or v"

# Tables of betas, by where their own steps lie. By linspace those of DDIM's and Euler's are no whole timesteps, or
# each step goes past the next one's.
DDIM = _Kind(
    _A_TABLE, partial(_table_of_betas, grids=("trailing", "leading")), used=_BETAS, neutral=_OF_A_TABLE, rivals=_AS_DDIM
)
DPM = _Kind(
    _A_TABLE, partial(_table_of_betas, spacing="linspace", spare=1), used=_BETAS, neutral=_OF_A_TABLE, rivals=_AS_DPM
)
LCM = _Kind(_A_TABLE, partial(_table_of_betas, grids=()), used=_BETAS, neutral=_OF_A_TABLE)
FLOW = _Kind(
    "a rectified flow, velocity",
    _flow,
    used=_BETAS | {"use_flow_sigmas"},
    neutral={
        "prediction_type": ("flow_prediction",),
        "variance_type": (None,),
        "rescale_betas_zero_snr": (False, None),
    },
    rivals={"ddim": ("FlowMatchEulerDiscreteScheduler", {})},
)
EDM = _Kind(
    "VE with EDM's preconditioning",
    _edm,
    used=frozenset({"sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho", "num_train_timesteps"}),
    neutral={"prediction_type": ("epsilon",), "final_sigmas_type": ("zero",)},
    rivals={
        "ddim": ("EDMEulerScheduler", {}),
        "dpmpp_2m": ("EDMDPMSolverMultistepScheduler", {**_PLUS_PLUS, "solver_order": 2}),
    },
)
SCORE = _Kind("VE, the score", _score, used=frozenset({"sigma_min", "sigma_max", "num_train_timesteps"}))

SCHEDULERS: Mapping[str, _Kind] = {
    **dict.fromkeys(("DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "PNDM"), DDIM),
    **dict.fromkeys(("LCM", "TCD"), LCM),
    **dict.fromkeys(("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver"), DPM),
    **dict.fromkeys(("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete"), DDIM),
    **dict.fromkeys(("KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"), DDIM),
    **dict.fromkeys(("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM"), FLOW),
    **dict.fromkeys(("EDMEuler", "EDMDPMSolverMultistep"), EDM),
    "ScoreSdeVe": SCORE,
}


def check_class(name: str) -> None:
    """ValueError for a scheduler that isn't known."""
    if name.removesuffix("Scheduler") not in SCHEDULERS:
        raise ValueError(f"its scheduler is {name or 'of no class'}, which is not known here: {_WAY_OUT}")


def describe(scheduler: Any, written: Mapping[str, Any], *, ignore: Collection[str] = ()) -> Described:
    """The process, prediction and grid of a scheduler, whose file says `written`.

    ValueError for a class that isn't known, and for a field that changes numbers and isn't represented, unless it is
    ignored.
    """
    name = type(scheduler).__name__
    check_class(name)
    config = {**written, **scheduler.config}
    kind = SCHEDULERS[name.removesuffix("Scheduler")]
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        kind = FLOW
    _check_fields(config, kind, ignore=ignore)
    return replace(kind.describe(scheduler), rivals=kind.rivals)


def _check_fields(config: Mapping[str, Any], kind: _Kind, *, ignore: Collection[str]) -> None:
    neutral = {**_NOT_OF_AN_ODE, **{"use_flow_sigmas": (False, None)}, **kind.neutral}
    for name, value in config.items():
        if name.startswith("_") or name in ignore or name in kind.used:
            continue
        if name in neutral and value in neutral[name]:
            continue
        if name in neutral or name not in _OF_ITS_OWN_STEPS:
            why = "changes its samples" if name in IGNORABLE else "may change numbers and is not represented"
            way_out = f"--ignore {name} for the ODE without it, or " if name in IGNORABLE else ""
            raise ValueError(f"its scheduler has {name}: {value}, which {why}: {way_out}{_WAY_OUT}")
