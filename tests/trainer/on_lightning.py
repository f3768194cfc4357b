"""A fit with Lightning, whose seen ids are told to a file: what test_trajectory_stream.py calls, or has torchrun start.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.trainer.on_lightning STORE OUT STEPS
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from limbeck.trainer.stream import TrajectoryStream


def main(store: str, out: Path, steps: int) -> None:
    """Up to `steps` steps, from the checkpoint in `out` if there is one, and the checkpoint after them."""
    import lightning.pytorch as lightning  # takes seconds

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.seen = torch.nn.Linear(2, 2), []

        def setup(self, stage: str) -> None:
            self.stream = TrajectoryStream(store, batch_size=16)

        def train_dataloader(self) -> DataLoader:
            return DataLoader(self.stream, batch_size=None)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            # Lightning fetches a batch ahead: what it has trained on is the number to be relied on.
            batches = self.trainer.fit_loop.total_batch_idx + 1
            checkpoint["stream"] = self.stream.state_dict(batches=batches)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.stream.load_state_dict(checkpoint["stream"])

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            self.seen.append(batch["ids"].tolist())
            return (self.net(batch["noise"].float()) - batch["output"].float()).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer = lightning.Trainer(
        accelerator="cpu", devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)), max_steps=steps,
        default_root_dir=out, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    saved, module = out / "saved.ckpt", Module()
    trainer.fit(module, ckpt_path=saved if saved.exists() else None, weights_only=False)
    trainer.save_checkpoint(saved)
    told = out / f"{trainer.global_rank}_of_{trainer.world_size}.json"
    earlier = json.loads(told.read_text()) if told.exists() else []
    told.write_text(json.dumps([*earlier, module.seen]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
