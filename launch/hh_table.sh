#!/usr/bin/env bash
# The table of the HH-RLHF recipe: the accuracy of reward models after 0, 1 and 2 epochs of SFT, with LoRA of several
# ranks. OUT/table.md and OUT/table.svg have what is evaluated so far; the same command goes on where it was stopped.
#
#     bash launch/hh_table.sh --model MODEL --sft sft.json --rm pairs.json --test test.json [options]
#
#   --model, --sft, --rm, --test, --nproc, --sft_flags, -- FLAGS    as in launch/hh_rlhf.sh, which runs each cell
#   --out DIR             output folder (default runs/hh_table)
#   --sft_epochs "E ..."  rows (default "0 1 2"); 0: no SFT
#   --ranks "R ..."       columns (default "16 32 128")
#
# OUT/sft_E: SFT of E epochs, for all ranks. OUT/sft_E_lora_R: a reward model from it (rm) and its evaluation (eval).
set -euo pipefail
usage() { sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; }
model="" sft="" rm="" test="" out=runs/hh_table nproc="" epochs="0 1 2" ranks="16 32 128" sft_flags="" more=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) usage && exit ;;
    --) shift && more+=("$@") && break ;;
    --model) model=$2 ;; --sft) sft=$2 ;; --rm) rm=$2 ;; --test) test=$2 ;; --out) out=$2 ;; --nproc) nproc=$2 ;;
    --sft_epochs) epochs=$2 ;; --ranks) ranks=$2 ;; --sft_flags) sft_flags=$2 ;;
    *) echo "error: unknown option $1; see --help" >&2 && exit 2 ;;
    esac
    shift 2
done
for name in model sft rm test; do
    [ -n "${!name}" ] || { echo "error: --$name is missing; see --help" >&2 && exit 2; }
done
here=$(cd "$(dirname "$0")/.." && pwd)

# Cells that are evaluated are not run again: all cells of a folder have to be of the same data, model and flags.
same=(--model "$model" --sft "$sft" --rm "$rm" --test "$test" --sft_flags "$sft_flags" -- "${more[@]}")
# Without passwords in URLs and tokens of the hub, as rm/terminal.py masks them.
settings=$(printf '%q ' "${same[@]}" | sed -E 's#([a-z]:/+)[^/ ]+@#\1***@#gi; s/hf_[A-Za-z0-9]{30,}/***/g')
mkdir -p "$out"
[ -e "$out/command" ] || echo "$settings" >"$out/command"
if [ "$(cat "$out/command")" != "$settings" ]; then
    echo "error: $out holds a table of other settings: $(cat "$out/command"); name another --out" >&2 && exit 2
fi

(cd "$here" && source launch/venv.sh report)
source "$here/.venv/bin/activate"
for epoch in $epochs; do
    for rank in $ranks; do
        cell=$out/sft_${epoch}_lora_$rank
        if [ -e "$cell/eval/report.json" ]; then
            echo "$cell: evaluated already"
        else
            bash "$here/launch/hh_rlhf.sh" --out "$cell" --sft_out "$out/sft_$epoch" --sft_epochs "$epoch" \
                --lora "$rank" ${nproc:+--nproc "$nproc"} "${same[@]}"
        fi
        python -m rm.report.recipe_table "$out"
    done
done
