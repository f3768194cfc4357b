"""Every objective on the same pairs: one table, method x number of calls, over several seeds of the fits.

    python -m tests.benchmarks.results --out runs/results
    python -m tests.benchmarks.results --out runs/fashion --profile fashion --images /usr/share/datasets/fashion-mnist
    python -m tests.benchmarks.results --out runs/emoji --profile emoji32 --images node_modules/emoji-datasource-google

It types the commands that a user would, shows them, and does none twice. Their results: OUT/report.json, .md and .png
over the seeds, OUT/seed-0/evaluation.json and the runs beside it, and what pairs do to the error in OUT/pairs-study.
digits is for a CPU: its teacher is in the package. The others fit a UNet first and are for a GPU; the data are of

    apt-get install dataset-fashion-mnist                 # /usr/share/datasets/fashion-mnist
    npm install emoji-datasource-google@16.0.0            # node_modules/emoji-datasource-google

--size tiny goes through all of it at sizes at which the figures mean nothing. --jobs N fits N students at once, for a
GPU that one small network leaves idle; samples/s and seconds of training are then those of a shared machine.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tests.benchmarks import pairs
from tests.benchmarks.commands import Commands, Launch, as_process

NFE = ("1", "2", "4", "8")


@dataclass(frozen=True)
class Profile:
    """One data set. images: its uri, with {} for its folder. teacher: how it is fitted, None for the built-in one.

    steps: of a student; count: train trajectories; network: of the teacher, and of a student that starts from scratch.
    solve, fit, regress and match: options of generate, of every fit, and of those without and with a critic. labels:
    whether the samples have classes.
    """

    images: str
    teacher: str | None
    steps: int
    count: int
    holdout: int
    solve: str
    network: str
    fit: str = ""
    regress: str = ""
    match: str = ""
    teacher_steps: int = 0
    labels: bool = True


_GPU = Profile(
    images="",
    teacher="--batch-size 256 --autocast bfloat16 --ema 0.9995 --lr 0.0003 --warmup 500",
    teacher_steps=30000,
    network="--network.name unet --network.width 64 --network.depth 2",
    steps=10000,
    count=200_000,
    holdout=8192,
    solve="--micro-batch 512 --autocast bfloat16 --workers 4",
    fit="--autocast bfloat16",
    regress="--lr 0.0003",
    match="--lr 0.00005",
)
PROFILES = {
    "digits": Profile(
        images="sklearn:digits",
        teacher=None,
        steps=3000,
        count=32768,
        holdout=2048,
        solve="--micro-batch 256 --workers 2",
        network="--network.width 256 --network.depth 4",  # its teacher's
        match="--lr 0.0003",
    ),
    "fashion": replace(_GPU, images="idx:{}"),
    # Classes are as unequal as can be: without labels the samples have the shares that the images have.
    "emoji32": replace(
        _GPU,
        images="emoji:{}@32",
        teacher=f"{_GPU.teacher} --objective.label-dropout 0.5",
        labels=False,
    ),
    "emoji64": replace(
        _GPU,
        images="emoji:{}@64",
        teacher=f"{_GPU.teacher} --objective.label-dropout 0.5",
        labels=False,
    ),
}
_TINY_UNET = "--network.name unet --network.width 8 --network.depth 1"


@dataclass(frozen=True)
class Method:
    """How a student is fitted. share: of the profile's steps (in each stage); init: the student that it starts from."""

    name: str
    words: str
    share: float = 1.0
    init: str | None = None
    matches: bool = False  # a distribution, by a critic
    scratch: bool = False  # another process than the teacher's
    images: bool = False  # real ones beside the pairs


# At low noise the score of a small teacher is the least exact: the papers' range from 0.02 on does worse on digits.
_DMD = "--objective.name dmd --objective.t-range 0.4 0.98"
_DMD2 = "--objective.name dmd --objective.regression 0 --objective.gan 0.03 --objective.critic-steps 5"
METHODS = (
    Method("knowledge", "--objective.name knowledge"),
    Method("progressive", "--objective.name progressive --objective.schedule 8 4 2 1", 1 / 3),
    Method("flow_map", "--objective.name flow_map", 4 / 3),
    Method("ctm", "--objective.name ctm", 4 / 3),
    Method("consistency", "--objective.name consistency", 4 / 3),
    Method("reflow", "--objective.name reflow", 4 / 3, scratch=True),
    Method("dmd", _DMD, 2 / 3, matches=True),
    Method("dmd-warm", _DMD, 2 / 3, init="knowledge", matches=True),
    # A quarter of the steps, to see which is there sooner.
    Method("dmd-quarter", _DMD, 1 / 6, matches=True),
    Method("dmd-warm-quarter", _DMD, 1 / 6, init="knowledge", matches=True),
    Method("dmd2-warm", _DMD2, 5 / 3, init="knowledge", matches=True, images=True),
    Method("vsd", "--objective.name vsd", matches=True),
    Method("sid", "--objective.name sid", matches=True),
)


