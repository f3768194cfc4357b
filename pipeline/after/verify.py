"""`verify`: every byte against its checksum, every id against the manifest."""

import hashlib
import json

from limbeck.diffusion.models.checkpoint import WEIGHTS_FILE
from limbeck.pipeline.after.audit import audit
from limbeck.pipeline.after.checks import Check, plain, tally
from limbeck.pipeline.after.scan import check_bytes, near
from limbeck.pipeline.config import VerifyConfig
from limbeck.pipeline.job.in_order import in_order
from limbeck.storage_schemas import paths
from limbeck.storage_schemas.commit import Task
from limbeck.storage_schemas.dataset import Dataset, find_dataset, read_manifest, wrong_figures
from limbeck.storage_schemas.errors import UserError, shown
from limbeck.storage_schemas.record import SPLITS
from limbeck.storage_schemas.shards import Shard
from limbeck.storage_schemas.store import Store


def run_verify(config: VerifyConfig) -> int:
    """The exit code: 1 if anything is wrong."""
    dataset = find_dataset(Store.open(config.store), config.dataset, config.manifest)
    checks: list[Check] = []
    if config.audit is None:
        problems = check_dataset(dataset)
    else:
        of_shards, checks = audit(dataset, config)
        problems = check_manifest(dataset) + check_weights(dataset) + of_shards
    size = sum(shard.bytes for shard in dataset.table)
    if config.as_json:
        figures = {"manifest": dataset.manifest.number, "shards": len(dataset.table), "bytes": size}
        figures |= dict(zip(("rows", "ids"), _rows_of_ids(dataset), strict=True))
        print(json.dumps(figures | {"problems": problems, "checks": [plain(check) for check in checks]}))
    else:
        lines = [*problems, *(check.line for check in checks), *([tally(checks)] if checks else [])]
        print("\n".join(map(shown, [*lines, _summary(dataset, size, len(problems))])))
    return 1 if problems or any(check.passed is False for check in checks) else 0


def check_dataset(dataset: Dataset) -> list[str]:
    """Everything that is wrong with a dataset, one line each."""
    of_shards = in_order(lambda shard: check_listed(dataset, shard), dataset.table)
    found = [problem for problems in of_shards for problem in problems]
    return check_manifest(dataset) + check_weights(dataset) + found


def check_weights(dataset: Dataset) -> list[str]:
    """The teacher's weights against the recipe, where `generate --with-weights` kept them."""
    folder = paths.weights_folder(dataset.recipe.id)
    weights = dataset.store.read(f"{folder}/{WEIGHTS_FILE}")
    if weights is None or hashlib.sha256(weights).hexdigest() == dataset.recipe.teacher.weights_sha256:
        return []
    return [f"{dataset.store.uri}/{folder}/{WEIGHTS_FILE} does not match the recipe's sha256 of the teacher's weights"]


def check_listed(dataset: Dataset, shard: Shard) -> list[str]:
    """A shard against its commit and its row in the manifest."""
    try:
        commit = dataset.commit(shard)
        with near(dataset.store, commit.path) as store:
            problems, _ = check_bytes(dataset, commit, store)
    except UserError as error:
        problems = [str(error)]
    return [f"{shard.task}: {problem}" for problem in problems]


def check_manifest(dataset: Dataset) -> list[str]:
    """Whether the manifest's own figures follow from its table: ids once each, counts, gaps, and its parent."""
    manifest = dataset.manifest
    name = f"manifest {manifest.number}"
    claims = {
        "lists a task twice": len(dataset.table.tasks) != len(dataset.table),
        "has a shard with other ids than its task's": any(_strays(dataset, shard) for shard in dataset.table),
        "does not name all its missing tasks": _missing(dataset) != set(manifest.missing),
        "does not follow from its parent": _is_orphan(dataset),
        "has no row of any id": not any(manifest.rows.values()),
    }
    found = [claim for claim, wrong in claims.items() if wrong]
    return [f"{name} {claim}" for claim in (*wrong_figures(dataset), *found)]


def _strays(dataset: Dataset, shard: Shard) -> bool:
    task = Task(shard.split, shard.start // dataset.layout.samples_per_shard, dataset.layout.samples_per_shard)
    return (task.name, task.start, task.stop) != (shard.task, shard.start, shard.stop)


def _missing(dataset: Dataset) -> set[str]:
    wanted = dataset.manifest.window.tasks(dataset.layout.samples_per_shard)
    return {task.name for task in wanted} - dataset.table.tasks


def _is_orphan(dataset: Dataset) -> bool:
    """Whether the parent is there and is another one; a pruned parent can't be asked."""
    manifest = dataset.manifest
    parent = read_manifest(dataset.store, manifest.dataset, manifest.number - 1) if manifest.number > 1 else None
    return parent is not None and parent.digest != manifest.parent_digest


def _summary(dataset: Dataset, size: int, wrong: int) -> str:
    manifest, (rows, ids) = dataset.manifest, _rows_of_ids(dataset)
    right = f"every byte matches its checksum, {'every id is there once' if rows == ids else 'no id is there twice'}"
    what = f"{len(dataset.table)} shards, {size} bytes, {rows} of {ids} ids have rows"
    return f"manifest {manifest.number} of {manifest.dataset}: {what}: {f'{wrong} problems' if wrong else right}"


def _rows_of_ids(dataset: Dataset) -> tuple[int, int]:
    """How many ids of the window have rows, and how many there are: the others are quarantined, or missing."""
    bounds = (dataset.manifest.window.bounds(split) for split in SPLITS)
    return sum(dataset.ids(split).count for split in SPLITS), sum(stop - start for start, stop in bounds)
