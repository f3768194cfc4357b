"""Shards that are wrong but whose checksums are right: written through the protocol's own functions."""

from pathlib import Path

import numpy as np
import torch

from limbeck.diffusion.recipes.teacher import TeacherSource
from limbeck.pipeline.producer import WorkOrder, publish
from limbeck.pipeline.solve import Solved, denoise_of, solve_task
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.commit import list_committed, read_commits
from limbeck.storage_schemas.dataset import open_dataset, seal
from limbeck.storage_schemas.manifest import ManifestDraft
from limbeck.storage_schemas.shards import Shard, ShardTable
from limbeck.storage_schemas.store import Store

CPU = torch.device("cpu")


def spoil(folder, change=lambda columns, dataset, task: columns, *, tasks=None, lost=lambda task: ()):
    """Write the named tasks (all by default) anew as change(columns, dataset, task) has them, and seal that.

    lost(task): ids that are quarantined.
    """
    store = Store.open(str(folder))
    dataset = open_dataset(store)
    order = WorkOrder(store, dataset.recipe, dataset.layout, "cpu", 1)
    for shard in dataset.table:
        if tasks is None or shard.task in tasks:
            commit = dataset.commit(shard)
            columns = {name: np.array(column) for name, column in dataset.read(shard).items()}
            columns = change(columns, dataset, commit.task) or columns
            for path in (commit.commit_path, commit.record_path):
                (Path(folder) / path).unlink()
            ids = tuple(lost(commit.task))
            kept = ~np.isin(columns["sample_id"], ids)
            columns = {name: column[kept] for name, column in columns.items()} if ids else columns
            solved = Solved(columns, commit.quarantined + ids, commit.nfe)
            publish(order, commit.task, solved, seconds=commit.seconds, machine=commit.machine)
    for manifest in Path(folder).glob(f"{paths.manifests_folder('main')}/*.json"):
        manifest.unlink()
    reseal(store, dataset)


def reseal(store, dataset):
    recipe_id, layout = dataset.recipe.id, dataset.layout
    commits = read_commits(store, recipe_id, layout.id, sorted(list_committed(store, recipe_id, layout.id)))
    draft = ManifestDraft(
        dataset="main",
        parent=None,
        writer="somebody",
        recipe_id=recipe_id,
        layout=layout,
        window=dataset.manifest.window,
    )
    seal(store, draft, ShardTable.of([Shard.of(commit) for commit in commits.values()]))


def solved_otherwise(columns, dataset, task):
    """As a worker would whose code takes another solver than the recipe's."""
    other = dataset.recipe.model_copy(update={"solver": dataset.recipe.solver.model_copy(update={"name": "ab2"})})
    teacher = TeacherSource(dataset.store, dataset.recipe, None).load()
    denoise = denoise_of(other, teacher.denoiser, device=CPU)
    return solve_task(other, denoise, teacher.process, task, device=CPU).columns


def swap_two_noises(columns, dataset, task):
    columns["noise"][[3, 9]] = columns["noise"][[9, 3]]


def use_a_noise_twice(columns, dataset, task):
    columns["noise"][9] = columns["noise"][3]


def poison_one_output(columns, dataset, task):
    columns["output"][5] += np.float16(0.02)


def bias_labels(columns, dataset, task):
    columns["condition"][columns["condition"] >= 6] = 0


def widen_noise(columns, dataset, task):
    columns["noise"] = (1.1 * columns["noise"].astype(np.float32)).astype(np.float16)


def saturate_one_value(columns, dataset, task):
    columns["state_002"][7].flat[0] = np.float16(65504.0)


def take_a_train_noise(columns, dataset, task):
    """Holdout sample 4 starts where train sample 70 does."""
    donor = dataset.read(dataset.shards("train")[1], ["noise"])["noise"]
    columns["noise"][4] = donor[6]
