"""`convert`: the same samples in another layout. Shards go through the same commits, so a run that died goes on.

Ids and bits are the same, so the content digest is: it names what readers see, not how it lies in files. Tasks are
whole shards, also past the window, so a new shard may need ids that no old one holds; then nothing is written.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace

from limbeck.pipeline.config import ConvertConfig
from limbeck.pipeline.job.driver import Ledger, Plan, drive, fulfil, seal_goal
from limbeck.pipeline.job.heartbeat import Pulse
from limbeck.pipeline.job.in_order import in_order
from limbeck.pipeline.job.outcome import Outcome, described
from limbeck.pipeline.job.progress import Progress
from limbeck.pipeline.upkeep.relayout import convert_tasks, grouped, new_tasks
from limbeck.pipeline.windows import Goal
from limbeck.pipeline.workers.signals import stoppable
from limbeck.storage_schemas.commit import Task
from limbeck.storage_schemas.dataset import Dataset, open_dataset, wrong_figures
from limbeck.storage_schemas.errors import UserError, usage_errors
from limbeck.storage_schemas.layout import Layout, check_layout
from limbeck.storage_schemas.manifest import Manifest
from limbeck.storage_schemas.shards import ShardTable
from limbeck.storage_schemas.store import Store


def run_convert(config: ConvertConfig) -> int:
    """The exit code."""
    started, store = time.monotonic(), Store.open(config.store)
    with stoppable():
        outcome = convert(store, config)
    _tell(replace(outcome, seconds=time.monotonic() - started), as_json=config.as_json)
    return outcome.exit_code


def convert(store: Store, config: ConvertConfig) -> Outcome:
    """Seal the manifest that shows the dataset in the layout, under the same name or another."""
    target, ledger = config.as_dataset or config.dataset, Ledger()

    def act(parent: Manifest | None, pulse: Pulse) -> Outcome:
        number = parent.number if parent and target == config.dataset else None
        source = open_dataset(store, config.dataset, number)
        layout = _layout(config, source)
        outcome = Outcome("nothing", target, before=parent, manifest=parent, run=ledger.made)
        if parent and (parent.content_digest, parent.layout) == (source.manifest.content_digest, layout):
            return outcome
        # The next plan may be of another recipe or layout: what this one has committed for it is found in the store.
        ledger.shards.clear()
        tasks, missing = new_tasks(source, layout)
        plan = Plan(
            store,
            source.recipe,
            Goal(target, parent, source.recipe.id, layout, source.manifest.window),
            tasks,
            ledger,
            make=lambda todo: _rewrite(source, layout, todo, ledger, threads=config.threads),
            runner="convert",
            workers=config.threads,
        )
        fulfil(plan, pulse)
        table = ShardTable.of(list(ledger.shards.values()))
        if wrong_figures(replace(source, table=table)):
            raise UserError(
                f"shards of {layout.id} committed before lack other samples than {config.dataset} does: "
                "choose other --samples-per-shard"
            )
        manifest = seal_goal(plan, pulse, table, missing)
        return replace(outcome, what="sealed", manifest=manifest, run=ledger.made)

    return drive(store, target, act)


def _layout(config: ConvertConfig, source: Dataset) -> Layout:
    with usage_errors():
        size = config.samples_per_shard or source.layout.samples_per_shard
        layout = Layout(format=config.to, samples_per_shard=size, compression=config.compression)
    check_layout(source.recipe, layout)
    return layout


def _rewrite(source: Dataset, layout: Layout, tasks: Sequence[Task], ledger: Ledger, *, threads: int) -> None:
    """Write and commit the tasks' shards from those of the source."""
    groups = in_order(lambda group: convert_tasks(source, layout, group), grouped(source, tasks), threads=threads)
    with Progress(len(tasks)) as progress:
        for commits in groups:
            for commit in commits:
                progress.count(commit)
                ledger.enter(commit)


def _tell(outcome: Outcome, *, as_json: bool) -> None:
    manifest, written, seconds = outcome.manifest, outcome.run, outcome.seconds
    assert manifest is not None
    if as_json:
        figures = {
            "what": outcome.what,
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
    lead = "sealed" if outcome.what == "sealed" else "nothing to do:"
    print(
        f"{lead} {described(manifest)} in layout {manifest.layout.id}, {written} of {manifest.shards.count} shards "
        f"written here, {seconds:.1f} s"
    )
