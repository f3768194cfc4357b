#!/usr/bin/env bash
# The longer run behind the README's table: four times the demo's pairs, then a window of which half is fresh, and
# students fitted for longer. Up to half an hour on 2 cores. Usage: results.sh FOLDER
set -euo pipefail
out=${1:?name a folder for the results}
mkdir -p "$out"

say() { printf '\n$ %s\n' "$*"; "$@"; }

pairs=(--teacher builtin:digits --store "$out/pairs" --count 65536 --holdout 2048 --solver.name heun --solver.steps 16
    --states 2 4 6 8 10 12 14 --samples-per-shard 2048 --micro-batch 256 --with-weights --runner ray --workers 2)

say python -m pipeline generate "${pairs[@]}"
say python -m trainer fit --data "$out/pairs" --manifest 1 --out "$out/kd" --objective.name knowledge --steps 12000
say python -m trainer fit --data "$out/pairs" --manifest 1 --out "$out/progressive" --objective.name progressive \
    --objective.schedule 8 4 2 1 --steps 3000

# A tick is served once: a second call of this script does not slide the window once more.
say python -m pipeline regenerate "${pairs[@]}" --refresh 0.5 --tick 2026-01-01
say python -m pipeline verify "$out/pairs"
say python -m trainer fit --data "$out/pairs" --manifest 2 --out "$out/kd-refreshed" --init "$out/kd" \
    --objective.name knowledge --steps 8000 --lr 0.0005

say python -m trainer evaluate "$out/kd" "$out/kd-refreshed" "$out/progressive" --data "$out/pairs" --nfe 1 2 4 8 \
    --out "$out"
