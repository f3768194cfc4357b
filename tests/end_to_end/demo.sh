#!/usr/bin/env bash
# The main job on the embedded teacher, as a user would type it. Usage: demo.sh FOLDER
# Every command finds what is already done: a second run is over in seconds.
set -euo pipefail
out=${1:?name a folder for the results}
mkdir -p "$out"

say() { printf '\n$ %s\n' "$*"; "$@"; }

say limbeck generate --teacher builtin:digits --store "$out/pairs" --count 16384 --holdout 2048 \
    --solver.name heun --solver.steps 16 --states 2 4 6 8 10 12 14 --dtype float16 --format parquet \
    --samples-per-shard 2048 --micro-batch 256 --with-weights --runner ray --workers 2
say limbeck verify "$out/pairs"
say limbeck inspect "$out/pairs"

say limbeck fit --data "$out/pairs" --out "$out/kd" --objective.name knowledge --steps 3000 --batch-size 256
say limbeck fit --data "$out/pairs" --out "$out/progressive" --objective.name progressive \
    --objective.schedule 8 4 2 1 --steps 1000 --batch-size 256

say limbeck evaluate "$out/kd" "$out/progressive" --data "$out/pairs" --nfe 1 2 4 8 --out "$out"
say limbeck sample "$out/kd" --nfe 1 --count 100 --out "$out/kd-1-step.png"
say limbeck sample "$out/progressive" --nfe 4 --count 100 --out "$out/progressive-4-step.png"
