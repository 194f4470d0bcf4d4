#!/usr/bin/env bash
# SFT, training of a reward model from the SFT model, and its evaluation: everything in minutes on two CPU cores.
#
#     bash launch/quickstart.sh [OUT_DIR]        OUT_DIR: output folder (default runs/quickstart)
#
# The data is synthetic: short invented dialogues, and a LLaMA with a few million untrained parameters (rm/demo.py).
# It shows that all steps work together and that SFT before reward modelling matters; it says nothing about real models.
#
# With a real model and real data, use the same three commands. MODEL is a Hugging Face folder
# (config.json, *.safetensors, tokenizer.json or tokenizer.model) of a LLaMA or GPT-Neo:
#
#     python train_sft.py --model_name_or_path MODEL --dataset_path sft.json --output_dir runs/sft
#     python train_rm.py --model_name_or_path runs/sft/model --dataset_path pairs.jsonl.gz \
#                        --validation_split_percentage 10 --output_dir runs/rm
#     python eval_rm.py --model_name_or_path runs/rm/model --dataset_path test.jsonl.gz --output_dir runs/eval
#
# On N GPUs, replace `python` by `torchrun --nproc_per_node N`. All flags: python train_rm.py --help
# The whole HH-RLHF recipe in one command: bash launch/hh_rlhf.sh --help
set -euo pipefail
case "${1:-}" in
-h | --help) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//' && exit ;;
esac
cd "$(dirname "$0")/.."
out=${1:-runs/quickstart}
[ ! -e "$out" ] || { echo "error: $out exists already: delete it, or choose another folder" >&2 && exit 2; }

source launch/venv.sh ""

echo "== 1. synthetic data: dialogues, preference pairs, an untrained model"
python -m rm.demo "$out/world"

echo "== 2. reward model without SFT"
cosine=(--lr_scheduler_type cosine --warmup_ratio 0.05 --logging_steps 50)
rm_flags=(--dataset_path "$out/world/rm_train.jsonl" --eval_dataset_path "$out/world/rm_test.jsonl"
    --learning_rate 4e-4 --num_train_epochs 4 --global_batch_size 16 "${cosine[@]}")
python train_rm.py --model_name_or_path "$out/world/model" "${rm_flags[@]}" --output_dir "$out/rm_without_sft"

echo "== 3. SFT"
python train_sft.py --model_name_or_path "$out/world/model" --dataset_path "$out/world/sft.json" \
    --learning_rate 1e-3 --num_train_epochs 3 --global_batch_size 8 "${cosine[@]}" --output_dir "$out/sft"

echo "== 4. reward model from the SFT model"
python train_rm.py --model_name_or_path "$out/sft/model" "${rm_flags[@]}" --output_dir "$out/rm_after_sft"

echo "== 5. evaluation of both reward models on held-out dialogues"
for which in without after; do
    python eval_rm.py --model_name_or_path "$out/rm_${which}_sft/model" \
        --dataset_path "$out/world/rm_test.jsonl" --output_dir "$out/eval_${which}_sft"
done
python - "$out" <<'PYTHON'
import json, sys
out = sys.argv[1]
print("\nheld-out accuracy on synthetic dialogues (95 % interval)")
for which in ("without", "after"):
    report = json.load(open(f"{out}/eval_{which}_sft/report.json"))
    low, high = report["accuracy_ci95"]
    print(f"  reward model {which + ' SFT':12} {report['accuracy']:.3f}  ({low:.3f} to {high:.3f})   {out}/rm_{which}_sft/model")
print(f"curves: {out}/*/metrics.jsonl   settings: {out}/*/run.json   scores: {out}/eval_*/scores.jsonl")
PYTHON
