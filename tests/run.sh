#!/usr/bin/env bash
# Install what the tests need and run them:  bash tests/run.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh test,dev
export OMP_NUM_THREADS=1 # ranks share the cores; also what makes CPU sums repeatable
export TOKENIZERS_PARALLELISM=false
# The whole suite: a process for each core; a file's tests share their fixtures, so they stay together.
[ $# -gt 0 ] || set -- --numprocesses auto --maxprocesses 8 --dist loadfile
exec python -m pytest "$@"
