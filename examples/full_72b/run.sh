#!/usr/bin/env bash
# Full fine-tuning of Qwen2.5-72B on 16 nodes of 8 NPUs; on each node: run.sh MODEL CHATS OUT
# NODE_RANK is the number of this node, from 0. MASTER_ADDR is the address of node 0.
# MODEL, CHATS and OUT lie on storage that all nodes share.
set -euo pipefail
MODEL=${1:?the Hugging Face folder of Qwen2.5-72B-Instruct} CHATS=${2:?chats.jsonl} OUT=${3:?a new folder}

torchrun --nnodes 16 --node-rank "${NODE_RANK:?}" --nproc-per-node 8 \
    --master-addr "${MASTER_ADDR:?}" --master-port "${MASTER_PORT:-29500}" \
    "$(dirname "${BASH_SOURCE[0]}")/../../launch/finetune_qwen2.py" \
    --load "$MODEL" --data-path "$CHATS" --data-cache-path "$OUT/data" --seq-length 4096 --pack \
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 \
    --num-layers-per-virtual-pipeline-stage 5 --sequence-parallel --use-distributed-optimizer \
    --micro-batch-size 1 --global-batch-size 256 --num-train-epochs 3 --bf16 \
    --lr 5e-6 --min-lr 5e-7 --lr-decay-style cosine --lr-warmup-fraction 0.03 --weight-decay 0.0 \
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 \
    --cross-entropy-chunk-size 2048 --distributed-timeout-minutes 60 \
    --save "$OUT/run" --save-interval 100 --save-hf "$OUT/hf"
