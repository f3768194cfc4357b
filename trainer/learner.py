"""A network that is fitted: its optimizer, schedule and scaler, its place on ranks, and averages of its weights."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.options import ComputeConfig, OptimizationConfig
from limbeck.trainer.ranks import Loss, Ranks, held_back, replicated
from limbeck.trainer.stream import Batch

LossOf = Callable[[Networks, Batch], Tensor]
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def lr_factor(step: int, optimization: OptimizationConfig) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, then the decay to 0 at the last one."""
    warmup = optimization.num_warmup
    if step < warmup:
        return (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, optimization.steps - warmup))
    left = {"cosine": (1 + math.cos(math.pi * share)) / 2, "linear": 1 - share, "none": 1.0}
    return left[optimization.decay or "none"]


class Learner:
    """A module that one optimizer fits, once in `every` steps of the run.

    Its weights are the same on every rank, or with `sharded` its networks are sharded already. The loss and the
    gradient are means over the global batch, of which each rank is given an equal part. Collective: the constructor,
    `update`; with `sharded` also `state_dict`, `load_state_dict`.
    """

    def __init__(
        self,
        module: nn.Module,
        optimization: OptimizationConfig,
        compute: ComputeConfig,
        ranks: Ranks,
        *,
        lr: float,
        micro_batch: int | None,
        every: int = 1,
        sharded: bool = False,
    ) -> None:
        self.module, self.ranks = module, ranks
        self._optimization, self._compute = optimization, compute
        self._lr, self._micro_batch, self._every, self._sharded = lr, micro_batch, every, sharded
        self._loss = Loss(module) if sharded else replicated(module, ranks)
        self.begin()

    def begin(self) -> None:
        """Reset optimizer, schedule and scaler; keep the weights."""
        optimization, every = self._optimization, self._every
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=self._lr,
            betas=(optimization.beta1 or 0.0, 0.999),
            weight_decay=optimization.weight_decay,
            fused=True,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: lr_factor(n * every, optimization))
        self.scaler = torch.amp.GradScaler(self.ranks.device.type, enabled=self._compute.autocast == "float16")

    def update(self, loss_of: LossOf, networks: Networks, batch: Batch) -> tuple[Tensor, Tensor]:
        """One optimizer step; (loss, norm of the gradient before clipping) of the global batch, on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._gradient(loss_of, networks, batch)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self._optimization.clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return self.ranks.mean(loss), norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _gradient(self, loss_of: LossOf, networks: Networks, batch: Batch) -> Tensor:
        """The loss of this rank's part; leaves the mean gradient over ranks in the parameters."""
        loss = torch.zeros((), device=self.ranks.device)
        done = 0
        for part in batch.split(self._micro_batch or len(batch)):
            done += len(part)
            with held_back(self._loss, last=done == len(batch)):
                with self._autocast():
                    piece = self._loss(loss_of, networks, part.to(self.ranks.device)) * (len(part) / len(batch))
                self.scaler.scale(piece).backward()
            loss += piece.detach()
        return loss

    def _autocast(self) -> torch.autocast:
        dtype = _AUTOCAST.get(self._compute.autocast)
        # Before PyTorch 2.11 its cache gives weights that were cast without a gradient to calls that want one.
        return torch.autocast(self.ranks.device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on, but the batch."""
        module, optimizer = self.module.state_dict(), self.optimizer.state_dict()
        if self._sharded:
            module, optimizer = get_state_dict(self.module, self.optimizer)
        return {
            "module": module,
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        module, optimizer = state["module"], state["optimizer"]
        if self._sharded:
            set_state_dict(self.module, self.optimizer, model_state_dict=module, optim_state_dict=optimizer)
        else:
            self.module.load_state_dict(module)
            self.optimizer.load_state_dict(optimizer)
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])


@contextmanager
def frozen(module: nn.Module | None) -> Iterator[None]:
    """Hold a module's parameters without gradients; its inputs still take them."""
    fitted = [parameter for parameter in module.parameters() if parameter.requires_grad] if module else []
    for parameter in fitted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in fitted:
            parameter.requires_grad_(True)


M = TypeVar("M", bound=nn.Module)


class Average(Generic[M]):
    """Exponential average of a module's weights: the first, then with min(decay, (1 + n)/(10 + n)) after n of them.

    It starts short, to forget its start. Unlike PyTorch's AveragedModel it asks the device for nothing.
    """

    def __init__(self, module: M, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.decay, self.count = decay, 0

    def update(self, module: M) -> None:
        """Take in the weights after a step."""
        decay = min(self.decay, (1 + self.count) / (10 + self.count)) if self.count else 0.0
        get_ema_multi_avg_fn(decay)(list(self.module.parameters()), list(module.parameters()), self.count)
        for averaged, current in zip(self.module.buffers(), module.buffers(), strict=True):
            averaged.copy_(current)
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "module": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.module.load_state_dict(state["module"])
