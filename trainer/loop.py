"""The step and the loop around it: AdamW, warm-up and decay, clipping, averaged weights, exact resume."""

import copy
import hashlib
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from diffusion.denoiser import Denoiser
from diffusion.flow_map import FlowMap
from trainer import parallel
from trainer.config import FitConfig
from trainer.objectives import Objective
from trainer.parallel import Ranks
from trainer.stream import Batch

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def lr_factor(step: int, config: FitConfig) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, then the decay to 0 at config.steps."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    share = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    return {"cosine": (1 + math.cos(math.pi * share)) / 2, "linear": 1 - share, "none": 1.0}[config.decay or "none"]


def step_seed(seed: int, step: int) -> int:
    """Seed of what is random inside the network (dropout) at one step, so that a resumed step is the same step."""
    return int.from_bytes(hashlib.sha256(f"limbeck step|{seed}|{step}".encode()).digest()[:7])


def check_device(config: FitConfig, device: torch.device) -> None:
    """Refuse a precision that the device does not have."""
    if config.autocast == "float16" and device.type == "cpu":
        raise ValueError("autocast float16 needs a GPU; use bfloat16 or none on the CPU")
    on_gpu = device.type == "cuda"
    if config.autocast == "bfloat16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"autocast bfloat16: {torch.cuda.get_device_name(device)} lacks it; use float16 or none")


class Stepper:
    """A student, its optimizer and its averaged weights, over one stage after another, on one process or many.

    Every rank has one, of a student of the same shape: its weights become the first rank's. `sharded` is FSDP2, else
    several ranks are DDP. The loss and the gradient are means over the global batch, of which each rank is given an
    equal part. Collective: the constructor, `step`, `served_state`, and what is served of a sharded student; with
    `sharded` also `state_dict`, `load_state_dict` and `restart`.
    """

    def __init__(self, student: FlowMap, config: FitConfig, ranks: Ranks, *, sharded: bool = False) -> None:
        self.config, self.ranks, self.sharded = config, ranks, sharded
        self.student = student.train()
        parallel.send_first(student, ranks)
        self.average = Average(student.denoiser, config.ema) if config.ema else None
        if config.compile:
            student.denoiser.network.compile()
        self._loss = self._spread()
        self._begin()

    def _spread(self) -> nn.Module:
        if not self.sharded:
            return parallel.replicated(self.student, self.ranks)
        for denoiser in {self.student.denoiser, self.served}:
            parallel.share_out(denoiser.network, self.ranks)
        return parallel.Loss(self.student)

    def _begin(self) -> None:
        config = self.config
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: lr_factor(step, config))
        self.scaler = torch.amp.GradScaler(self.ranks.device.type, enabled=config.autocast == "float16")

    def restart(self) -> None:
        """Begin the next stage: from the served weights, with everything else as new."""
        self.student.denoiser.load_state_dict(self.served.state_dict())
        if self.average is not None:
            self.average.count = 0
        self._begin()

    @property
    def served(self) -> Denoiser:
        """The denoiser that is validated, saved, and the start of the next stage."""
        return self.student.denoiser if self.average is None else self.average.denoiser

    @contextmanager
    def evaluating(self) -> Iterator[Denoiser]:
        """The served denoiser without its dropout. A sharded one needs every rank to call it as often."""
        served = self.served
        yield served.eval()
        served.train()

    def step(self, objective: Objective, batch: Batch, *, seed: int) -> tuple[Tensor, Tensor]:
        """One optimizer step on this rank's part of the global batch; (loss, norm of the gradient before clipping).

        Both are the global batch's, on the device, the same on every rank. Dropout alone depends on how many ranks
        there are: each draws its own.
        """
        torch.manual_seed(seed + self.ranks.rank)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._gradient(objective, batch)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.config.clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if self.average is not None:
            self.average.update(self.student.denoiser)
        return self.ranks.mean(loss), norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _gradient(self, objective: Objective, batch: Batch) -> Tensor:
        """The loss of this rank's part; leaves the mean gradient over ranks in the parameters."""
        loss = torch.zeros((), device=self.ranks.device)
        done = 0
        for part in batch.split(self.config.micro_batch or len(batch)):
            done += len(part)
            with parallel.held_back(self._loss, last=done == len(batch)):
                with self._autocast():
                    piece = self._loss(objective, part.to(self.ranks.device)) * (len(part) / len(batch))
                self.scaler.scale(piece).backward()
            loss += piece.detach()
        return loss

    def _autocast(self) -> torch.autocast:
        dtype = _AUTOCAST.get(self.config.autocast)
        return torch.autocast(self.ranks.device.type, dtype=dtype, enabled=dtype is not None)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but the stream.

        Plain tensors, the same on every rank; of a sharded student DTensors under their parameters' names, for
        torch.distributed.checkpoint, which loads what other numbers of ranks have saved: into a `state_dict()`, in
        place, and that is what `load_state_dict` takes.
        """
        student, optimizer = self.student.state_dict(), self.optimizer.state_dict()
        if self.sharded:
            student, optimizer = get_state_dict(self.student, self.optimizer)
        return {
            "student": student,
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        student, optimizer = state["student"], state["optimizer"]
        if self.sharded:
            set_state_dict(self.student, self.optimizer, model_state_dict=student, optim_state_dict=optimizer)
        else:
            self.student.load_state_dict(student)
            self.optimizer.load_state_dict(optimizer)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])

    def served_state(self) -> dict[str, Any]:
        """The served denoiser's whole weights, plain tensors on the CPU, on the first rank; {} on the others."""
        whole = get_model_state_dict(self.served, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return whole if self.ranks.is_first else {}


class Average:
    """Exponential average of a denoiser's weights: the first, then with min(decay, (1 + n)/(10 + n)) after n of them.

    It starts short, to forget its start. Unlike PyTorch's AveragedModel it asks the device for nothing.
    """

    def __init__(self, denoiser: Denoiser, decay: float) -> None:
        self.denoiser, self.decay, self.count = copy.deepcopy(denoiser), decay, 0

    def update(self, denoiser: Denoiser) -> None:
        """Take in the weights after a step."""
        decay = min(self.decay, (1 + self.count) / (10 + self.count)) if self.count else 0.0
        get_ema_multi_avg_fn(decay)(list(self.denoiser.parameters()), list(denoiser.parameters()), self.count)
        for averaged, current in zip(self.denoiser.buffers(), denoiser.buffers(), strict=True):
            averaged.copy_(current)
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "denoiser": self.denoiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.denoiser.load_state_dict(state["denoiser"])


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
