#!/usr/bin/env bash
# LoRA on Qwen2.5-7B on one node of 8 NPUs, one model per card: run.sh MODEL CHATS OUT
set -euo pipefail
MODEL=${1:?the Hugging Face folder of Qwen2.5-7B-Instruct} CHATS=${2:?chats.jsonl} OUT=${3:?a new folder}

torchrun --nproc-per-node 8 "$(dirname "${BASH_SOURCE[0]}")/../../launch/finetune_qwen2.py" \
    --load "$MODEL" --data-path "$CHATS" --seq-length 4096 --pack \
    --lora-r 16 --lora-alpha 32 --lora-target-modules all-linear \
    --micro-batch-size 1 --global-batch-size 64 --num-train-epochs 3 --bf16 \
    --lr 2e-4 --lr-decay-style cosine --lr-warmup-fraction 0.03 --weight-decay 0.0 \
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 \
    --cross-entropy-chunk-size 2048 \
    --save "$OUT/run" --save-interval 200 --save-adapter "$OUT/adapter" --save-hf "$OUT/hf"
