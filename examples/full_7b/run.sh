#!/usr/bin/env bash
# Full fine-tuning of Qwen2.5-7B on one node of 8 NPUs: run.sh MODEL CHATS OUT
set -euo pipefail
MODEL=${1:?the Hugging Face folder of Qwen2.5-7B-Instruct} CHATS=${2:?chats.jsonl} OUT=${3:?a new folder}

torchrun --nproc-per-node 8 "$(dirname "${BASH_SOURCE[0]}")/../../launch/finetune_qwen2.py" \
    --load "$MODEL" --data-path "$CHATS" --seq-length 4096 --pack \
    --tensor-model-parallel-size 4 --sequence-parallel --use-distributed-optimizer \
    --micro-batch-size 1 --global-batch-size 64 --num-train-epochs 3 --bf16 \
    --lr 1e-5 --min-lr 1e-6 --lr-decay-style cosine --lr-warmup-fraction 0.03 --weight-decay 0.0 \
    --cross-entropy-chunk-size 2048 --overlap-grad-reduce --overlap-param-gather \
    --save "$OUT/run" --save-interval 200 --save-hf "$OUT/hf"
