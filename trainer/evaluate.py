"""`python -m trainer evaluate`: students beside their teacher's own solvers, at the same number of network calls."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table
from torch import Tensor

from diffusion.teachers import Teacher
from storage_schemas.command_line import Config
from storage_schemas.dataset import Dataset, open_dataset
from storage_schemas.errors import UserError, usage_errors
from storage_schemas.recipe import Recipe
from storage_schemas.store import Store
from trainer.contenders import Contender, recipe_nfe, students, teacher_solvers
from trainer.features import load_classifier, shipped_classifier, shipped_image_source
from trainer.holdout import Pairs, read_pairs
from trainer.images import load_images
from trainer.metrics import Frechet, holdout_error, sliced_wasserstein, variance
from trainer.plan import pick_device
from trainer.plots import plot_quality
from trainer.teacher import recipe_teacher

_MOST = 2048


class EvaluateConfig(Config):
    """Measure students and their teacher's own solvers at the same NFE, on noises that no student was fitted on."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = Field(description="Folders of fits, or of saved models.")
    data: str = Field(description="Store whose holdout noises and outputs are used: a folder or s3://... URI.")
    dataset: str = Field("main", description="Name of the dataset in the store.")
    manifest: int | None = Field(None, ge=1, description="Number of the manifest; the latest one unless told.")
    nfe: tuple[int, ...] = Field((), description="Numbers of network calls; all that the runs serve unless told.")
    count: int | None = Field(
        None, ge=2, description=f"Samples of each contender; all of the holdout up to {_MOST} unless told."
    )
    images: str | None = Field(
        None, description="Real images to compare with: sklearn:digits or npz:PATH; by the sample shape unless told."
    )
    classifier: Path | None = Field(
        None, description="Folder of a classifier (python -m trainer classifier); the shipped one unless told."
    )
    teacher: str | None = Field(None, description="Teacher's URI; from the store, or the recipe's, unless told.")
    out: Path | None = Field(None, description="Folder for evaluation.json and .png; the first run's unless told.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
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
class Row:
    """One contender's figures. kind: student, teacher or stored; frechet is None where it can't be measured."""

    name: str
    kind: str
    steps: int
    nfe: int
    holdout_error: float
    sliced_wasserstein: float
    frechet: float | None


@dataclass(frozen=True)
class Reference:
    """What samples should look like, in two parts: they are compared with `target`, the floor is what `other` is at."""

    name: str
    target: Tensor
    other: Tensor
    frechet: Frechet | None

    def distances(self, samples: Tensor) -> tuple[float, float | None]:
        """(sliced Wasserstein, Frechet) of samples from the target."""
        return sliced_wasserstein(samples, self.target), None if self.frechet is None else self.frechet(samples)


def run_evaluate(config: EvaluateConfig) -> int:
    """The command: measure, write evaluation.json and evaluation.png, show."""
    evaluation = evaluate(config)
    out = config.out or config.runs[0]
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(evaluation, indent=1)
    (out / "evaluation.json").write_text(text + "\n")
    plot_quality(evaluation, out / "evaluation.png")
    if config.as_json:
        print(text)
    else:
        show(evaluation, Console())
        print(f"{out / 'evaluation.json'}, {out / 'evaluation.png'}")
    return 0


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Everything that evaluation.json says."""
    with usage_errors():
        device = pick_device(config.device)
    dataset = open_dataset(Store.open(config.data), config.dataset, config.manifest)
    pairs = read_pairs(dataset, "holdout", config.count, at_most=_MOST)
    with usage_errors():
        contenders, notes = students(config.runs, config.nfe, dataset.recipe, device=device)
    teacher = _teacher(config, dataset, device, notes)
    reference = _reference(config, dataset, len(pairs), notes)
    if teacher is not None:
        nfes = config.nfe or tuple({contender.nfe for contender in contenders})
        contenders += teacher_solvers(teacher, dataset.recipe, nfes)
    rows = [*_rows(contenders, pairs, reference, dataset, device), _stored_row(pairs, reference, dataset.recipe)]
    return {
        "count": len(pairs),
        "dataset": config.dataset,
        "manifest": dataset.manifest.number,
        "recipe": dataset.recipe.id,
        "reference": reference.name,
        "output_variance": variance(pairs.output),
        "floor": _floor(reference),
        "rows": [asdict(row) for row in sorted(rows, key=lambda row: (row.nfe, row.kind))],
        "notes": notes,
    }


def _teacher(config: EvaluateConfig, dataset: Dataset, device: torch.device, notes: list[str]) -> Teacher | None:
    """The teacher's network; where it can't be had, a note says so, unless the user named one."""
    try:
        return recipe_teacher(dataset.store, dataset.recipe, uri=config.teacher, device=device)
    except UserError as error:
        if config.teacher is not None:
            raise
        notes.append(f"no rows of the teacher at the same NFE: {error}")
        return None


def _reference(config: EvaluateConfig, dataset: Dataset, count: int, notes: list[str]) -> Reference:
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
        return Reference(source, target, other, None)
    classifier, saved = found
    notes.append(f"Frechet distance in a classifier's features, accuracy {saved.about['figures']['accuracy']:.4f}")
    return Reference(source, target, other, Frechet(classifier, target))


def _stored_reference(dataset: Dataset, count: int) -> Reference:
    """Outputs for noises of the train split: twice `count` where there are so many, in two halves."""
    outputs = read_pairs(dataset, "train", None, at_most=2 * count).output
    target, other = outputs.tensor_split(2)
    return Reference("stored outputs of train noises", target, other, None)


def _rows(
    contenders: list[Contender], pairs: Pairs, reference: Reference, dataset: Dataset, device: torch.device
) -> Iterator[Row]:
    # The recipe's micro-batch: its own solver on its own grid would give the stored bits again.
    for contender in contenders:
        outputs = contender.outputs(pairs, batch=dataset.recipe.micro_batch, device=device)
        error = holdout_error(outputs, pairs.output)
        yield Row(contender.name, contender.kind, contender.steps, contender.nfe, error, *reference.distances(outputs))


def _stored_row(pairs: Pairs, reference: Reference, recipe: Recipe) -> Row:
    name = f"teacher {recipe.solver.name}, stored"
    return Row(name, "stored", recipe.num_steps, recipe_nfe(recipe), 0.0, *reference.distances(pairs.output))


def _floor(reference: Reference) -> dict[str, Any]:
    wasserstein, frechet = reference.distances(reference.other)
    counts = [len(reference.other), len(reference.target)]
    return {
        "of": f"two halves of {reference.name}",
        "counts": counts,
        "sliced_wasserstein": wasserstein,
        "frechet": frechet,
    }


_FIGURES = {"holdout_error": "holdout error", "sliced_wasserstein": "sliced Wasserstein", "frechet": "Frechet"}


def show(evaluation: Mapping[str, Any], console: Console) -> None:
    """The evaluation as a table, with what one must know to read it."""
    figures = [name for name in _FIGURES if name != "frechet" or evaluation["floor"]["frechet"] is not None]
    table = Table(title=f"{evaluation['count']} samples each, against {evaluation['reference']}")
    table.add_column("", overflow="fold")
    for heading in ("steps", "NFE", *(_FIGURES[name] for name in figures)):
        table.add_column(heading, justify="right")
    for index, row in enumerate(evaluation["rows"]):
        last = index + 1 == len(evaluation["rows"]) or evaluation["rows"][index + 1]["nfe"] != row["nfe"]
        cells = [_figure(row[name]) for name in figures]
        table.add_row(row["name"], str(row["steps"]), str(row["nfe"]), *cells, end_section=last)
    floor = evaluation["floor"]
    table.add_row("floor", "", "", *(_figure(floor.get(name)) for name in figures))
    console.print(table)
    console.print(
        f"holdout error: per dimension, of a variance of {_figure(evaluation['output_variance'])}", highlight=False
    )
    console.print(f"floor: {floor['of']}, {' samples against '.join(map(str, floor['counts']))}", highlight=False)
    for note in evaluation["notes"]:
        print(f"note: {note}", file=sys.stderr)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
