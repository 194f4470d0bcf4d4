#!/usr/bin/env bash
# Install what the tests need and run them:  bash tests/run.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh test,dev
export OMP_NUM_THREADS=1 # ranks share the cores; also what makes CPU sums repeatable
export TOKENIZERS_PARALLELISM=false
exec python -m pytest "$@"
