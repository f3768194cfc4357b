"""Several processes as one trainer: their ranks, their messages, and how the student is spread over them.

`torchrun --nproc-per-node N -m limbeck.trainer fit ...` starts N processes, one a GPU, and says in their environment
which rank each is; without it there is one. "ddp": each holds the whole student. "fsdp": each holds a share of its
weights, of their average and of the optimizer's state (PyTorch's FSDP2); a layer is gathered when it is needed.

Collective, i.e. called by every rank, in the same order, or not at all: all methods of Ranks but `found_by_first`.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from threading import Event
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from limbeck.diffusion.recipes.devices import pick_device
from limbeck.storage_schemas.errors import UserError, usage_errors

# How long a rank waits for the others, which may be reading, validating or saving.
TIMEOUT = timedelta(minutes=15)
_LOOKS = 0.02  # seconds between two looks for what the first rank has found


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them: rank of world_size, on a device of its own."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    objects: Any = None
    """gloo group of small objects, on the CPU whatever the tensors' group is; None without torchrun."""
    store: dist.Store | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def gather(self, mine: Any) -> list[Any]:
        """Every rank's small object, in the ranks' order, to all."""
        found = [mine] * self.world_size
        if self.objects is not None:
            dist.all_gather_object(found, mine, group=self.objects)
        return found

    def broadcast(self, value: Any) -> Any:
        """The first rank's small object, to all; what the others give is not looked at."""
        held = [value if self.is_first else None]
        if self.objects is not None:
            dist.broadcast_object_list(held, src=0, group=self.objects)
        return held[0]

    def any(self, mine: bool) -> bool:
        """Whether it holds on any rank: so that all of them stop at the same step."""
        held = torch.tensor(int(mine))
        if self.objects is not None:
            dist.all_reduce(held, op=dist.ReduceOp.MAX, group=self.objects)
        return bool(held)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks of a tensor on their device, a new one."""
        total = tensor.detach().clone()
        if self.objects is not None:
            dist.all_reduce(total)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over ranks of a tensor on their device, a new one."""
        return self.sum(tensor) / self.world_size

    def found_by_first(self, key: str, find: Callable[[], int | None], ended: Event) -> int | None:
        """The first rank's `find()`, for all ranks that ask by this key, a new one each time; None once `ended`.

        For a thread beside the main one: where its work ends before the other ranks' has come to asking, they never
        will, so that it must not wait for them in a collective.
        """
        if self.store is None:
            return find()
        if self.is_first:
            self.store.set(key, json.dumps(find()))
        while not self.store.check([key]):  # `wait` would keep the main thread from the store
            if ended.wait(_LOOKS):
                return None
        found: int | None = json.loads(self.store.get(key))
        return found

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.objects is not None:
            dist.barrier(group=self.objects)


def alone(device: torch.device) -> Ranks:
    """One process, without torchrun."""
    return Ranks(0, 1, 0, device)