@dataclass(frozen=True)
class Study:
    """A profile in a folder, on one set of images, at its size or a tiny one."""

    profile: Profile
    images: str
    out: Path
    device: str
    tiny: bool = False

    @property
    def network(self) -> str:
        return _TINY_UNET if self.tiny and self.profile.teacher else self.profile.network

    @property
    def count(self) -> int:
        return 32 if self.tiny else self.profile.count

    @property
    def holdout(self) -> int:
        return 16 if self.tiny else self.profile.holdout

    @property
    def store(self) -> str:
        return str(self.out / "pairs")

    def steps(self, share: float) -> int:
        """Of a fit; tiny ones let the critic of DMD2 take its five."""
        return 6 if self.tiny else max(1, round(self.profile.steps * share))

    def teacher(self) -> Iterator[list[str]]:
        """The teacher and the classifier, where none are in the package."""
        if self.profile.teacher is None:
            return
        words = f"--steps {self.profile.teacher_steps} {self.profile.teacher}"
        words = "--batch-size 8 --steps 2 --warmup 0" if self.tiny else words
        fit = f"--objective.name denoising --images {self.images} --out {self.out / 'teacher'} --device {self.device}"
        yield ["fit", *fit.split(), *self.network.split(), *words.split()]
        own = "--steps 4 --width 4 --num-features 8" if self.tiny else "--steps 3000"
        words = f"--images {self.images} --out {self.out / 'classifier'} --device {self.device} {own}"
        yield ["classifier", *words.split()]

    def solve(self) -> str:
        """How the pairs are made."""
        uri = str(self.out / "teacher/model") if self.profile.teacher else "builtin:digits"
        solver = "--solver.name heun --solver.steps 16 --states 2 4 6 8 10 12 14 --with-weights --runner local"
        labels = "" if self.profile.labels else "--condition none"
        shard, own = "--samples-per-shard 2048", self.profile.solve
        if self.tiny:
            shard, own = "--samples-per-shard 16", own.partition("--")[0] + "--micro-batch 16"
        return f"--teacher {uri} --device {self.device} {solver} {labels} {shard} {own}"

    def generate(self) -> list[str]:
        """The pairs."""
        words = f"--store {self.store} --count {self.count} --holdout {self.holdout} {self.solve()}"
        return ["generate", *words.split()]

    def fit(self, method: Method, seed: int) -> list[str]:
        """One student."""
        steps, profile, folder = self.steps(method.share), self.profile, self.out / f"seed-{seed}"
        own = "--batch-size 8" if self.tiny else f"{profile.fit} {profile.match if method.matches else profile.regress}"
        warmup = min(100, steps // 10)
        fixed = f"--data {self.store} --manifest 1 --out {folder / method.name} --device {self.device}"
        words = f"{fixed} {method.words} --steps {steps} --warmup {warmup} --seed {seed} {own}".split()
        words += ["--init", str(folder / method.init)] if method.init else []
        words += ["--images", self.images] if method.images else []
        words += self.network.split() if method.scratch else []
        return ["fit", *words]

    def evaluate(self, methods: Sequence[Method], seed: int) -> list[str]:
        """All students of a seed, as far as they are there."""
        folder = self.out / f"seed-{seed}"
        runs = [str(folder / method.name) for method in methods if (folder / method.name / "model").is_dir()]
        words = ["evaluate", *runs, "--data", self.store, "--manifest", "1", "--nfe", *NFE]
        return [*words, "--out", str(folder), *self.judge().split()]

    def judge(self) -> str:
        """How students are evaluated."""
        classifier = f"--classifier {self.out / 'classifier'}" if self.profile.teacher else ""
        return f"--count {self.holdout} --images {self.images} --device {self.device} {classifier}"

    def pairs(self) -> pairs.Study:
        """The same teacher's pairs against error."""
        sizes, steps = ((16, 32), 6) if self.tiny else (pairs.SIZES, 2 * self.profile.steps)
        fit = f"--device {self.device} {'--batch-size 16' if self.tiny else self.profile.fit}"
        out = self.out / "pairs-study"
        return pairs.Study(out, self.store, self.solve(), self.holdout, sizes, steps, fit, self.judge())


def selected(names: Sequence[str] | None) -> list[Method]:
    """The methods of these names, with those whose students they start from, in the order of METHODS; all for None."""
    if names is None:
        return [*METHODS]
    wanted = {*names, *(method.init for method in METHODS if method.name in names)}
    return [method for method in METHODS if method.name in wanted]


def fit_all(study: Study, methods: Sequence[Method], seed: int, commands: Commands, jobs: int) -> bool:
    """All students of a seed, `jobs` at once, each after the one that it starts from; whether any was fitted."""
    if jobs == 1:
        fitted = [commands.run(*study.fit(method, seed)) for method in methods]
        return any(fitted)
    begun: dict[str, Future[bool]] = {}

    def fit(method: Method) -> bool:
        if method.init in begun:
            begun[method.init].result()
        return commands.run(*study.fit(method, seed))

    with ThreadPoolExecutor(jobs) as pool:
        for method in methods:  # a start comes before those who start from it, so that it is never waited for in vain
            begun[method.name] = pool.submit(fit, method)
    return any(future.result() for future in begun.values())


def results(
    study: Study,
    seeds: Sequence[int],
    methods: Sequence[Method],
    *,
    with_pairs: bool,
    jobs: int = 1,
    launch: Launch = as_process,
) -> Commands:
    """Everything that isn't done yet."""
    commands = Commands(study.out, launch)
    for words in (*study.teacher(), study.generate()):
        commands.run(*words)
    for seed in seeds:
        fitted = fit_all(study, methods, seed, commands, jobs)
        commands.run(*study.evaluate(methods, seed), again=fitted)
    folders = [str(study.out / f"seed-{seed}") for seed in seeds]
    commands.run("report", *folders, "--out", str(study.out), again=True)
    if with_pairs:
        commands.failed += pairs.run(study.pairs(), launch).failed
    return commands


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--profile", choices=PROFILES, default="digits")
    made.add_argument("--images", default="", help="folder of the images of fashion and emoji")
    made.add_argument("--size", choices=("full", "tiny"), default="full")
    made.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    made.add_argument(
        "--only", nargs="+", choices=[method.name for method in METHODS], help="these, and those they start from"
    )
    made.add_argument("--steps", type=int, help="of a student of knowledge distillation; the others' follow")
    made.add_argument("--teacher-steps", type=int, help="of the teacher, where it is fitted")
    made.add_argument("--network", help="options of the teacher's network, as fit has them")
    made.add_argument("--count", type=int, help="trajectories")
    made.add_argument("--holdout", type=int, help="trajectories that are held out, and noises of an evaluation")
    made.add_argument("--batch-size", type=int, help="of every student")
    made.add_argument("--solve", help="how this machine solves: options of generate in place of the profile's")
    made.add_argument("--jobs", type=int, default=1, help="students that are fitted at once")
    made.add_argument("--device", default="auto")
    made.add_argument("--no-pairs", action="store_true", help="leave the study of pairs against error out")
    return made


def main(words: Sequence[str] | None = None, launch: Launch = as_process) -> int:
    """All that is asked for; 1 if something failed, which then is told."""
    given = parser().parse_args(words)
    profile = PROFILES[given.profile]
    asked = {name: getattr(given, name) for name in ("steps", "teacher_steps", "network", "count", "holdout", "solve")}
    profile = replace(profile, **{name: value for name, value in asked.items() if value})
    if given.batch_size:
        profile = replace(profile, fit=f"{profile.fit} --batch-size {given.batch_size}")
    if "{}" in profile.images and not given.images:
        parser().error(f"--profile {given.profile} needs --images FOLDER; see above where it is from")
    images = profile.images.format(given.images)
    study = Study(profile, images, given.out, given.device, tiny=given.size == "tiny")
    done = results(
        study, given.seeds, selected(given.only), with_pairs=not given.no_pairs, jobs=given.jobs, launch=launch
    )
    for line in done.failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if done.failed else 0


if __name__ == "__main__":
    sys.exit(main())
