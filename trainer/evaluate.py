"""`limbeck evaluate`: students beside their teacher's own solvers, at the same number of network calls."""

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from pydantic import Field, model_validator
from torch import Tensor

from limbeck.diffusion.models.teachers import Teacher
from limbeck.diffusion.recipes.devices import pick_device
from limbeck.diffusion.recipes.grid import recipe_nfe
from limbeck.diffusion.recipes.teacher import TeacherSource
from limbeck.storage_schemas.command_line import Config
from limbeck.storage_schemas.dataset import Dataset, open_dataset
from limbeck.storage_schemas.errors import UsageError, UserError, usage_errors
from limbeck.storage_schemas.images import KINDS
from limbeck.storage_schemas.places import LocalPath, Source, StorePlace
from limbeck.storage_schemas.recipe import Recipe
from limbeck.storage_schemas.store import Store
from limbeck.trainer.classifier import load_classifier, shipped_classifier, shipped_image_source
from limbeck.trainer.evaluation.contenders import Contender, students, teacher_solvers
from limbeck.trainer.evaluation.costs import Costs, student_costs
from limbeck.trainer.evaluation.holdout import Pairs, read_pairs
from limbeck.trainer.evaluation.metrics import Frechet, Neighbours, holdout_error, sliced_wasserstein, variance
from limbeck.trainer.evaluation.plots import check_plots, plot_quality
from limbeck.trainer.evaluation.sampling import Way
from limbeck.trainer.evaluation.tables import show, terminal
from limbeck.trainer.reading.images import load_images

_MOST = 2048


class EvaluateConfig(Config):
    """Measure students and their teacher's own solvers at the same NFE, on noises that no student was fitted on."""

    runs: tyro.conf.Positional[tuple[LocalPath, ...]] = Field(description="Folders of fits, or of saved models.")
    data: StorePlace = Field(description="Store whose holdout noises and outputs are used: a folder or s3://... URI.")
    dataset: str = Field("main", description="Name of the dataset in the store.")
    manifest: int | None = Field(None, ge=1, description="Number of the manifest; default: the latest one.")
    nfe: tuple[int, ...] = Field((), description="Numbers of network calls; default: all that the runs serve.")
    count: int | None = Field(
        None, ge=2, description=f"Samples of each contender; default: all of the holdout split, up to {_MOST}."
    )
    sampling: Way | None = Field(
        None, description="How students make several steps, jump or renoise; default: as each was fitted."
    )
    images: Source | None = Field(
        None, description=f"Real images to compare with: {KINDS}; default: by the sample shape."
    )
    classifier: LocalPath | None = Field(
        None, description="Folder that limbeck classifier wrote; default: the classifier that is shipped."
    )
    teacher: Source | None = Field(
        None, description="URI of the teacher; default: the store's, or one that is shipped."
    )
    out: LocalPath | None = Field(None, description="Folder for evaluation.json and .png; default: the first run's.")
    device: str = Field("auto", description="Device: auto, cpu, cuda, cuda:1, ...")
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = Field(
        False, description="Print evaluation.json instead of a table."
    )

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        if not self.runs:
            raise ValueError("no run is named; give the folder of one or more")
        if self.nfe and min(self.nfe) < 1:
            raise ValueError(f"nfe {list(self.nfe)} holds a number below 1; count network calls, such as 1 2 4 8")
        return self


@dataclass(frozen=True)
class Distances:
    """Distances of samples from real ones; None without a classifier to measure in."""

    sliced_wasserstein: float
    frechet: float | None = None
    density: float | None = None
    coverage: float | None = None


@dataclass(frozen=True)
class Row:
    """One contender's figures. kind: student, teacher or stored. costs: what a student took, if its run is there."""

    name: str
    kind: str
    steps: int
    nfe: int
    holdout_error: float
    distances: Distances
    costs: Costs | None = None

    def plain(self) -> dict[str, Any]:
        """The row as in evaluation.json."""
        figures = asdict(self)
        distances, costs = figures.pop("distances"), figures.pop("costs")
        return figures | distances | {"costs": costs}


@dataclass(frozen=True)
class Reference:
    """Reference samples in two parts: samples are compared with `target`, and `other` gives the floor."""

    name: str
    target: Tensor
    other: Tensor
    frechet: Frechet | None = None
    neighbours: Neighbours | None = None

    def distances(self, samples: Tensor) -> Distances:
        """Distances of samples from the target."""
        wasserstein = sliced_wasserstein(samples, self.target)
        if self.frechet is None or self.neighbours is None:
            return Distances(wasserstein)
        return Distances(wasserstein, self.frechet(samples), *self.neighbours(samples))