@contextmanager
def join_ranks(device_name: str) -> Iterator[Ranks]:
    """The ranks of torchrun's environment, NCCL between GPUs and gloo between CPUs; else one process.

    A GPU is the one of the process's local rank. Raises ValueError for a device that not every process can have.
    """
    if "WORLD_SIZE" not in os.environ:
        yield alone(pick_device(device_name))
        return
    _check_restarts()
    store, rank, world_size = next(rendezvous("env://", timeout=TIMEOUT))
    with _report_once(store):
        local_rank = int(os.environ["LOCAL_RANK"])
        with usage_errors():
            device = _device_of(device_name, local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
        objects = dist.new_group(backend="gloo", timeout=TIMEOUT)
        yield Ranks(rank, world_size, local_rank, device, objects, store)
        # After an error the others may be waiting in a collective, and this would wait for them: the process just ends.
        dist.destroy_process_group()


class LostRank(UserError):
    """Another process has ended."""


@contextmanager
def _report_once(store: dist.Store) -> Iterator[None]:
    """Let one rank report what several fail by; report a lost rank only where it could not say why."""
    try:
        yield
    except UserError as error:
        if _count(store, str(error)) > 1:
            raise SystemExit(error.exit_code) from None
        _count(store, "something")
        raise
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        if _count(store, "something") > 1:
            raise SystemExit(LostRank.exit_code) from None
        raise LostRank("another process of torchrun's was lost; the same command goes on") from error


def _count(store: dist.Store, problem: str) -> int:
    """Number of ranks that have this to report, with this one; 1 where the store has gone with its process."""
    try:
        return int(store.add(f"reported {problem}", 1))
    except RuntimeError:
        return 1


def _check_restarts() -> None:
    """Refuse what hangs: with torchrun's own store, processes that start again find what those before left in it.

    A machine that joins does not raise the count of restarts, under which torchrun keeps them apart (PyTorch issue
    135712); with the variable, every start has a store of its own.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        problem = f"torchrun with --max-restarts={restarts} may wait for processes that it has replaced"
        raise ValueError(f"{problem}; export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before it")


def _device_of(name: str, local_rank: int) -> torch.device:
    device = pick_device(name)
    if device.type != "cuda":
        return device
    if device.index is not None and int(os.environ["LOCAL_WORLD_SIZE"]) > 1:
        raise ValueError(f"device {name} for every process of torchrun; leave it at auto or cuda")
    if local_rank >= torch.cuda.device_count():
        problem = f"process {local_rank + 1} of torchrun finds {torch.cuda.device_count()} GPUs here"
        raise ValueError(f"{problem}; lower --nproc-per-node, or give --device cpu")
    return torch.device("cuda", local_rank if device.index is None else device.index)


class Loss(nn.Module):
    """loss_of(networks, batch) as a forward pass of the fitted module, so that DDP sees whatever is called of it."""

    def __init__(self, fitted: nn.Module) -> None:
        super().__init__()
        self.fitted = fitted

    def forward(self, loss_of: Callable[[Any, Any], Tensor], networks: Any, batch: Any) -> Tensor:
        return loss_of(networks, batch)


def replicated(fitted: nn.Module, ranks: Ranks) -> nn.Module:
    """The Loss of a module that every rank holds whole; its gradients are means over ranks."""
    if ranks.objects is None:
        return Loss(fitted)
    loss = DistributedDataParallel(Loss(fitted), gradient_as_bucket_view=True)
    loss.broadcast_buffers = False  # they never change; an attribute, since the argument's name depends on the release
    _settle(loss, fitted)
    return loss


def _settle(loss: nn.Module, fitted: nn.Module) -> None:
    """Have DDP lay out its buckets by an order of gradients that does not depend on when a run was resumed.

    It lays them out again before the second backward pass, in the first one's order, and with another layout four ranks
    add up in another order: without this, a resumed run's first step would differ in its last bits.
    """

    def touch(networks: Any, batch: Any) -> Tensor:
        fitted_ones = [parameter for parameter in fitted.parameters() if parameter.requires_grad]
        return torch.stack([0 * parameter.sum() for parameter in reversed(fitted_ones)]).sum()

    loss(touch, None, None).backward()
    fitted.zero_grad(set_to_none=True)


def held_back(loss: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Sum gradients over ranks at the batch's last part alone. FSDP sums each part's, and stores no more."""
    return nullcontext() if last or not isinstance(loss, DistributedDataParallel) else loss.no_sync()


def share_out(network: nn.Module, ranks: Ranks) -> None:
    """Leave each rank its share of the weights, layer by layer.

    They are gathered in their own dtype and autocast casts them, so that the step is the one of the other ways. They
    are let go after every forward pass: one that no backward pass follows (validation) would keep the old ones.
    """
    # FSDP warns of networks that return views, as in-place writes to them go wrong. Nothing writes to predictions.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for module in (*_layers(network), network):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _layers(module: nn.Module) -> Iterable[nn.Module]:
    """The members of the outermost lists of layers."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)


def send_first(module: nn.Module, ranks: Ranks) -> None:
    """Send the first rank's parameters and buffers to all."""
    if ranks.objects is not None:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)
