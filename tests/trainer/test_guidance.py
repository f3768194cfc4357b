"""Several guidance scales in one store: every batch says at which its rows were solved, wherever they are read."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from limbeck.diffusion import noise
from limbeck.diffusion.models.teachers import load_teacher
from limbeck.diffusion.recipes.grid import recipe_nfe
from limbeck.storage_schemas.dataset import open_dataset
from limbeck.storage_schemas.recipe import Guidance
from limbeck.trainer.evaluation.contenders import teacher_solver, teacher_solvers
from limbeck.trainer.evaluation.holdout import read_pairs
from limbeck.trainer.reading.chunks import Reading
from limbeck.trainer.reading.shards import ShardSource
from limbeck.trainer.stream import ArraySource, TrajectoryStream
from tests.guided import exact_output
from tests.trainer.test_stream import Numbered, assert_same, take, take_on_ranks

CPU = torch.device("cpu")
SCALES = (1.0, 2.0, 4.0)
CLASSES = "python:tests.guided:GaussianClasses"
both_formats = pytest.mark.parametrize("format", ["parquet", "webdataset"])


def source_of(store, split="train", **reading):
    return ShardSource(open_dataset(store), split, ("noise", "output"), reading=Reading(**reading))


def is_own(batch) -> bool:
    """Whether each row's guidance is that of its id, and the one by which its output follows from its noise."""
    drawn = noise.guidance_scales(0, "train", batch.ids.numpy(), SCALES)
    exact = exact_output(batch.states["noise"], batch.condition, batch.guidance)
    close = torch.allclose(batch.states["output"].double(), exact, rtol=0, atol=1e-4)
    return close and np.array_equal(batch.guidance.numpy(), drawn)


@both_formats
def test_rows_come_with_the_scale_that_they_were_solved_at(make_store, format):
    batches, _ = take(source_of(make_store(guidance=SCALES, format=format)), 24)
    assert all(is_own(batch) for batch in batches)
    assert {scale for batch in batches for scale in batch.guidance.tolist()} == set(SCALES)
    assert batches[0].guidance.dtype == torch.float64


@both_formats
def test_ranks_and_a_resume_have_the_bits_of_one_rank(make_store, format):
    source = source_of(make_store(guidance=SCALES, format=format))
    alone, _ = take(source, 12)
    for before, after in ((2, 4), (4, 1)):
        together, state = take_on_ranks(source, 7, before)
        later, _ = take_on_ranks(source, 5, after, state=state)
        assert_same([*together, *later], alone)


def test_a_holdout_row_has_the_scale_of_the_holdout_line(make_store):
    source = source_of(make_store(guidance=SCALES), "holdout")
    ids = np.arange(64)
    rows = source.load(ids)
    np.testing.assert_array_equal(rows.guidance, noise.guidance_scales(0, "holdout", ids, SCALES))
    assert not np.array_equal(rows.guidance, noise.guidance_scales(0, "train", ids, SCALES))


def test_a_substitute_has_its_own_scale(make_store, tmp_path):
    store = make_store(guidance=SCALES)
    dataset = open_dataset(store)
    (tmp_path / "pairs" / dataset.table[1].path).unlink()
    rows = source_of(store, on_corrupt="substitute").load(np.arange(256))
    assert rows.substituted.sum() == 64
    np.testing.assert_array_equal(rows.guidance, noise.guidance_scales(0, "train", rows.ids, SCALES))
    assert not np.array_equal(rows.guidance, noise.guidance_scales(0, "train", np.arange(256), SCALES))


def test_one_scale_is_every_rows_and_draws_nothing(make_store, monkeypatch):
    guided, plain = make_store("guided", guidance=2.5), make_store("plain")
    monkeypatch.setattr(noise, "guidance_index", None)
    assert set(source_of(guided).load(np.arange(256)).guidance) == {2.5}
    assert set(source_of(plain).load(np.arange(256)).guidance) == {1.0}
    images = ArraySource(torch.zeros(9, 1), torch.arange(9), "images")
    assert images.load(np.arange(9)).guidance.tolist() == [1.0] * 9


def test_micro_batches_and_moves_keep_each_rows_scale():
    (batch,), _ = take(Numbered(100), 1)
    parts = [part.to(CPU) for part in batch.split(5)]
    assert [len(part) for part in parts] == [5, 5, 5, 1]
    assert torch.equal(torch.cat([part.guidance for part in parts]), 1.0 + batch.ids)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_training_loop_is_told_the_scales(make_store, workers):
    store = make_store(guidance=SCALES)
    stream = TrajectoryStream(store.uri, batch_size=32, epochs=1)
    batches = list(DataLoader(stream, batch_size=None, num_workers=workers))
    assert sum(len(batch["ids"]) for batch in batches) == 256
    for batch in batches:
        exact = exact_output(batch["noise"], batch["condition"], batch["guidance"])
        torch.testing.assert_close(batch["output"].double(), exact, rtol=0, atol=1e-4)


def test_pairs_are_judged_at_their_own_scales(make_store):
    """The teacher's solver at its finest is the stored output, each sample at its own scale and at no other."""
    dataset = open_dataset(make_store(guidance=SCALES))
    pairs, teacher = read_pairs(dataset, "holdout", None, at_most=64), load_teacher(CLASSES)
    np.testing.assert_array_equal(pairs.guidance, noise.guidance_scales(0, "holdout", range(64), SCALES))
    fine = teacher_solver(teacher, dataset.recipe, "heun", 200)
    found = fine.outputs(pairs, batch=24, device=CPU)
    torch.testing.assert_close(found, pairs.output, rtol=0, atol=2e-3)
    parts = [part.guidance for part in pairs.parts(24, CPU)]
    assert [len(part) for part in parts] == [24, 24, 16]
    assert torch.equal(torch.cat(parts), pairs.guidance)


def test_network_calls_of_guided_samples(make_store):
    dataset, teacher = open_dataset(make_store(guidance=SCALES)), load_teacher(CLASSES)
    assert [contender.nfe for contender in teacher_solvers(teacher, dataset.recipe, (2, 8))] == [2, 8, 8, 16]
    solver = dataset.recipe.solver.model_copy(update={"name": "heun"})
    heun = dataset.recipe.model_copy(update={"solver": solver})
    at = {scale: heun.model_copy(update={"guidance": Guidance(scale=scale)}) for scale in (1.0, 2.0, SCALES)}
    assert [recipe_nfe(recipe) for recipe in at.values()] == [15, 30, 30]
    model = {**heun.teacher.model, "network": {"name": "residual_mlp", "told_guidance": True}}
    told = heun.model_copy(update={"teacher": heun.teacher.model_copy(update={"model": model})})
    assert recipe_nfe(told) == 15
