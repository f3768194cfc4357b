"""The models that a run saves: its last, its best and each stage's."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.checkpoint import Checkpoint, pack
from limbeck.diffusion.models.spec import model_from_spec
from limbeck.trainer.config import FitConfig
from limbeck.trainer.objectives.kind import Stage
from limbeck.trainer.planning.plan import Plan
from limbeck.trainer.runs.place import Place
from limbeck.trainer.runs.record import RunRecord


class Models:
    """Native checkpoints of one network in a run's folder, and their copies where it has another place."""

    def __init__(self, config: FitConfig, record: RunRecord, place: Place) -> None:
        self._config, self._model, self._init, self._place = config, record.model, record.init, place

    def save(
        self, weights: Mapping[str, Tensor], plan: Plan, stage: Stage, *, steps: int, folders: Sequence[str]
    ) -> None:
        """The student of a stage with these weights, after `steps` steps of the run, into each folder."""
        module = model_from_spec(self._model)
        module.load_state_dict(weights)
        saved = Checkpoint(
            model=self._model,
            weights=pack(module, dtype=getattr(torch, self._config.saving.save_dtype)),
            grids=stage.served,
            about={
                "objective": self._config.objective.model_dump(mode="json", exclude_none=True),
                "stage": stage.name,
                "columns": list(stage.objective.columns),
                "sampling": stage.sampling,
                "steps": steps,
                "batch_size": self._config.batch.size,
                "seed": self._config.seed,
                "reads": plan.reads,
                "labels": plan.labels,
                "guidance_scales": list(plan.guidance),
                **({"from_noise": "scaled"} if self._config.objective.kind.process else {}),
                **({"init": self._init} if self._init else {}),
            },
        )
        for folder in folders:
            checkpoint.save(saved, self._config.out / folder)
            self._place.put(folder)
