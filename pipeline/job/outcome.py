"""What a run of `generate`, `regenerate` or `convert` did; of the first two, as text for people or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from limbeck.storage_schemas.errors import shown
from limbeck.storage_schemas.manifest import Manifest, Window
from limbeck.storage_schemas.record import SPLITS

DONE, FAILED, QUARANTINED = 0, 1, 3
"""Exit codes: all there; tasks missing and nothing sealed; all there but for samples that were not finite."""

What = Literal["sealed", "nothing", "failed", "stopped", "refused"]

MOST_NAMES = 8


@dataclass(frozen=True)
class Outcome:
    """`before` and `manifest`: the dataset's latest when the run planned last, and at its end. Names are of tasks."""

    what: What
    dataset: str
    why: str = ""
    before: Manifest | None = None
    manifest: Manifest | None = None
    tick: str | None = None
    job: str | None = None
    needed: int = 0
    run: int = 0
    failed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    quarantined: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """The exit code of a run that ends by itself; what is raised has a code of its own."""
        if self.what == "failed":
            return FAILED
        return QUARANTINED if self.manifest and lacks_samples(self.manifest) else DONE

    def plain(self) -> dict[str, Any]:
        """One JSON object."""
        return {
            "what": self.what,
            "why": self.why,
            "dataset": self.dataset,
            "manifest": self.manifest.number if self.manifest else None,
            "tick": self.tick,
            "window_before": _plain(self.before.window if self.before else None),
            "window": _plain(self.manifest.window if self.manifest else None),
            "samples": sum(self.manifest.rows.values()) if self.manifest else 0,
            "tasks": {
                "needed": self.needed,
                "run": self.run,
                "adopted": self.needed - self.run,
                "failed": len(self.failed),
            },
            "missing": list(self.missing),
            "quarantined": list(self.quarantined),
            "seconds": round(self.seconds, 3),
            "job": self.job,
        }


def tell(outcome: Outcome, store: str, *, as_json: bool) -> None:
    """Print the outcome on stdout. `store` is the uri without credentials."""
    print(json.dumps(outcome.plain()) if as_json else "\n".join(map(shown, _lines(outcome, store))))


def _lines(outcome: Outcome, store: str) -> list[str]:
    seconds = f"{outcome.seconds:.1f} s"
    if outcome.what == "failed":
        return [f"nothing sealed: {outcome.why}; see `limbeck status {store}`"]
    if outcome.what == "nothing":
        lead = "nothing new" if outcome.needed else "nothing to do"
        why = f", {outcome.why}" if outcome.why else ""
        return [f"{lead}: {described(outcome.manifest)}{why}, {seconds}"]
    lines = [f"sealed {described(outcome.manifest)}, {outcome.run} of {outcome.needed} tasks run here, {seconds}"]
    if outcome.missing:
        lines.append(f"missing, and named in the manifest: {names(outcome.missing)}; generate again to retry")
    if outcome.quarantined:
        count = len(outcome.quarantined)
        lines.append(f"quarantined, because they are not finite: {count} samples ({names(outcome.quarantined)})")
    return lines


def lacks_samples(manifest: Manifest) -> bool:
    """Whether the manifest's tasks hold fewer samples than they have ids in the window: some are quarantined."""
    size = manifest.layout.samples_per_shard
    asked = {split: range(*manifest.window.bounds(split)) for split in SPLITS}
    ids = sum(map(len, asked.values()))
    for name in manifest.missing:
        split, _, index = name.rpartition("-")
        inside = asked["train" if split == "train" else "holdout"]
        ids -= len(range(max(inside.start, int(index) * size), min(inside.stop, (int(index) + 1) * size)))
    return sum(manifest.rows.values()) < ids


def described(manifest: Manifest | None) -> str:
    """One line such as: manifest 3 of main: train [0, 160), holdout [0, 40), 200 samples."""
    assert manifest is not None
    windows = ", ".join("{} [{}, {})".format(split, *manifest.window.bounds(split)) for split in SPLITS)
    return f"manifest {manifest.number} of {manifest.dataset}: {windows}, {sum(manifest.rows.values())} samples"


def names(found: Sequence[str]) -> str:
    """The first few."""
    return ", ".join(found[:MOST_NAMES]) + (f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else "")


def _plain(window: Window | None) -> dict[str, list[int]] | None:
    return {split: list(window.bounds(split)) for split in SPLITS} if window else None
