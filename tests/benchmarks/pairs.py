"""Pairs against error: knowledge distillation on fixed sets of pairs, and on windows refreshed every night.

    python -m tests.benchmarks.pairs --out runs/pairs-study

All students take as many steps. A refreshed window is fitted with --follow-latest while `regenerate` slides it, four
times over the fit, so that half of it is new each time. Errors are on the same holdout noises; the training error is
that on the first pairs of the window at the end. Writes OUT/study.json and .png, and says two sentences.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.benchmarks.commands import LIMBECK, Commands, Launch, as_process, told

SIZES = (2048, 8192, 32768)
NIGHTS = 4
FRESH = 0.5
KINDS = ("fixed", "nightly")
DIGITS = (
    "--teacher builtin:digits --with-weights --runner local --workers 2 --samples-per-shard 2048 --micro-batch 256 "
    "--solver.name heun --solver.steps 16 --states 2 4 6 8 10 12 14"
)


@dataclass(frozen=True)
class Study:
    """Where, on what, how long. solve, fit, evaluate: options of generate, fit and evaluate beside those set here."""

    out: Path
    store: str
    solve: str
    holdout: int = 2048
    sizes: tuple[int, ...] = SIZES
    steps: int = 6000
    fit: str = ""
    evaluate: str = ""

    def windowed(self, command: str, size: int, dataset: str) -> list[str]:
        """generate or regenerate, of a dataset of its own over the same shards."""
        words = f"{command} --store {self.store} --dataset {dataset} --count {size} --holdout {self.holdout}"
        return [*words.split(), *self.solve.split()]

    def fitted(self, kind: str, size: int) -> list[str]:
        """A student."""
        out, warmup = self.out / f"{kind}-{size}", min(100, self.steps // 10)
        words = f"--data {self.store} --dataset {kind}-{size} --out {out} --steps {self.steps} --warmup {warmup}"
        # Pairs are small: the default's 64 MiB read ahead would be a good part of the fit, in windows of before.
        followed = ["--follow-latest", "--ahead-mib", "1"] if kind == "nightly" else []
        return ["fit", *words.split(), *followed, *self.fit.split()]

    def evaluated(self) -> list[str]:
        """All of them."""
        runs = [str(self.out / f"{kind}-{size}") for kind in KINDS for size in self.sizes]
        words = f"--data {self.store} --dataset fixed-{max(self.sizes)} --nfe 1 --out {self.out}"
        return ["evaluate", *runs, *words.split(), *self.evaluate.split()]


@dataclass(frozen=True)
class Point:
    """One student. pairs: in its window; seen: in all windows that it read."""

    kind: str
    pairs: int
    seen: int
    holdout_error: float
    training_error: float | None
    frechet: float | None


def run(study: Study, launch: Launch = as_process) -> Commands:
    """Everything that isn't done yet."""
    commands, fitted = Commands(study.out, launch), []
    # The largest first: the others' shards are among its own.
    for size in sorted(study.sizes, reverse=True):
        for kind in KINDS:
            commands.run(*study.windowed("generate", size, f"{kind}-{size}"))
        fitted += [commands.run(*study.fitted("fixed", size)), nights(study, size, commands)]
    commands.run(*study.evaluated(), again=any(fitted))
    if not commands.failed:
        tell(study)
    return commands


def nights(study: Study, size: int, commands: Commands) -> bool:
    """A fit that goes on while its window is slid NIGHTS times, evenly over its steps; whether it has run."""
    words = study.fitted("nightly", size)
    if commands.is_done(told(words)):
        return False
    print(f"\n$ {told(words)} &", flush=True)
    started, metrics = time.perf_counter(), study.out / f"nightly-{size}" / "metrics.jsonl"
    with subprocess.Popen([LIMBECK, *words]) as fit:
        for night in range(1, NIGHTS + 1):
            while fit.poll() is None and last_step(metrics) < study.steps * night / (NIGHTS + 1):
                time.sleep(0.1)
            slide = study.windowed("regenerate", size, f"nightly-{size}")
            commands.run(*slide, "--policy", "refresh", "--refresh", str(FRESH), "--tick", f"2026-01-{night:02}")
    if fit.returncode:
        commands.failed.append(told(words))
    else:
        commands.note(told(words), time.perf_counter() - started)
    return True


