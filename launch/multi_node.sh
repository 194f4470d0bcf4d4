#!/usr/bin/env bash
# Any of the three scripts on several machines without SLURM. Run the same line on every machine:
#
#     bash launch/multi_node.sh --nodes 2 --head HOST train_rm.py --model_name_or_path MODEL \
#          --dataset_path pairs.jsonl --output_dir runs/rm
#
#   --nodes N          how many machines take part; training begins when all have come
#   --head HOST[:PORT] the one of them where they meet, by a name or address that all can reach (port 29400)
#   --nproc P          processes on this machine, one per GPU (default: the GPUs there are, or 1)
#   --id NAME          to tell runs apart that meet at the same head (default rm)
#   SCRIPT FLAGS...    all machines see the same files: --output_dir is on a shared file system
#
# Processes that die are started again, all of them, from the newest checkpoint (MAX_RESTARTS=3). A machine that cannot
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
    --rdzv-backend c10d --rdzv-endpoint "$host:$port" --rdzv-id "$id" "$@" &
run=$!
trap 'kill -TERM $run' TERM INT USR1 # torchrun passes it on; training saves and leaves

# torchrun waits for ever for a head that is gone, deaf to signals: somebody else has to look.
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

while kill -0 $run 2>/dev/null; do wait $run || true; done # a trapped signal ends `wait`, not torchrun
wait $run && code=0 || code=$?
kill $watch 2>/dev/null || true
exit $code
