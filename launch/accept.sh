#!/usr/bin/env bash
# Check that this machine trains right, before real work is trusted to it:
#
#     bash launch/accept.sh [--out acceptance.json] [--stages ...]
#
# Stage by stage, and no further than the first that fails: GPUs and their driver, attention kernels, single steps of
# every method against the CPU, compiled layers, all processes against one, interruption, export, speed. It takes some
# minutes on a machine with 8 GPUs and writes acceptance.json, which is what a report of a problem should contain.
set -euo pipefail
case "${1:-}" in
-h | --help) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//' && exit ;;
esac
cd "$(dirname "$0")/.."
source launch/venv.sh test
exec python -m tests.acceptance "$@"
