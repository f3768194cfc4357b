#!/usr/bin/env bash
# The longer run behind the README's tables, on digits: every objective on the same pairs, three seeds of each, beside
# the teacher's solvers, and what pairs do to the error. Over an hour on 2 cores; what is done is not done again.
# Usage: results.sh FOLDER [options of python -m tests.benchmarks.results]
set -euo pipefail
mkdir -p "${1:?name a folder for the results}"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.."

python -m tests.benchmarks.results --out "$out" "${@:2}"
printf '\n%s\n' "$out/report.md:" && cat "$out/report.md"
