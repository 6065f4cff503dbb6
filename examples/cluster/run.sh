#!/usr/bin/env bash
# Full fine-tuning of Qwen2.5-7B on sequences of 32,768 tokens, on 2 nodes of 8 NPUs.
#
#     NODE_RANK=0 MASTER_ADDR=node-0 examples/cluster/run.sh MODEL CHATS OUT      # on the first node
#     NODE_RANK=1 MASTER_ADDR=node-0 examples/cluster/run.sh MODEL CHATS OUT      # on the second one
#
# NODE_RANK is the number of this node, from 0. MASTER_ADDR is the address of node 0, whose port
# MASTER_PORT (29500) the other nodes must reach. MODEL, CHATS and OUT lie on storage that all nodes
# share. The same line starts the run, goes on with it after any end, and says so when it is done.
set -euo pipefail
MODEL=${1:?the Hugging Face folder of Qwen2.5-7B-Instruct} CHATS=${2:?chats.jsonl} OUT=${3:?a folder}

exec torchrun --nnodes "${NNODES:-2}" --node-rank "${NODE_RANK:?}" --nproc-per-node 8 \
    --master-addr "${MASTER_ADDR:?}" --master-port "${MASTER_PORT:-29500}" --max-restarts 3 \
    "$(dirname "${BASH_SOURCE[0]}")/../../launch/finetune_qwen2.py" --device npu \
    --load "$OUT/run" --pretrained-checkpoint "$MODEL" --save "$OUT/run" --save-hf "$OUT/hf" \
    --data-path "$CHATS" --data-cache-path "$OUT/data" --seq-length 32768 --pack \
    --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer \
    --micro-batch-size 1 --global-batch-size 16 --num-train-epochs 3 --bf16 \
    --lr 1e-5 --min-lr 1e-6 --lr-decay-style cosine --lr-warmup-fraction 0.03 --weight-decay 0.0 \
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 \
    --cross-entropy-chunk-size 2048 --distributed-timeout-minutes 30 \
    --save-interval 100 --async-save --keep-last 2 --on-save-failure continue \
    --tensorboard-dir "$OUT/tensorboard"
