#!/usr/bin/env bash
# The HH-RLHF recipe: SFT, a reward model that starts from the SFT model, and its evaluation.
#
#     bash launch/hh_rlhf.sh --model MODEL --sft sft.json --rm pairs.json [--test test.json] [options]
#
# The same command again resumes what was stopped, finds finished what is finished, and evaluates again.
#
#   --model MODEL      Hugging Face folder of a LLaMA or GPT-Neo (config.json, *.safetensors, tokenizer)
#   --sft FILE         {"type": "text_only", "instances": [{"text": ...}]} or the records as JSON lines, plain or .gz
#   --rm FILE          {"instances": [{"positive": ..., "negative": ...}]} or the records as JSON lines
#   --test FILE        pairs to evaluate on. Default: hold out 10 % of --rm by conversation, and evaluate in training
#                      (python -m rm.prepare_hh makes all three files from Anthropic's or Dahoas' data)
#   --out DIR          output folder (default runs/hh_rlhf)
#   --nproc N          processes on this machine (default: one per GPU, or 1 without GPUs)
#   --sft_epochs E     epochs of SFT (default 2; the recipe's authors found that more than one matters); 0: no SFT, the
#                      reward model starts from MODEL
#   --sft_out DIR      folder of the SFT run, which several reward models may share (default OUT/sft)
#   --sft_flags FLAGS  additional flags for train_sft.py, as one word: "--learning_rate 1e-5 --max_length 1024"
#   --lora R           train the reward model with LoRA of rank R (16 in the recipe). Default: train all weights
#   -- FLAGS           additional flags for train_rm.py, such as --global_batch_size 128
#
# The mean reward of the texts for SFT goes into the reward model's scoring.json (--reward_set_path).
set -euo pipefail
usage() { sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; }
model="" sft="" rm="" test="" out=runs/hh_rlhf nproc="" epochs=2 sft_out="" sft_flags="" lora="" more=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) usage && exit ;;
    --) shift && more+=("$@") && break ;;
    --model) model=$2 ;; --sft) sft=$2 ;; --rm) rm=$2 ;; --test) test=$2 ;; --out) out=$2 ;; --nproc) nproc=$2 ;;
    --sft_epochs) epochs=$2 ;; --sft_out) sft_out=$2 ;; --sft_flags) sft_flags=$2 ;; --lora) lora=$2 ;;
    *) echo "error: unknown option $1; see --help" >&2 && exit 2 ;;
    esac
    shift 2
done
for name in model rm; do
    [ -n "${!name}" ] || { echo "error: --$name is missing; see --help" >&2 && exit 2; }
done
[ -n "$sft" ] || [ "$epochs" = 0 ] || { echo "error: --sft is missing; --sft_epochs 0 does without" >&2 && exit 2; }

here=$(cd "$(dirname "$0")/.." && pwd)
(cd "$here" && source launch/venv.sh "")
source "$here/.venv/bin/activate"
source "$here/launch/torchrun.sh"
nproc=${nproc:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
run() { "${torchrun[@]}" --standalone --nproc-per-node "$nproc" "$here/$1" "${@:2}"; }

if [ "$epochs" = 0 ]; then
    start=$model
else
    sft_out=${sft_out:-$out/sft}
    start=$sft_out/model
    # shellcheck disable=SC2086  # the flags are one word on the command line
    run train_sft.py --model_name_or_path "$model" --dataset_path "$sft" --output_dir "$sft_out" \
        --learning_rate 2e-5 --num_train_epochs "$epochs" $sft_flags
fi
if [ -n "$lora" ]; then
    train=(--use_lora true --lora_r "$lora" --learning_rate 3e-5) # LMFlow's; the rule for adapters is 1e-4 (docs/recipes.md)
else
    train=(--learning_rate 5e-6)
fi
[ -z "$sft" ] || train+=(--reward_set_path "$sft")
if [ -n "$test" ]; then train+=(--eval_dataset_path "$test"); else train+=(--validation_split_percentage 10); fi
run train_rm.py --model_name_or_path "$start" --dataset_path "$rm" --output_dir "$out/rm" --eval_steps 100 \
    "${train[@]}" "${more[@]}"
[ -z "$test" ] || run eval_rm.py --model_name_or_path "$out/rm/model" --dataset_path "$test" --output_dir "$out/eval"