def run_evaluate(config: EvaluateConfig) -> int:
    """The command: measure, write evaluation.json and evaluation.png, show."""
    check_plots()
    evaluation = evaluate(config)
    out = config.out or config.runs[0]
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(evaluation, indent=1)
    (out / "evaluation.json").write_text(text + "\n")
    plot_quality(evaluation, out / "evaluation.png")
    if config.as_json:
        print(text)
    else:
        show(evaluation, terminal())
        print(f"{out / 'evaluation.json'}, {out / 'evaluation.png'}")
    return 0


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Everything that evaluation.json says."""
    with usage_errors():
        device = pick_device(config.device)
    dataset = open_dataset(Store.open(config.data), config.dataset, config.manifest)
    pairs = read_pairs(dataset, "holdout", config.count, at_most=_MOST)
    with usage_errors():
        contenders, notes = students(config.runs, config.nfe, dataset.recipe, device=device, way=config.sampling)
    teacher = _teacher(config, dataset, device, notes)
    reference = _reference(config, dataset, len(pairs), device, notes)
    if teacher is not None:
        nfes = config.nfe or tuple({contender.nfe for contender in contenders})
        contenders += teacher_solvers(teacher, dataset.recipe, nfes)
    rows = [*_rows(contenders, pairs, reference, dataset, device), _stored_row(pairs, reference, dataset.recipe)]
    return {
        "count": len(pairs),
        "machine": machine(device),
        "dataset": config.dataset,
        "manifest": dataset.manifest.number,
        "recipe": dataset.recipe.id,
        "reference": reference.name,
        "output_variance": variance(pairs.output),
        "floor": _floor(reference),
        "rows": [row.plain() for row in sorted(rows, key=lambda row: (row.nfe, row.kind))],
        "notes": notes,
    }


def _teacher(config: EvaluateConfig, dataset: Dataset, device: torch.device, notes: list[str]) -> Teacher | None:
    """The teacher's network; where it can't be had, a note says so, unless the user named one."""
    try:
        return TeacherSource(dataset.store, dataset.recipe, config.teacher).load(device=device)
    except UserError as error:
        if config.teacher is not None:
            raise UsageError(str(error)) from error
        notes.append(f"no rows of the teacher at the same NFE: {error}")
        return None


def _reference(
    config: EvaluateConfig, dataset: Dataset, count: int, device: torch.device, notes: list[str]
) -> Reference:
    """Real images where there are some of this shape, else the teacher's outputs for noises of the train split."""
    shape = dataset.recipe.sample_shape
    source = config.images or shipped_image_source(shape)
    if source is None:
        notes.append(f"no Frechet distance: there are no real images of shape {list(shape)}; name some by --images")
        return _stored_reference(dataset, count)
    with usage_errors():
        target, other = (load_images(source, split)[0] for split in ("reference", "train"))
        if tuple(target.shape[1:]) != shape:
            raise ValueError(
                f"{source} has images {list(target.shape[1:])}, the data {list(shape)}; name other --images"
            )
        found = load_classifier(config.classifier) if config.classifier else shipped_classifier(source, shape)
    if found is None:
        notes.append(f"no Frechet distance: no classifier of {source} is shipped; fit one and name it by --classifier")
        return Reference(source, target, other)
    classifier, saved = found[0].to(device), found[1]
    notes.append(
        "Frechet distance, density and coverage are of a classifier's features, "
        f"accuracy {saved.about['figures']['accuracy']:.4f}"
    )
    with usage_errors():
        return Reference(source, target, other, Frechet(classifier, target), Neighbours(classifier, target))


def _stored_reference(dataset: Dataset, count: int) -> Reference:
    """Outputs for noises of the train split: twice `count` where there are so many, in two halves."""
    outputs = read_pairs(dataset, "train", None, at_most=2 * count).output
    target, other = outputs.tensor_split(2)
    return Reference("stored outputs of train noises", target, other)


def _rows(
    contenders: list[Contender], pairs: Pairs, reference: Reference, dataset: Dataset, device: torch.device
) -> Iterator[Row]:
    # The recipe's micro-batch: its own solver on its own grid would give the stored bits again.
    for contender in contenders:
        outputs = contender.outputs(pairs, batch=dataset.recipe.micro_batch, device=device)
        figures = holdout_error(outputs, pairs.output), reference.distances(outputs)
        costs = (
            student_costs(Path(contender.name), contender.steps, dataset.store.uri)
            if contender.kind == "student"
            else None
        )
        yield Row(contender.name, contender.kind, contender.steps, contender.nfe, *figures, costs)


def _stored_row(pairs: Pairs, reference: Reference, recipe: Recipe) -> Row:
    name = f"teacher {recipe.solver.name}, stored"
    return Row(name, "stored", recipe.num_steps, recipe_nfe(recipe), 0.0, reference.distances(pairs.output))


def machine(device: torch.device) -> str:
    """A device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _floor(reference: Reference) -> dict[str, Any]:
    counts = [len(reference.other), len(reference.target)]
    return {
        "of": f"two halves of {reference.name}",
        "counts": counts,
        **asdict(reference.distances(reference.other)),
    }
