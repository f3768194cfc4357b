"""The step and the signals around it: which networks a batch updates, averaged weights, exact resume."""

import hashlib
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from limbeck.diffusion.denoiser import Denoiser
from limbeck.diffusion.flow_map import FlowMap
from limbeck.trainer.config import FitConfig
from limbeck.trainer.learner import Average, Learner, frozen
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.objectives.kind import AlternatingObjective, Objective
from limbeck.trainer.options import ComputeConfig
from limbeck.trainer.ranks import Ranks, send_first, share_out
from limbeck.trainer.stream import Batch


def step_seed(seed: int, step: int) -> int:
    """Seed of what is random inside the network (dropout) at one step, so that a resumed step is the same step."""
    return int.from_bytes(hashlib.sha256(f"limbeck step|{seed}|{step}".encode()).digest()[:7])


def check_device(compute: ComputeConfig, device: torch.device) -> None:
    """Refuse a precision that the device does not have."""
    if compute.autocast == "float16" and device.type == "cpu":
        raise ValueError("autocast float16 needs a GPU; use bfloat16 or none on the CPU")
    on_gpu = device.type == "cuda"
    if compute.autocast == "bfloat16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"autocast bfloat16: {torch.cuda.get_device_name(device)} lacks it; use float16 or none")


class Stepper:
    """The networks of a fit, their optimizers and averages, over one stage after another, on one process or many.

    Every rank has one, of networks of the same shape: their weights become the first rank's. `sharded` is FSDP2, else
    several ranks are DDP. Collective: the constructor, `step`, `served_state`, and what is served of a sharded
    student; with `sharded` also `state_dict`, `load_state_dict` and `restart`.
    """

    def __init__(self, networks: Networks, config: FitConfig, ranks: Ranks, *, sharded: bool = False) -> None:
        self.config, self.ranks, self.sharded, self.networks = config, ranks, sharded, networks
        fitted = _together(networks.student.train(), networks.weighting)
        send_first(fitted, ranks)
        if networks.critic is not None:
            send_first(networks.critic, ranks)
        denoiser, options = networks.student.denoiser, config.objective.options
        ema, lr = config.optimization.ema, config.optimization.lr
        self.average = Average(denoiser, ema) if ema else None
        self.target = None if options.target_decay is None else Average(denoiser, options.target_decay)
        critic_ema = config.critic.ema if networks.critic else 0.0
        self.critic_average = Average(networks.critic, critic_ema) if networks.critic and critic_ema else None
        if self.target is not None:
            networks.target = FlowMap(self.target.module).eval()
        if config.compute.compile:
            denoiser.network.compile()
        if sharded:
            self._share_out()
        assert lr is not None  # filled
        learner = partial(Learner, ranks=ranks, micro_batch=config.batch.micro_batch, sharded=sharded)
        how = config.optimization, config.compute
        self.student = learner(fitted, *how, lr=lr, every=options.student_every)
        self.critic: Learner | None = None
        if networks.critic:
            self.critic = learner(networks.critic, *how, lr=config.critic.lr or lr)

    def _share_out(self) -> None:
        averages = [average.module for average in (self.average, self.target) if average]
        critics = [average.module for average in (self.critic_average,) if average] + [self.networks.critic]
        denoisers = [self.networks.student.denoiser, *averages, *(critic.denoiser for critic in critics if critic)]
        inner = [denoiser.network for denoiser in denoisers]
        for network in filter(None, (*inner, self.networks.weighting)):
            share_out(network, self.ranks)

    def restart(self) -> None:
        """Begin the next stage: from the served weights; reset everything else."""
        self.networks.student.denoiser.load_state_dict(self.served.state_dict())
        if self.average is not None:
            self.average.count = 0
        self.student.begin()

    @property
    def served(self) -> Denoiser:
        """The denoiser that is validated, saved, and the start of the next stage."""
        return self.networks.student.denoiser if self.average is None else self.average.module

    @contextmanager
    def evaluating(self) -> Iterator[Denoiser]:
        """The served denoiser without its dropout. A sharded one needs every rank to call it as often."""
        served = self.served
        yield served.eval()
        served.train()

    def step(self, objective: Objective, batch: Batch, *, seed: int, number: int = 0) -> dict[str, Tensor]:
        """Do the run's step `number` (from 0) on this rank's part of the global batch.

        It updates the student; or the critic if there is one, and the student after each `critic_steps` of those.
        Returns losses and norms of the gradients before clipping, of the global batch, on the device, the same on
        every rank. Dropout alone depends on how many ranks there are: each draws its own.
        """
        torch.manual_seed(seed + self.ranks.rank)
        if self.critic is None:
            return self._update_student(objective, batch)
        assert isinstance(objective, AlternatingObjective)
        loss, norm = self.critic.update(objective.critic_loss, self.networks, batch)
        if self.critic_average is not None and self.networks.critic is not None:
            self.critic_average.update(self.networks.critic)
        found = {"critic_loss": loss, "critic_grad_norm": norm}
        turn = (number + 1) % objective.critic_steps == 0
        return found | (self._update_student(objective, batch) if turn else {})

    def _update_student(self, objective: Objective, batch: Batch) -> dict[str, Tensor]:
        critic = self.critic_average.module if self.critic_average else self.networks.critic
        with frozen(critic):
            loss, norm = self.student.update(objective, replace(self.networks, critic=critic), batch)
        for average in filter(None, (self.average, self.target)):
            average.update(self.networks.student.denoiser)
        return {"loss": loss, "grad_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but the stream.

        Plain tensors, the same on every rank; of sharded networks DTensors under their parameters' names, for
        runs/shards.py, which reads what other numbers of ranks have saved: into a `state_dict()`, in place, and that
        is what `load_state_dict` takes.
        """
        return {name: part and part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        for name, part in self._parts().items():
            if part is not None:
                part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Learner | Average[Any] | None]:
        return {
            "student": self.student,
            "average": self.average,
            "target": self.target,
            "critic": self.critic,
            "critic_average": self.critic_average,
        }

    def served_state(self) -> dict[str, Any]:
        """The served denoiser's whole weights, plain tensors on the CPU, on the first rank; {} on the others."""
        whole = get_model_state_dict(self.served, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return whole if self.ranks.is_first else {}


def _together(student: FlowMap, weighting: nn.Module | None) -> nn.Module:
    """The module that the student's optimizer fits."""
    return student if weighting is None else nn.ModuleDict({"student": student, "weighting": weighting})


class StopRequest:
    """Whether the run was asked to end: SIGTERM or Ctrl-C, honoured between two steps."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal, as a shell reports it: 143 for SIGTERM."""
        return 128 + (self.signal or 0)

    def note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch SIGTERM and SIGINT for as long as it lasts (in the main thread, where Python allows it)."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