def last_step(metrics: Path) -> int:
    """The step of the last whole line."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def tell(study: Study) -> None:
    """study.json, study.png, and what to make of them."""
    found = list(points(study))
    sentences = advice(found, study.steps)
    document = {"steps": study.steps, "advice": sentences, "points": [asdict(point) for point in found]}
    (study.out / "study.json").write_text(json.dumps(document, indent=1) + "\n")
    plot(found, study.out / "study.png")
    print(sentences)


def points(study: Study) -> Iterator[Point]:
    """From the evaluation and the runs' metrics."""
    rows = {row["name"]: row for row in json.loads((study.out / "evaluation.json").read_text())["rows"]}
    for kind in KINDS:
        for size in study.sizes:
            run = study.out / f"{kind}-{size}"
            row, lines = rows[str(run)], [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            windows = {line["manifest"] for line in lines if "manifest" in line} or {1}
            seen = round(size * (1 + FRESH * (max(windows) - min(windows))))
            yield Point(kind, size, seen, row["holdout_error"], lines[-1].get("train_error"), row["frechet"])


def advice(found: Sequence[Point], steps: int) -> str:
    """Two sentences."""
    fixed, nightly = ([point for point in found if point.kind == kind] for kind in KINDS)
    few, many = min(fixed, key=_pairs), max(fixed, key=_pairs)
    fresh = min(nightly, key=_pairs)
    gained = few.holdout_error / many.holdout_error
    return (
        f"At the same {steps:,} steps, {many.pairs:,} pairs give {gained:.1f} times less holdout error than "
        f"{few.pairs:,} ({many.holdout_error:.4f}, {few.holdout_error:.4f}). A window of {fresh.pairs:,} that was "
        f"refreshed over the fit, {fresh.seen:,} pairs in all, is at {fresh.holdout_error:.4f}."
    )


def _pairs(point: Point) -> int:
    return point.pairs


def plot(found: Sequence[Point], path: Path) -> None:
    """Errors, and the Frechet distance if it was measured, against the pairs of the window."""
    figures = ["holdout_error", *(["frechet"] if found[0].frechet is not None else [])]
    figure = Figure(figsize=(5 * len(figures), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(figures), squeeze=False)[0], figures, strict=True):
        for kind, style in zip(KINDS, ("C0o-", "C1s-"), strict=True):
            _draw(axes, [point for point in found if point.kind == kind], name, style, kind)
            if name == "holdout_error":
                training = style.replace("-", ":")
                _draw(axes, [p for p in found if p.kind == kind], "training_error", training, f"{kind}, training")
        axes.set(xscale="log", xlabel="pairs in the window", ylabel=name.replace("_", " "))
        axes.set_yscale("log" if name == "holdout_error" else "linear")
        sizes = sorted({point.pairs for point in found})
        axes.set_xticks(sizes, labels=[f"{size:,}" for size in sizes])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def _draw(axes: Any, some: Sequence[Point], name: str, style: str, label: str) -> None:
    known = [(point.pairs, getattr(point, name)) for point in some if getattr(point, name) is not None]
    if known:
        axes.plot(*zip(*known, strict=True), style, label=label)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--steps", type=int, default=6000)
    given = parser.parse_args()
    done = run(Study(given.out, str(given.out / "pairs"), DIGITS, sizes=tuple(given.sizes), steps=given.steps))
    print(*(f"failed: {line}" for line in done.failed), sep="\n", file=sys.stderr)
    return 1 if done.failed else 0


if __name__ == "__main__":
    sys.exit(main())
