"""No objective waits for the device: after the first step nothing is read from it, and nothing is copied to it."""

from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.networks.uncertainty import Uncertainty
from limbeck.trainer.objectives.dmd import RealImages
from limbeck.trainer.objectives.kind import Objective
from limbeck.trainer.objectives.progressive import ProgressiveSegments
from limbeck.trainer.stream import Batch
from tests.diffusion.test_no_sync import Crossings
from tests.trainer import on_ranks
from tests.trainer.networks.test_critic import ALTERNATING, FITS, batch, config, network_teacher, networks_of

META = torch.device("meta")
"""Its tensors have no values: reading one raises, and what it would be copied from is seen."""


class Made(TorchFunctionMode):
    """Counts tensors that are made on the device of Python's numbers: no dispatcher is shown their copies."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor and kwargs.get("device") == META:
            self.found["torch.tensor"] += 1
        return function(*args, **kwargs)


def crossings(objective: Objective, networks: Networks, batch: Batch) -> dict[str, int]:
    """Of the second step; the first leaves on the device what is the same at every step."""
    there = batch.to(META)
    losses = [objective, *([objective.critic_loss] if networks.critic else [])]
    for _ in range(2):
        with Crossings("meta") as watch, Made(watch.found):
            for loss in losses:
                loss(networks, there).backward()
    return watch.found


@pytest.mark.parametrize("name", on_ranks.OBJECTIVES)
def test_objectives_on_stored_states(name):
    model = {"second_time": name in ("flow_map", "ctm"), "process": "rectified_flow" if name == "reflow" else "ve"}
    fitted, target = (on_ranks.student(seed, **model).to(META) for seed in range(2))
    networks = Networks(fitted, target=target.requires_grad_(False), weighting=Uncertainty(0).to(META))
    assert crossings(on_ranks.OBJECTIVES[name], networks, on_ranks.global_batch(0)) == {}


def test_progressive_on_stored_segments():
    stored = on_ranks.global_batch(0)
    noise, _, later = stored.states.values()
    segments = {"start_index": torch.zeros(len(stored), dtype=torch.int32), "segment_0": noise, "segment_2": later}
    networks = Networks(on_ranks.student(0).to(META))
    assert crossings(ProgressiveSegments(on_ranks.TIMES), networks, replace(stored, states=segments)) == {}


@pytest.mark.parametrize("name", ALTERNATING)
def test_objectives_with_a_critic(name):
    teacher, fit = network_teacher(), config(name, **FITS[name])
    networks = networks_of(fit, teacher, guidance=(1.0, 2.0))
    for module in (teacher.denoiser, networks.student, networks.critic):
        module.to(META)
    objective = ALTERNATING[name]
    if name == "dmd":
        objective = type(objective)(
            **{**vars(objective), "real": RealImages(batch().states["output"], batch().ids % 3)}
        )
    assert crossings(objective, networks, batch()) == {}
