"""What test_trajectory_stream.py has torchrun start: a fit with accelerate, whose seen ids are told to a file.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.trainer.on_accelerate STORE OUT STEPS
"""

import itertools
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from limbeck.trainer.stream import TrajectoryStream


def main(store: str, out: Path, steps: int) -> None:
    """Some steps, from the state in `out` if there is one, and the state after them."""
    accelerator = Accelerator(cpu=True)
    stream = TrajectoryStream(store, batch_size=16)
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    accelerator.register_for_checkpointing(stream)
    if (out / "state").exists():
        accelerator.load_state(out / "state")
    seen = []
    for batch in itertools.islice(DataLoader(stream, batch_size=None), steps):
        accelerator.backward((model(batch["noise"].float()) - batch["output"].float()).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        seen.append(batch["ids"].tolist())
    accelerator.save_state(out / "state")
    (out / f"{accelerator.process_index}_of_{accelerator.num_processes}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
