"""What test_ranks.py has torchrun start: fits of a few steps, from batches made by hand, told to a file.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.trainer.on_ranks CASES.json OUT.pt cpu
"""

import json
import math
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from limbeck.diffusion.flow_map import FlowMap
from limbeck.diffusion.models.spec import model_from_spec
from limbeck.trainer.config import FitConfig
from limbeck.trainer.loop import Stepper, step_seed
from limbeck.trainer.networks.networks import Networks
from limbeck.trainer.networks.uncertainty import Uncertainty
from limbeck.trainer.objectives.consistency import Consistency
from limbeck.trainer.objectives.ctm import ConsistencyTrajectory
from limbeck.trainer.objectives.denoising import Denoising
from limbeck.trainer.objectives.distances import PseudoHuber, l2
from limbeck.trainer.objectives.flow_map import FlowMapOracle
from limbeck.trainer.objectives.kind import Objective
from limbeck.trainer.objectives.knowledge import Knowledge
from limbeck.trainer.objectives.progressive import Progressive
from limbeck.trainer.objectives.reflow import Reflow
from limbeck.trainer.objectives.weights import Weighting
from limbeck.trainer.ranks import Ranks, alone, join_ranks
from limbeck.trainer.runs.trees import read_tree, write_tree
from limbeck.trainer.stream import Batch

ROWS, SHAPE = 32, (1, 4, 4)
TIMES, STATES = (80.0, 5.0, 0.0), ("noise", "state_1", "output")
# Each asks the student in another way: jump, the map itself, the network's own output.
OBJECTIVES: dict[str, Objective] = {
    "knowledge": Knowledge((80.0, 0.0)),
    "progressive": Progressive(TIMES, STATES),
    "denoising": Denoising(SHAPE, label_dropout=0.1, p_mean=-1.2, p_std=1.2),
    "flow_map": FlowMapOracle(TIMES, STATES, l2, Weighting("learned")),
    "ctm": ConsistencyTrajectory(TIMES, STATES, l2, Weighting("learned"), denoising_weight=1.0, seed=0),
    "consistency": Consistency(TIMES, STATES, PseudoHuber(0.1), Weighting("truncated_snr")),
    "reflow": Reflow(80.0, l2, Weighting()),
}
NETWORKS: dict[str, dict[str, Any]] = {
    "residual_mlp": {"width": 32, "depth": 2},
    "diffusers_unet2d": {
        "config": {
            "sample_size": 4, "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
            "block_out_channels": [32, 32], "norm_num_groups": 8, "attention_head_dim": 8,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        },
    },
}  # fmt: skip


def student(seed: int, network: str = "residual_mlp", *, second_time: bool = False, process: str = "ve") -> FlowMap:
    model = {
        "kind": "network",
        "sample_shape": list(SHAPE),
        "num_classes": 3 if network == "residual_mlp" else None,
        "process": {"name": process},
        "prediction": {"name": "edm", "sigma_data": 0.5} if process == "ve" else {"name": "velocity"},
        "network": {"name": network, **NETWORKS[network], **({"second_time": True} if second_time else {})},
    }
    torch.manual_seed(seed)
    return FlowMap(model_from_spec(model))


def config(**options: Any) -> FitConfig:
    defaults = {"steps": 20, "warmup": 2, "batch_size": ROWS, "lr": 0.01, "ema": 0.9, "clip": 0.05}
    return FitConfig(**{"out": "run", "data": "pairs", "init": "scratch", **defaults, **options})


