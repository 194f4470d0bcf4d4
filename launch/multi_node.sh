#!/usr/bin/env bash
# Run one of the three scripts on several machines without SLURM. Start the same command on every machine:
#
#     bash launch/multi_node.sh --nodes 2 --head HOST train_rm.py --model_name_or_path MODEL \
#          --dataset_path pairs.jsonl --output_dir runs/rm
#
#   --nodes N          number of machines; training begins when all of them have connected
#   --head HOST[:PORT] rendezvous: one of the machines, by a name or address that all can reach (default port 29400)
#   --nproc P          processes on this machine (default: one per GPU, or 1 without GPUs)
#   --id NAME          distinguishes runs that use the same head (default rm)
#   SCRIPT FLAGS...    the files, and --output_dir, have to be on a file system that all machines share
#
# If a process dies, all processes are restarted from the newest checkpoint (MAX_RESTARTS=3). A machine that cannot
# reach the head for HEAD_TIMEOUT=300 seconds gives up. What each setting is for: launch/README.md.
set -euo pipefail
usage() { sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; }
nodes="" head="" nproc="" id=rm
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) usage && exit ;;
    --nodes) nodes=$2 ;; --head) head=$2 ;; --nproc) nproc=$2 ;; --id) id=$2 ;;
    -*) echo "error: unknown option $1; see --help" >&2 && exit 2 ;;
    *) break ;;
    esac
    shift 2
done
for name in nodes head; do
    [ -n "${!name}" ] || { echo "error: --$name is missing; see --help" >&2 && exit 2; }
done
[ -f "${1:-}" ] || { echo "error: ${1:-the script}: no such file; see --help" >&2 && exit 2; }
host=${head%:*} port=29400
[ "$host" = "$head" ] || port=${head##*:}

here=$(cd "$(dirname "$0")/.." && pwd)
[ ! -e "$here/.venv/bin/activate" ] || source "$here/.venv/bin/activate"
source "$here/launch/torchrun.sh"
nproc=${nproc:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}

"${torchrun[@]}" --nnodes "$nodes" --nproc-per-node "$nproc" \
    --rdzv-backend c10d --rdzv-endpoint "$host:$port" --rdzv-id "$id.$host.$port" "$@" &
run=$!
trap 'kill -TERM $run' TERM INT USR1 # torchrun forwards it; training saves a checkpoint and exits

# If the head is gone, torchrun waits forever and ignores signals, so a background process checks the connection.
(
    seen=$SECONDS
    while sleep 10 &>/dev/null && kill -0 $run 2>/dev/null; do
        if timeout 5 bash -c ": >/dev/tcp/$host/$port" 2>/dev/null; then
            seen=$SECONDS
        elif [ $((SECONDS - seen)) -gt "${HEAD_TIMEOUT:-300}" ]; then
            echo "error: $host:$port could not be reached for ${HEAD_TIMEOUT:-300} s: giving up" >&2
            kill -TERM $run && sleep 40 && kill -KILL $run
        fi
    done
) &
watch=$!

while kill -0 $run 2>/dev/null; do wait $run || true; done # a trapped signal ends `wait`, but not torchrun
wait $run && code=0 || code=$?
kill $watch 2>/dev/null || true
exit $code
