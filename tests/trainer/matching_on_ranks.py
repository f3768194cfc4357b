"""What test_critic.py has torchrun start: fits with a critic of a few steps, told to a file.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.trainer.matching_on_ranks FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from limbeck.trainer.loop import Stepper, step_seed
from limbeck.trainer.ranks import Ranks, join_ranks
from tests.trainer.networks.test_critic import ALTERNATING, FITS, ROWS, batch, config, networks_of, student
from tests.trainer.on_ranks import load, save

STEPS, CUT = 6, 3
CASES: dict[str, dict[str, Any]] = {
    **{f"{name} ddp": {"name": name, **FITS[name]} for name in FITS},
    "dmd fsdp": {"name": "dmd", "objective": {"critic_steps": 2}, "critic": {"ema": 0.8}, "parallel": "fsdp"},
    "sid fsdp": {"name": "sid", "parallel": "fsdp"},
    "vsd fsdp": {"name": "vsd", "objective": {"student_steps": 2, "critic_steps": 3}, "parallel": "fsdp"},
}


def begun(case: dict[str, Any], ranks: Ranks) -> Stepper:
    """Each rank brings another student: the first one's is taken."""
    fit = config(**case)
    networks = networks_of(fit, fitted=student(1 + ranks.rank))
    return Stepper(networks, fit, ranks, sharded=case.get("parallel") == "fsdp" and ranks.objects is not None)


def figures(case: dict[str, Any], ranks: Ranks, folder: Path) -> list[dict[str, float]]:
    """Of every step, with a checkpoint and a new process's start in the middle."""
    stepper, told = begun(case, ranks), []
    for step in range(STEPS):
        if step == CUT:
            save(stepper, folder)
            ranks.barrier()
            stepper = begun(case, ranks)
            load(stepper, folder)
        part = list(batch(step).split(ROWS // ranks.world_size))[ranks.rank]
        objective = ALTERNATING[case["name"]]
        if case.get("parallel") == "fsdp" and case["name"] == "dmd":
            objective = type(objective)(**{**vars(objective), "gan": 0.0})
        found = stepper.step(objective, part, seed=step_seed(0, step), number=step)
        told.append({key: value.item() for key, value in found.items()})
    return told


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with join_ranks("cpu") as mine:
        told = {name: figures(case, mine, folder / name.replace(" ", "-")) for name, case in CASES.items()}
        if mine.is_first:
            (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
