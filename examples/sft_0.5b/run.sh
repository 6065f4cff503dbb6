#!/usr/bin/env bash
# Full fine-tuning of a 0.5B model on chats.jsonl, on a laptop's CPU: run.sh MODEL OUT [torchrun's and
# the launcher's flags for another layout, as in README.md]
set -euo pipefail
MODEL=${1:?the Hugging Face folder of Qwen2.5-0.5B-Instruct or Qwen2.5-Coder-0.5B-Instruct}
OUT=${2:?a new folder}
PROCESSES=${PROCESSES:-1}
shift 2
HERE=$(dirname "${BASH_SOURCE[0]}")
ROOT=$HERE/../..

torchrun --nproc-per-node "$PROCESSES" "$ROOT"/launch/finetune_qwen2.py \
    --load "$MODEL" --data-path "$HERE/chats.jsonl" --data-cache-path "$OUT/data" --seq-length 128 --pack \
    --global-batch-size 4 --num-train-epochs 3 --lr 4e-5 --lr-warmup-iters 2 --lr-decay-style cosine \
    --save "$OUT/run" --no-save-optim --save-hf "$OUT/tuned" "$@"

for model in "$MODEL" "$OUT/tuned"; do
    echo "== $model"
    python "$ROOT"/launch/generate_qwen2.py --load "$model" --prompt-file "$HERE/questions.jsonl" \
        --no-do-sample --max-new-tokens 60
done
