"""--follow-latest: at an epoch's start a run goes over to its dataset's newest manifest, if that serves it."""

from collections.abc import Callable
from dataclasses import replace
from threading import Event
from typing import Any, Self

from limbeck.storage_schemas.dataset import latest_manifest
from limbeck.storage_schemas.errors import ManifestMismatch, UserError
from limbeck.trainer.config import FitConfig
from limbeck.trainer.objectives.kind import Stage
from limbeck.trainer.planning.plan import Plan
from limbeck.trainer.planning.trajectories import plan_trajectories
from limbeck.trainer.ranks import Ranks
from limbeck.trainer.reading.shards import ShardSource
from limbeck.trainer.runs.pins import Pins
from limbeck.trainer.stream import Source


class Following:
    """Called by a stream's loading thread on every rank, when reading comes to an epoch: somewhat ahead of the step.

    The first rank looks and decides. A stage has one of its own.

    plans: by number, of the manifests gone over to; the stream's state tells from when on one is read.
    """

    def __init__(
        self,
        config: FitConfig,
        plan: Plan,
        stage: Stage,
        *,
        ranks: Ranks,
        pins: Pins | None,
        say: Callable[[str], None],
    ) -> None:
        self.plans: dict[int, Plan] = {}
        self._config, self._plan, self._stage, self._columns = config, plan, stage.name, stage.objective.columns
        self._ranks, self._pins, self._say = ranks, pins, say
        self._refused: set[int] = set()
        self._unread: set[str] = set()
        self._ended = Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """The stream is no longer read: a thread that waits for the first rank's answer need not."""
        self._ended.set()

    def __call__(self, epoch: int) -> Source | None:
        """The source to read from this epoch on, None for the one before."""
        key = f"manifest from epoch {epoch} of stage {self._stage} on"
        number = self._ranks.found_by_first(key, self._newer, self._ended)
        if number is None:
            return None
        if number not in self.plans:
            self.plans[number] = plan_trajectories(self._config, number=number)
        self._plan = self.plans[number]
        return self._plan.source(self._columns)

    def _newer(self) -> int | None:
        """The newest manifest's number, if it has other content, and content that this run can go on with."""
        now, store = self._plan.reads, self._plan.store
        assert store is not None
        try:
            latest = latest_manifest(store, now["dataset"])
        except UserError as error:
            if str(error) not in self._unread:  # once, not at every epoch
                self._say(f"warning: going on with manifest {now['manifest']}: {error}")
            self._unread.add(str(error))
            return None
        if latest is None or latest.number <= now["manifest"] or latest.content_digest == now["content_digest"]:
            return None
        return latest.number if latest.number not in self._refused and self._serves(latest.number) else None

    def _serves(self, number: int) -> bool:
        """Whether this run can go on with it; if so, keep its plan and pin it, else warn once."""
        try:
            plan = plan_trajectories(self._config, number=number)
            self._check(plan)
        except UserError as error:
            self._refused.add(number)
            self._say(
                f"warning: manifest {number} is left aside, going on with {self._plan.reads['manifest']}: {error}"
            )
            return False
        self.plans[number] = plan
        refused = self._pins.hold(number) if self._pins else None
        if refused:
            self._say(f"warning: {refused}")
        return True

    def _check(self, new: Plan) -> None:
        old, problem = self._plan, f"{new.reads['dataset']} now holds samples"
        if replace(new.shape, rms=old.shape.rms) != old.shape or new.labels != old.labels:
            raise ManifestMismatch(
                f"{problem} of another shape, process or kind of condition; start another run on them"
            )
        if new.stages != old.stages:
            raise ManifestMismatch(f"{problem} on another time grid; start another run on them")
        source, before = new.source(self._columns), old.source(self._columns)
        if source.fields != before.fields:
            raise ManifestMismatch(f"{problem} in another storage dtype; start another run on them")
        if self._config.objective.kind.has_critic and _score(new) != _score(old):
            raise ManifestMismatch(f"{problem} of another teacher or guidance scale; start another run on their score")
        if isinstance(source, ShardSource) and isinstance(before, ShardSource):
            source.check_new(before)


def _score(plan: Plan) -> tuple[Any, ...]:
    """Whose score dmd, vsd and sid learn from, wherever its weights lie."""
    teacher = plan.made_by
    assert teacher is not None
    return teacher.model, teacher.weights_sha256, teacher.source_sha256, plan.guidance
