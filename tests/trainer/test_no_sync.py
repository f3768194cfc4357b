"""No objective waits for the device: after the first step nothing is read from it, and nothing is copied to it."""

import pytest
import torch

from tests.diffusion.test_no_sync import Crossings
from tests.trainer import on_ranks
from tests.trainer.test_critic import ALTERNATING, FITS, batch, cast_of, config, network_teacher
from trainer.cast import Cast
from trainer.objectives import Objective
from trainer.objectives.dmd import RealImages
from trainer.objectives.weights import Uncertainty
from trainer.stream import Batch

META = torch.device("meta")
"""Its tensors have no values: reading one raises, and what it would be copied from is seen."""


def crossings(objective: Objective, cast: Cast, batch: Batch) -> dict[str, int]:
    """Of the second step; the first leaves on the device what is the same at every step."""
    there = batch.to(META)
    losses = [objective, *([objective.critic_loss] if cast.critic else [])]
    for _ in range(2):
        with Crossings("meta") as watch:
            for loss in losses:
                loss(cast, there).backward()
    return watch.found


@pytest.mark.parametrize("name", on_ranks.OBJECTIVES)
def test_objectives_on_stored_states(name):
    model = {"second_time": name in ("flow_map", "ctm"), "process": "rectified_flow" if name == "reflow" else "ve"}
    fitted, target = (on_ranks.student(seed, **model).to(META) for seed in range(2))
    cast = Cast(fitted, target=target.requires_grad_(False), weighting=Uncertainty(0).to(META))
    assert crossings(on_ranks.OBJECTIVES[name], cast, on_ranks.global_batch(0)) == {}


@pytest.mark.parametrize("name", ALTERNATING)
def test_objectives_with_a_critic(name):
    teacher, fit = network_teacher(), config(name, **FITS[name])
    cast = cast_of(fit, teacher, guidance=(1.0, 2.0))
    for module in (teacher.denoiser, cast.student, cast.critic):
        module.to(META)
    objective = ALTERNATING[name]
    if name == "dmd":
        objective = type(objective)(
            **{**vars(objective), "real": RealImages(batch().states["output"], batch().ids % 3)}
        )
    assert crossings(objective, cast, batch()) == {}
