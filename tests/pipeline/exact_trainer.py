"""Stands in for the trainer where a test needs its answer in closed form: on Gaussian data a step is a line."""

import json
from pathlib import Path

import numpy as np
import torch

from limbeck.diffusion.flow_map import FlowMap, jump_coefficients
from limbeck.diffusion.grids import subset_indices
from limbeck.diffusion.models import checkpoint
from limbeck.diffusion.models.checkpoint import Checkpoint, pack
from limbeck.diffusion.models.spec import model_from_spec, process_spec
from limbeck.diffusion.process import VE
from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.record import SPLITS, state_column
from limbeck.storage_schemas.store import Store

SPEC = {
    "kind": "network",
    "sample_shape": [2],
    "num_classes": None,
    "process": process_spec(VE()),
    "prediction": {"name": "sample"},
    "network": {"name": "affine"},
}


class ExactTrainer:
    """Fits the least-squares student of a round to its data, whose every x_0 is then wrong by `defect`.

    log: what was asked of it. killed: a word of the log at which, once, the process dies, for all that it can tell.
    """

    def __init__(self, monkeypatch, *, defect: float = 0.0, killed: str = "") -> None:
        self.defect, self.killed, self.log = defect, killed, []
        monkeypatch.setattr("limbeck.pipeline.rounds.launch.fit", self.fit)
        monkeypatch.setattr("limbeck.pipeline.rounds.launch.evaluate", self.evaluate)

    def fit(self, config, part, *, lock):
        words = dict(zip(part.fit[1::2], part.fit[2::2], strict=False))
        name = "direct" if part.out.name == "direct" else part.name
        self._note(f"fit {name}")
        dataset = open_dataset(Store.open(words["--data"]), words["--dataset"])
        schedule = config.schedule if part.out.name == "direct" else (part.steps,)
        student = best_student(dataset, schedule, defect=self.defect)
        checkpoint.save(student, part.student)
        self._note(f"fitted {name}")

    def evaluate(self, words):
        run, _, store, _, name, *_ = words
        self._note(f"evaluate {Path(run).name}")
        found, dataset = checkpoint.load(f"{run}/model"), open_dataset(Store.open(store), name)
        columns = dataset.read(dataset.shards("holdout")[0])
        rows = []
        for steps, times in found.grids.items():
            samples = sampled(found, columns["noise"], times)
            error = float(np.square(samples - columns["output"]).mean())
            rows.append({"kind": "student", "name": run, "steps": steps, "holdout_error": error})
        return {"rows": rows, "output_variance": float(columns["output"].var())}

    def _note(self, what):
        self.log.append(what)
        if what == self.killed:
            self.killed = ""
            raise SystemExit(137)


def sampled(student: Checkpoint, noise: np.ndarray, times) -> np.ndarray:
    with torch.no_grad():
        return (
            FlowMap(student.build()).sample(torch.from_numpy(noise), torch.tensor(times, dtype=torch.float64)).numpy()
        )


def best_student(dataset, schedule, *, defect: float) -> Checkpoint:
    """mu(x_t, t) = gain x_t + shift of each segment's start, by least squares, in the affine network's own terms.

    Of the first number of steps; for the others it is merely asked.
    """
    recipe = dataset.recipe
    indices = subset_indices(recipe.num_steps, schedule[0])
    columns = [dataset.read(shard) for shard in dataset.shards(SPLITS[0])]
    states = [np.concatenate([part[state_column(k, recipe.num_steps)] for part in columns]) for k in indices]
    times = torch.tensor([recipe.times[k] for k in indices], dtype=torch.float64)
    lines = [line(x_t, x_s, t, s) for x_t, x_s, t, s in zip(states, states[1:], times, times[1:], strict=False)]
    wanted = np.array([[*gain, *(shift + defect)] for gain, shift in lines])
    module = model_from_spec(SPEC)
    affine = module.network
    features = affine.time(module.prediction.network_time(module.process, times[:-1]).float()).double()
    weights = torch.linalg.lstsq(features, torch.from_numpy(wanted), driver="gelsd").solution
    affine.coefficients.weight.data = weights.T.float().contiguous()
    reads = {"recipe": recipe.id, "dataset": dataset.manifest.dataset, "manifest": dataset.manifest.number}
    about = {"reads": reads, "objective": {"name": "progressive"}, "steps": 1, "batch_size": len(states[0])}
    grids = {steps: tuple(times[:: schedule[0] // steps].tolist()) for steps in schedule}
    return Checkpoint(SPEC, pack(module), grids, json.loads(json.dumps(about)))


def line(x_t, x_s, t, s):
    """(gain [2], shift [2]) of the x_0 whose DDIM step from x_t is x_s, coordinate by coordinate."""
    keep, pull = (value.item() for value in jump_coefficients(VE(), t, s))
    target = (x_s.astype(np.float64) - keep * x_t) / pull
    fits = [np.polyfit(x_t[:, i].astype(np.float64), target[:, i], 1) for i in range(target.shape[1])]
    return np.array(fits).T
