"""`convert`: the same samples in another layout. Shards go through the same commits, so a run that died goes on.

Ids and bits are the same, so the content digest is: it names what readers see, not how it lies in files. Tasks are
whole shards, also past the window, so a new shard may need ids that no old one holds; then nothing is written.
"""

import json
import time
from dataclasses import dataclass, field

from limbeck.pipeline.config import ConvertConfig
from limbeck.pipeline.job.amounts import say_amounts
from limbeck.pipeline.job.announce import announce, is_early, new_job
from limbeck.pipeline.job.heartbeat import Pulse
from limbeck.pipeline.job.in_order import in_order
from limbeck.pipeline.job.kept import Lapsed, adoptable, check_held
from limbeck.pipeline.job.outcome import DONE, QUARANTINED, described, lacks_samples
from limbeck.pipeline.job.progress import Progress
from limbeck.pipeline.job.targets import Place
from limbeck.pipeline.upkeep.relayout import convert_tasks, grouped, new_tasks
from limbeck.pipeline.windows import Goal, Plans
from limbeck.pipeline.workers.signals import stoppable
from limbeck.storage_schemas.dataset import Dataset, LostRace, Pruned, latest_manifest, open_dataset, seal
from limbeck.storage_schemas.errors import UserError, usage_errors
from limbeck.storage_schemas.ids import id_set
from limbeck.storage_schemas.job import JobState
from limbeck.storage_schemas.layout import Layout, check_layout
from limbeck.storage_schemas.log import log
from limbeck.storage_schemas.manifest import Manifest, content_digest
from limbeck.storage_schemas.record import SPLITS
from limbeck.storage_schemas.shards import Shard, ShardTable
from limbeck.storage_schemas.store import Store


@dataclass
class Conversion:
    """One plan: from which dataset, into which layout and name, and what is committed in it so far."""

    source: Dataset
    layout: Layout
    dataset: str
    parent: Manifest | None
    job: str
    shards: dict[str, Shard] = field(default_factory=dict)
    early: dict[str, str] = field(default_factory=dict)
    written: int = 0


def run_convert(config: ConvertConfig) -> int:
    """The exit code."""
    started, store = time.monotonic(), Store.open(config.store)
    with stoppable():
        manifest, job, written = _carry_out(store, config)
    _tell(manifest, written, job, time.monotonic() - started, as_json=config.as_json)
    return QUARANTINED if lacks_samples(manifest) else DONE


def _carry_out(store: Store, config: ConvertConfig) -> tuple[Manifest, str, int]:
    """`_settle`, with the job's last word, and the job."""
    pulse = Pulse(store)
    last: JobState = "failed"
    try:
        manifest, written = _settle(store, config, pulse)
        last = "sealed" if manifest.writer == pulse.job else "ended"
        return manifest, pulse.job, written
    except KeyboardInterrupt:
        last = "stopped"
        raise
    finally:
        pulse.end(last)


def _settle(store: Store, config: ConvertConfig, pulse: Pulse) -> tuple[Manifest, int]:
    """The manifest that shows the dataset in the layout, and the shards written; planned again after a lost race."""
    written, plans = 0, Plans(store)
    while True:
        run = _planned(store, config, new_job())
        plans.begin(run.parent)
        if run.parent is not None and _shows(run.parent, run):
            return run.parent, written
        try:
            return _fulfil(run, config, pulse), written + run.written
        except (LostRace, Pruned, Lapsed) as why:
            written += run.written
            log.info(f"{why}: planning again")


def _planned(store: Store, config: ConvertConfig, job: str) -> Conversion:
    source = open_dataset(store, config.dataset)
    with usage_errors():
        size = config.samples_per_shard or source.layout.samples_per_shard
        layout = Layout(format=config.to, samples_per_shard=size, compression=config.compression)
    check_layout(source.recipe, layout)
    target = config.as_dataset or config.dataset
    parent = source.manifest if target == config.dataset else latest_manifest(store, target)
    return Conversion(source, layout, target, parent, job)


def _shows(manifest: Manifest, run: Conversion) -> bool:
    return (manifest.content_digest, manifest.layout) == (run.source.manifest.content_digest, run.layout)


def _fulfil(run: Conversion, config: ConvertConfig, pulse: Pulse) -> Manifest:
    """Write what is not committed yet, and seal."""
    tasks, missing = new_tasks(run.source, run.layout)
    job = _goal(run).job(run.job, total=len(tasks), missing=len(tasks), runner="convert", workers=config.threads)
    announce(run.source.store, run.source.recipe, job, pulse)
    # What an earlier run of this, or a `generate` of the same recipe, has committed in the layout.
    run.shards = adoptable(run.source.store, run.job, _place(run), [task.name for task in tasks])
    todo = [task for task in tasks if task.name not in run.shards]
    if todo:
        say_amounts(run.source.store, run.source.recipe, run.layout, todo, calls=False, here=0)
    pulse.say("running", found=len(tasks) - len(todo))
    with Progress(len(todo)) as progress:
        for commits in in_order(lambda group: convert_tasks(run.source, run.layout, group), grouped(run.source, todo),
                                threads=config.threads):  # fmt: skip
            for commit in commits:
                progress.count(commit)
                run.shards[commit.task.name] = Shard.of(commit)
                run.written += 1
                if is_early(commit, job.started_at):
                    run.early[commit.task.name] = commit.committed_at
    check_held(run.source.store, run.job, _place(run), run.shards, run.early)
    return _seal(run, missing)


def _place(run: Conversion) -> Place:
    return Place(run.source.recipe.id, run.layout.id)


def _goal(run: Conversion) -> Goal:
    manifest = run.source.manifest
    return Goal(run.dataset, run.parent, manifest.recipe_id, run.layout, manifest.window)


def _seal(run: Conversion, missing: tuple[str, ...]) -> Manifest:
    manifest, table = run.source.manifest, ShardTable.of(list(run.shards.values()))
    bounds = {split: manifest.window.bounds(split) for split in SPLITS}
    gaps = {split: id_set(*bounds[split], table.of_split(split).gaps(*bounds[split])).gaps for split in SPLITS}
    if content_digest(manifest.recipe_id, manifest.window, gaps) != manifest.content_digest:
        raise UserError(
            f"shards of {run.layout.id} committed before lack other samples than {manifest.dataset} does: "
            "choose other --samples-per-shard"
        )
    return seal(run.source.store, _goal(run).draft(run.job, missing), table)


def _tell(manifest: Manifest, written: int, job: str, seconds: float, *, as_json: bool) -> None:
    sealed = manifest.writer == job
    if as_json:
        figures = {
            "what": "sealed" if sealed else "nothing",
            "dataset": manifest.dataset,
            "manifest": manifest.number,
            "layout": manifest.layout.id,
            "shards": manifest.shards.count,
            "written": written,
            "missing": list(manifest.missing),
            "content_digest": manifest.content_digest,
            "seconds": round(seconds, 3),
        }
        print(json.dumps(figures))
        return
    lead = "sealed" if sealed else "nothing to do:"
    print(
        f"{lead} {described(manifest)} in layout {manifest.layout.id}, {written} of {manifest.shards.count} shards "
        f"written here, {seconds:.1f} s"
    )
