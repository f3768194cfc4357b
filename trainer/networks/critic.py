"""The networks beside a student of dmd, vsd or sid: the critic, which is fitted, and the teacher, which is not.

Both answer (x_t, t, stored labels, guidance scales [B]) with x_0. The critic's answer says the score of the student's
own samples, s = (alpha_t x_0 - x_t)/sigma_t^2, the teacher's that of the data.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from limbeck.diffusion.denoiser import Denoiser, Guided, null_labelled
from limbeck.diffusion.models.checkpoint import Checkpoint, pack, widened
from limbeck.diffusion.models.teachers import Teacher
from limbeck.diffusion.process import scales
from limbeck.diffusion.solvers import answer
from limbeck.storage_schemas.errors import usage_errors
from limbeck.trainer.networks.lora import with_low_rank
from limbeck.trainer.networks.options import CriticConfig, TeacherConfig


class Critic(nn.Module):
    """The score of the student's samples, and with a head the discriminator of DMD2 on the same network's features.

    Its state_dict holds what is fitted: low-rank changes come without the weights that they change.
    """

    def __init__(self, denoiser: Denoiser, head: nn.Module | None = None) -> None:
        super().__init__()
        self.denoiser, self.head = denoiser, head
        if not all(parameter.requires_grad for parameter in self.parameters()):
            self.fitted = frozenset(name for name, parameter in self.named_parameters() if parameter.requires_grad)
            self.register_state_dict_post_hook(_leave_shared_out)
            self.register_load_state_dict_post_hook(_miss_no_shared)

    def forward(self, x_t: Tensor, t: Tensor, stored: Tensor, guidance: Tensor) -> Tensor:
        return self.denoiser(x_t, t, **self._conditioning(stored, guidance))

    def error(self, x_0: Tensor, x_t: Tensor, t: Tensor, stored: Tensor, guidance: Tensor) -> Tensor:
        """|| F(x_t, t) - target(x_0, x_t) ||^2 of what the network itself predicts, [B], a mean over numbers."""
        target = self.denoiser.prediction.target(x_0, x_t, *scales(self.denoiser.process, t, like=x_t))
        output = self.denoiser.output(x_t, t, **self._conditioning(stored, guidance))
        return (output - target).square().flatten(1).mean(1)

    def logit(self, x_t: Tensor, t: Tensor, stored: Tensor, guidance: Tensor) -> Tensor:
        """Discriminator logits, [B]: log-odds that a diffused sample is real."""
        assert self.head is not None
        features = self.denoiser.features(x_t, t, **self._conditioning(stored, guidance))
        return self.head(features.float()).squeeze(1)

    def _conditioning(self, stored: Tensor, guidance: Tensor) -> dict[str, Tensor | None]:
        return {
            "condition": null_labelled(stored, self.denoiser.num_classes),
            "guidance": guidance if self.denoiser.told_guidance else None,
        }


def _leave_shared_out(critic: Critic, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.removeprefix(prefix) not in critic.fitted]:
        del state[name]


def _miss_no_shared(critic: Critic, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in critic.fitted]


def make_critic(
    options: CriticConfig, teacher: Teacher, student: Denoiser, *, seed: int, discriminates: bool
) -> Critic:
    """The teacher's network, or the student's where the teacher is none, to be fitted.

    seed: for the low-rank changes and the head. discriminates: whether it gets a head.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if options.kind == "lora":
            assert isinstance(teacher.denoiser, Denoiser)
            denoiser = with_low_rank(teacher.denoiser, options.rank)
        else:
            denoiser = _copied(teacher, student)
        head = _head(denoiser.network) if discriminates else None
    return Critic(denoiser, head).to(next(student.parameters()).device)


def _copied(teacher: Teacher, student: Denoiser) -> Denoiser:
    """A copy without dropout; it takes guidance where the student does, whose samples depend on it."""
    if teacher.model["kind"] != "network":
        return copy.deepcopy(student).eval()
    saved = widened(Checkpoint(teacher.model, pack(teacher.denoiser)), told_guidance=student.told_guidance)
    denoiser = saved.build()
    assert isinstance(denoiser, Denoiser)
    return denoiser


def _head(network: nn.Module) -> nn.Module:
    """A small MLP of a network's features, [B, F] -> [B, 1]."""
    size = network.num_features
    assert isinstance(size, int)
    return nn.Sequential(nn.LayerNorm(size), nn.Linear(size, size), nn.SiLU(), nn.Linear(size, 1))


class FrozenTeacher:
    """The score of the data: a teacher guided by one scale, or by each sample's own, in its weights' dtype.

    scale: 1 is one call; None is each sample's own. Its parameters take no gradients, what it is asked about does.
    offload: weights stay on the CPU, and a copy of them is on `device` only while it answers. For a gradient it
    answers again, from another copy: neither weights nor activations wait on the device in between. Same numbers.
    """

    def __init__(self, denoiser: nn.Module, *, scale: float | None, offload: bool, device: torch.device) -> None:
        self._guided, self._device, self._offload = _Guided(denoiser, scale), device, offload
        if offload:
            denoiser.cpu()
        if offload and device.type == "cuda":
            for tensor in (*denoiser.parameters(), *denoiser.buffers()):
                tensor.data = tensor.data.pin_memory()

    def __call__(self, x_t: Tensor, t: Tensor, stored: Tensor, guidance: Tensor) -> Tensor:
        inputs = x_t, t, stored, guidance
        if not self._offload:
            return self._guided(*inputs)
        x_0: Tensor = checkpoint(self._visit, *inputs, use_reentrant=False, preserve_rng_state=False)
        return x_0

    def _visit(self, *inputs: Tensor) -> Tensor:
        kept = (*self._guided.named_parameters(), *self._guided.named_buffers())
        there = {name: tensor.to(self._device, non_blocking=True) for name, tensor in kept}
        x_0: Tensor = functional_call(self._guided, there, inputs)
        return x_0


class _Guided(nn.Module):
    def __init__(self, denoiser: nn.Module, scale: float | None) -> None:
        super().__init__()
        self.denoiser, self.scale = denoiser, scale
        self.num_classes: int | None = getattr(denoiser, "num_classes", None)

    def forward(self, x_t: Tensor, t: Tensor, stored: Tensor, guidance: Tensor) -> Tensor:
        labels = null_labelled(stored, self.num_classes)
        with usage_errors():
            if self.scale == 1:
                return answer(self.denoiser, x_t, t, labels)
            guided = Guided(self.denoiser, guidance if self.scale is None else self.scale)
            return answer(guided, x_t, t, labels)


def frozen_teacher(
    options: TeacherConfig,
    teacher: Teacher,
    *,
    asked: float | None,
    guidance: tuple[float, ...],
    device: torch.device,
) -> FrozenTeacher:
    """The teacher guided by the scale `asked`, or by the data's; of several scales by each sample's own."""
    scale = asked if asked is not None else guidance[0] if len(guidance) == 1 else None
    denoiser = teacher.denoiser.to(getattr(torch, options.dtype)).requires_grad_(False)
    return FrozenTeacher(denoiser, scale=scale, offload=options.offload, device=device)
