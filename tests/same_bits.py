"""What must stay the same when a change alters no result: sha256 of generated shards and of fitted models.

    python -m tests.same_bits FILE [--clone FOLDER]

writes a line for every solver, format and chain that is generated, and for twenty steps of every objective. It drives
the command lines of the clone in FOLDER, by default this one, so that an older commit is measured in the same way.
Run it at both commits on one machine, and compare the files.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parents[1]
PARTS = ("diffusion", "pipeline", "storage_schemas", "trainer")
SOLVERS = ("ddim", "heun", "rk4", "ab2", "dpmpp_2m", "dpmpp_3m")
FORMATS = {
    "parquet": "",
    "zstd": "--compression zstd",
    "webdataset": "--format webdataset",
}
SMALL = "--runner local --samples-per-shard 64 --micro-batch 32"
FIT = "--steps 20 --batch-size 32 --device cpu --threads 1 --seed 3 --checkpoint-every 20 --validate-every 10"
GENERATED = {
    **{
        f"{solver}, {name}": f"--teacher builtin:gaussian --count 128 --holdout 64 --states 2 4 --solver.name {solver} "
        f"--solver.steps 8 {words}"
        for solver in SOLVERS
        for name, words in FORMATS.items()
    },
    "segments": "--teacher builtin:digits --count 64 --holdout 64 --start data:sklearn:digits --solver.steps 8",
    "guided": "--teacher builtin:digits --count 64 --holdout 0 --guidance 2.0 --solver.steps 4",
    "several scales": "--teacher builtin:digits --count 64 --holdout 0 --guidance 1.0 2.0 --solver.steps 4",
    "bfloat16": "--teacher builtin:digits --count 64 --holdout 0 --dtype bfloat16 --solver.steps 4",
    "pairs": "--teacher builtin:digits --count 256 --holdout 64 --states 2 4 6 --solver.steps 8 --with-weights",
}
FITTED = {
    "knowledge": "",
    "progressive": "--objective.schedule 4 2 1",
    "flow_map": "--init scratch",
    "ctm": "--init scratch",
    "consistency": "--objective.distance pseudo_huber --objective.c 0.1",
    "reflow": "--objective.weighting learned",
    "dmd": "--objective.gan 0.03 --objective.student-steps 2",
    "vsd": "--critic.kind lora",
    "sid": "",
}


def lines(clone: Path, scratch: Path) -> Iterator[str]:
    """One for each thing that is made: its name and its sum."""
    for number, (name, words) in enumerate(GENERATED.items()):
        _run(clone, f"pipeline generate --store {scratch / str(number)} {SMALL} {words}")
        shards = sorted(
            (scratch / str(number)).glob("recipes/*/*/shards/*"), key=lambda path: path.name.rsplit("-", 1)[0]
        )
        yield f"{_sum(sorted(shards, key=lambda path: path.name.rsplit('-', 1)[0]))}  generate {name}"
    pairs = scratch / str(len(GENERATED) - 1)
    for name, words in FITTED.items():
        out = scratch / name
        _run(clone, f"trainer fit --data {pairs} --out {out} --objective.name {name} {FIT} {words}")
        yield f"{_sum(sorted(out.rglob('model.safetensors')))}  fit {name}"
    _run(clone, f"trainer fit --images sklearn:digits --out {scratch / 'teacher'} --objective.name denoising {FIT}")
    yield f"{_sum(sorted((scratch / 'teacher').rglob('model.safetensors')))}  fit denoising"


def _run(clone: Path, words: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:  # the clone's, whatever is installed
            (Path(folder) / "limbeck").mkdir(exist_ok=True)
            (Path(folder) / "limbeck" / part).symlink_to(clone / part)
        paths = os.pathsep.join([folder, str(clone)])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
        command = [sys.executable, "-m", *words.split()]
        done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"python -m {words}\n{done.stdout}{done.stderr}")


def _sum(files: list[Path]) -> str:
    assert files
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--clone", type=Path, default=HERE)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, given.file.open("w") as file:
        for line in lines(given.clone.resolve(), Path(folder)):
            print(line, file=file, flush=True)
            print(line, flush=True)


if __name__ == "__main__":
    main()