def global_batch(step: int, order: list[int] | None = None, spoilt: int | None = None) -> Batch:
    """The rows of a step, in `order`; one `spoilt` by a target that float16 gradients can't bear."""
    generator = torch.Generator().manual_seed(step)
    noise = 80 * torch.randn(ROWS, *SHAPE, generator=generator)
    output = 0.5 + noise.flip(-1) / 160
    if spoilt is not None:
        output[spoilt] = 1e6
    states = {"noise": noise, "state_1": output + noise / 16, "output": output}
    uniforms = torch.rand(ROWS, 2 + math.prod(SHAPE), generator=generator, dtype=torch.float64)
    condition = torch.randint(-1, 3, (ROWS,), generator=generator)
    rows = torch.tensor(order or range(ROWS))
    return Batch(
        positions=rows + step * ROWS,
        ids=rows,
        condition=condition[rows],
        states={name: state[rows] for name, state in states.items()},
        uniforms=uniforms[rows],
        guidance=torch.ones(len(rows), dtype=torch.float64),
    )


def part(batch: Batch, ranks: Ranks) -> Batch:
    return list(batch.split(ROWS // ranks.world_size))[ranks.rank]


def run_case(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Fit as `case` says; figures of each step, and whole weights on the first rank.

    seed: of the first weights, plus the rank: the first rank's must be taken. save, load: a folder for a checkpoint.
    restart: begin a second stage before this step, with a look at what is served before every one. plain: as one
    process, though torchrun started it. network, second_time, process: of the student.
    """
    model = {name: case[name] for name in ("network", "second_time", "process") if name in case}
    fitted, options = student(case.get("seed", 0) + ranks.rank, **model), config(**case.get("options", {}))
    learned = Uncertainty(ranks.rank).to(ranks.device) if options.objective.weighting == "learned" else None
    networks = Networks(fitted.to(ranks.device), weighting=learned)
    stepper = Stepper(networks, options, ranks, sharded=case.get("sharded", False))
    if case.get("load"):
        load(stepper, Path(case["load"]))
    figures, scales, seen = [], [], []
    for step in range(*case.get("steps", (0, 6))):
        if "restart" in case:
            seen.append(look(stepper))
        if step == case.get("restart"):
            stepper.restart()
        batch = part(global_batch(step, case.get("order"), case.get("spoilt", {}).get(str(step))), ranks)
        found = stepper.step(OBJECTIVES[case.get("objective", "knowledge")], batch, seed=step_seed(0, step))
        figures.append((found["loss"].item(), found["grad_norm"].item()))
        scales.append(stepper.student.scaler.get_scale())
        if step + 1 == case.get("save_at"):
            save(stepper, Path(case["save"]))
    weights = get_model_state_dict(stepper.networks.student.denoiser, options=StateDictOptions(full_state_dict=True))
    weights = {name: value.cpu() for name, value in weights.items()}
    return {
        "losses": [loss for loss, _ in figures],
        "norms": [norm for _, norm in figures],
        "scales": scales,
        "seen": seen,
        "student": weights,
        "served": stepper.served_state(),
        "alike": len(set(ranks.gather(_digest(weights) + str(figures)))) == 1,
        "held": sum(p.to_local().numel() for p in stepper.networks.student.parameters()) if stepper.sharded else None,
    }


def look(stepper: Stepper) -> float:
    """The served student's size at some points."""
    with torch.no_grad(), stepper.evaluating() as served:
        points = torch.ones(8, *SHAPE, device=stepper.ranks.device)
        return served(points, torch.tensor(1.0, dtype=torch.float64)).square().mean().item()


def save(stepper: Stepper, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    write_tree(stepper.state_dict(), folder, rank=stepper.ranks.rank, world_size=stepper.ranks.world_size)


def load(stepper: Stepper, folder: Path) -> None:
    stepper.load_state_dict(read_tree(folder, like=stepper.state_dict() if stepper.sharded else None))


def _digest(weights: dict[str, torch.Tensor]) -> str:
    return "".join(value.numpy().tobytes().hex() for value in weights.values())


def tell_each_other(ranks: Ranks) -> dict[str, Any]:
    """Every way of Ranks to tell, with what each answered to each rank."""
    mine, ended = {"rank": ranks.rank}, threading.Event()
    answers = {
        "gather": ranks.gather(mine),
        "broadcast": ranks.broadcast(mine),
        "found": ranks.found_by_first("number", lambda: 7 + ranks.rank, ended),
        "any": (ranks.any(ranks.rank == ranks.world_size - 1), ranks.any(False)),
        "sum": ranks.sum(torch.tensor(ranks.rank + 1.0, device=ranks.device)).item(),
        "mean": ranks.mean(torch.tensor(ranks.rank + 1.0, device=ranks.device)).item(),
        "first": ranks.is_first,
    }
    if not ranks.is_first:
        thread = threading.Thread(target=lambda: ranks.found_by_first("what the first never asks", lambda: 0, ended))
        thread.start()
        ended.set()
        thread.join()
    ranks.barrier()
    return {"answers": ranks.gather(answers)}


def tensors() -> dict[str, torch.Tensor]:
    """Known ones of every kind that a sharded tree may hold; `spread` says how each is sharded."""
    torch.manual_seed(7)
    return {
        "even": torch.randn(8, 3),
        "uneven": torch.randn(5, 2, 3),
        "fewer rows than ranks": torch.randn(1, 6).to(torch.bfloat16),
        "columns": torch.randn(2, 7),
        "none": torch.empty(0, 4),
        "replicated": torch.randn(3, 3, dtype=torch.float64),
        "both": torch.randn(5, 7),
        "twice": torch.randn(9, 2),
        "rows in each half": torch.randn(3, 4),
        "plain": torch.arange(5),
        "scalar": torch.tensor(2.5),
    }


def spread(ranks: Ranks, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each as this process holds it: on one mesh of all, or on a mesh of two dimensions."""
    line = init_device_mesh("cpu", (ranks.world_size,))
    rows = 2 if ranks.world_size % 2 == 0 else 1
    sheet = init_device_mesh("cpu", (rows, ranks.world_size // rows))
    ways = {
        **dict.fromkeys(("even", "uneven", "fewer rows than ranks", "none"), (line, (Shard(0),))),
        "columns": (line, (Shard(1),)),
        "replicated": (line, (Replicate(),)),
        "both": (sheet, (Shard(0), Shard(1))),
        "twice": (sheet, (Shard(0), Shard(0))),
        "rows in each half": (sheet, (Replicate(), Shard(0))),
    }
    held = {name: distribute_tensor(values[name], *way) for name, way in ways.items()}
    return {name: held.get(name, value.clone()) for name, value in values.items()}


def through_the_disk(ranks: Ranks, told: dict[str, Any]) -> list[str]:
    """Write the known tensors to one folder, read them from others; the names of those that came back other."""
    if "write" in told:
        write_tree({"t": spread(ranks, tensors())}, Path(told["write"]), rank=ranks.rank, world_size=ranks.world_size)
        ranks.barrier()
    wrong = []
    for folder in told["read"]:
        like = {"t": spread(ranks, {name: torch.zeros_like(value) for name, value in tensors().items()})}
        found, want = read_tree(Path(folder), like=like)["t"], spread(ranks, tensors())
        for name, there in want.items():
            here = found[name]
            pair = [one.to_local() if isinstance(one, DTensor) else one for one in (here, there)]
            if type(here) is not type(there) or here.shape != there.shape or not torch.equal(*pair):
                wrong.append(f"{name} of {folder} on rank {ranks.rank}")
    return [one for part in ranks.gather(wrong) for one in part]


def main() -> None:
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    with join_ranks(sys.argv[3]) as mine:
        trees = cases.pop("trees", None)
        told = {name: run_case(case, alone(mine.device) if case.get("plain") else mine) for name, case in cases.items()}
        if trees:
            told["trees"] = {"wrong": through_the_disk(mine, trees)}
        told["told"] = tell_each_other(mine)
        if mine.is_first:
            torch.save(told, sys.argv[2])


if __name__ == "__main__":
    main()
