"""What the planner says of a layout against what a step of it holds and moves on CPU ranks."""

from __future__ import annotations

import gc
from collections import Counter
from typing import TYPE_CHECKING, Any

from distributed import train_worker
from distributed.harness import Checks, Run, main
from helpers import make_tiny_hugging_face_folder, tiny_config
from qwen2_ascend.errors import UserError
from qwen2_ascend.planning.job import ALL_LAYERS, Job, RunLayout
from qwen2_ascend.planning.memory import stage_memory
from qwen2_ascend.planning.traffic import collectives

if TYPE_CHECKING:
    from pathlib import Path

    from qwen2_ascend.planning.memory import Memory
    from qwen2_ascend.training.loop import TrainingRun

CHECKS = Checks()
LENGTH = 128
CONTROL_BYTES = 256
"""Tensors up to this size are what ranks tell each other: losses, tokens, the norm."""
PIECES = {"mc2": True, "coc_parallel_num": 4}

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1-pp1": {},
    "tp1-pp1-tied-bf16": {"dtype": "bf16", "tied": True},
    "tp1-pp1-full-bf16": {"dtype": "bf16", "recompute": "full"},
    "tp1-pp1-selective-chunked": {"recompute": "selective", "chunk": 64},
    "tp1-pp1-long-bf16": {"length": 512, "sequences": 1, "dtype": "bf16"},
    "tp1-pp1-unfused": {"keeps_scores": True},
    "tp1-pp1-unfused-full-bf16": {"keeps_scores": True, "recompute": "full", "dtype": "bf16"},
    "tp1-pp1-lora-bf16": {"lora": 4, "dtype": "bf16"},
    "tp1-pp1-lora-full-bf16": {"lora": 4, "recompute": "full", "dtype": "bf16", "chunk": 64},
    "tp2-sp-lora-bf16": {"tp": 2, "sequence_parallel": True, "lora": 4, "dtype": "bf16"},
    "tp2-lora-bf16": {"tp": 2, "lora": 4, "dtype": "bf16"},
    "tp2-bf16": {"tp": 2, "dtype": "bf16"},
    "tp2-sp-full": {"tp": 2, "sequence_parallel": True, "recompute": "full"},
    "tp2-sp-chunked-bf16": {"tp": 2, "sequence_parallel": True, "chunk": 64, "dtype": "bf16"},
    "pp2-tied-bf16": {"pp": 2, "tied": True, "dtype": "bf16"},
    "pp2-vpp2": {"pp": 2, "layers_per_chunk": 1},
    "pp2-lora-bf16": {"pp": 2, "lora": 4, "dtype": "bf16"},
    "dp2-bf16": {"dp": 2, "dtype": "bf16"},
    "dp2-distributed-optimizer-bf16": {"dp": 2, "distributed_optimizer": True, "dtype": "bf16"},
    "dp2-distributed-optimizer-full-bf16": {
        "dp": 2,
        "distributed_optimizer": True,
        "recompute": "full",
        "dtype": "bf16",
    },
    "tp2-pp2-vpp2-sp-tied-selective-bf16": {
        "tp": 2,
        "pp": 2,
        "layers_per_chunk": 1,
        "sequence_parallel": True,
        "tied": True,
        "recompute": "selective",
        "dtype": "bf16",
    },
    "tp2-pp2-sp-bf16": {"tp": 2, "pp": 2, "sequence_parallel": True, "dtype": "bf16"},
    "tp4-more-than-groups": {"tp": 4, "groups": 2},
    "pp4-selective-bf16": {"pp": 4, "recompute": "selective", "dtype": "bf16"},
    "tp1-pp1-reuse-bf16": {"dtype": "bf16", "reuse_fp32_param": True},
    "dp2-distributed-optimizer-reuse-bf16": {
        "dp": 2,
        "distributed_optimizer": True,
        "dtype": "bf16",
        "reuse_fp32_param": True,
    },
    "tp1-pp1-outputs-long-bf16": {
        "length": 512,
        "sequences": 1,
        "dtype": "bf16",
        "recompute_activation_function": ALL_LAYERS,
        "recompute_norm": ALL_LAYERS,
    },
    "tp2-sp-products-in-pieces": {"tp": 2, "sequence_parallel": True, **PIECES},
    "tp2-products-in-pieces-lora-bf16": {"tp": 2, **PIECES, "lora": 4, "dtype": "bf16"},
    "tp2-sp-outputs": {
        "tp": 2,
        "sequence_parallel": True,
        "recompute_activation_function": ALL_LAYERS,
        "recompute_norm": ALL_LAYERS,
    },
    "cp2-distributed-optimizer-bf16": {"cp": 2, "distributed_optimizer": True, "dtype": "bf16"},
    "cp2-ulysses-bf16": {"cp": 2, "ulysses": 2, "dtype": "bf16"},
    "cp2-kvallgather-bf16": {"cp": 2, "gathers_keys": True, "dtype": "bf16"},
    "cp4-kvallgather-full": {"cp": 4, "gathers_keys": True, "recompute": "full"},
    "tp2-cp2-sp-full": {"tp": 2, "cp": 2, "sequence_parallel": True, "recompute": "full"},
    "dp2-distributed-optimizer-o2-bf16": {
        "dp": 2,
        "distributed_optimizer": True,
        "dtype": "bf16",
        "o2_gradient": True,
        "o2_optimizer": True,
    },
    "tp1-pp1-o2-gradient-bf16": {"dtype": "bf16", "o2_gradient": True},
    "tp1-pp1-block-swiglu-of-one-bf16": {
        "dtype": "bf16",
        "recompute_activation_function": 1,
        "length": 512,
        "sequences": 1,
    },
    "pp2-vpp2-tied-distributed-optimizer": {
        "pp": 2,
        "dp": 2,
        "layers_per_chunk": 1,
        "tied": True,
        "distributed_optimizer": True,
    },
}


def planned(
    *,
    tied: bool = False,
    groups: int = 4,
    dtype: str = "fp32",
    chunk: int | None = None,
    lora: int | None = None,
    keeps_scores: bool = False,
    length: int = LENGTH,
    sequences: int = 2,
    backend: str = "cpu",
    **cut: Any,
) -> RunLayout:
    """The planner's view of a layout: four micro-batches of `sequences` sequences per rank."""
    config = tiny_config(
        hidden_size=128,
        ffn_hidden_size=352,
        kv_channels=16,
        num_query_groups=groups,
        vocab_size=1024,
        tie_word_embeddings=tied,
        max_position_embeddings=512,
    )
    job = Job(
        config=config,
        seq_length=length,
        global_batch_size=4 * sequences * cut.get("dp", 1),
        dtype=dtype,
        backend=backend,
        keeps_scores=keeps_scores,
        cross_entropy_chunk_size=chunk,
        lora_rank=lora,
    )
    return RunLayout(job=job, micro_batch_size=sequences, **cut)


def flags(cut: RunLayout) -> str:
    """The launcher's."""
    job = cut.job
    words = {
        f"--mock-data --device {job.backend} --num-workers 0 --train-iters 3 --lr 1e-3": True,
        f"--seq-length {job.seq_length} --micro-batch-size {cut.micro_batch_size}": True,
        f"--global-batch-size {job.global_batch_size}": True,
        f"--tensor-model-parallel-size {cut.tp}": True,
        f"--pipeline-model-parallel-size {cut.pp}": True,
        f"--num-layers-per-virtual-pipeline-stage {cut.layers_per_chunk}": cut.layers_per_chunk,
        "--sequence-parallel": cut.sequence_parallel,
        "--use-distributed-optimizer": cut.distributed_optimizer,
        "--bf16": job.dtype == "bf16",
        "--reuse-fp32-param": cut.reuse_fp32_param,
        f"--context-parallel-size {cut.cp} --context-parallel-algo {cut.context_parallel_algo}": (
            cut.cp > 1
        ),
        "--o2-gradient": cut.o2_gradient,
        "--o2-optimizer": cut.o2_optimizer,
        "--recompute-activation-function": cut.recompute_activation_function,
        f"--recompute-activation-function-num-layers {cut.recompute_activation_function}": 0
        < cut.recompute_activation_function
        < ALL_LAYERS,
        "--recompute-norm": cut.recompute_norm,
        f"--use-ascend-coc --coc-parallel-num {cut.coc_parallel_num}": cut.mc2,
        "--attention-backend unfused": job.keeps_scores,
        "--recompute-granularity selective": cut.recompute == "selective",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1": (
            cut.recompute == "full"
        ),
        f"--cross-entropy-chunk-size {job.cross_entropy_chunk_size}": job.cross_entropy_chunk_size,
    }
    return " ".join(word for word, is_on in words.items() if is_on)


def memory_and_traffic(cut: RunLayout, run: Run) -> str:
    """Peak memory within a twentieth, memory at rest within a hundredth, the same bytes sent."""
    from megatron.core import parallel_state

    from qwen2_ascend.runtime.megatron_compat import check_tensor_parallel

    try:
        check_tensor_parallel(cut.layout, cut.job.config.num_query_groups)
    except UserError as refusal:  # by an older megatron-core
        return str(refusal)
    from planning.collective_log import CollectiveLog
    from planning.tensor_memory import TensorMemory

    folder = weights(cut, run)
    with TensorMemory() as memory, CollectiveLog() as log:
        training = start(cut, run, folder)
        train_worker.steps(training, 1)  # AdamW makes its state
        gc.collect()
        at_rest = memory.live
        memory.reset_peak()
        log.calls.clear()
        train_worker.steps(training, 1)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    told = _compare_memory(stage_memory(cut, stage), at_rest, memory.peak)
    _compare_traffic(cut, stage, log.calls)
    return told


def start(cut: RunLayout, run: Run, folder: Path) -> TrainingRun:
    if cut.job.lora_rank is None:
        return train_worker.start(run, flags(cut), load=folder)
    from qwen2_ascend import runtime
    from qwen2_ascend.finetuning.lora import apply_lora
    from qwen2_ascend.lora_config import LoraConfig
    from qwen2_ascend.training.plan import make_plan
    from qwen2_ascend.training.pretrain import pretraining_data
    from qwen2_ascend.training.settings import parse
    from qwen2_ascend.training.setup import build_chunks, build_run

    plan = make_plan(parse([*flags(cut).split(), "--load", str(folder)]))
    runtime.destroy_model_parallel()
    runtime.initialize_model_parallel(plan.layout, plan.config.num_layers)
    run.runtime.seed_all(plan.settings.runtime.seed)
    chunks = build_chunks(plan, run.runtime)
    apply_lora(chunks, LoraConfig(rank=cut.job.lora_rank), plan.config, plan.layout)
    data, _ = pretraining_data(plan)
    return build_run(plan.settings, run.runtime, chunks, train_data=data)


def weights(cut: RunLayout, run: Run) -> Path:
    """A folder of the model's shape, written by the first rank that asks."""
    import torch

    config = cut.job.config
    folder = run.folder / f"model-{config.tie_word_embeddings}-{config.num_query_groups}"
    if run.runtime.rank == 0 and not folder.exists():
        make_tiny_hugging_face_folder(folder, config)
    torch.distributed.barrier()
    return folder


def _compare_memory(expected: Memory, at_rest: int, peak: int) -> str:
    # tensors of the data loader, and numbers
    rest = at_rest / (expected.at_rest + expected.buffers) - 1
    above = peak / expected.total - 1
    told = f"at rest {rest:+.2%}, peak {peak:,} {above:+.2%} of {expected}"
    assert abs(rest) < 0.01, told
    assert abs(above) < 0.05, told
    return told


def _compare_traffic(cut: RunLayout, stage: int, calls: Counter) -> None:
    """Equal bytes of each kind of collective over each number of ranks."""
    expected: Counter = Counter()
    for call in collectives(cut, stage):
        if call.num_ranks > 1:
            expected[call.op, call.num_ranks] += call.num_bytes * call.num_calls
    found: Counter = Counter()
    for call, count in calls.items():
        if call.num_ranks > 1 and call.num_bytes > CONTROL_BYTES:
            # megatron-core sends some hidden states through the group of all ranks
            num_ranks = 2 if call.op == "send" else call.num_ranks
            found[call.op, num_ranks] += call.num_bytes * count
    expected = +expected
    assert found == expected, f"found besides {found - expected}, missing {expected - found}"


for _name, _layout in LAYOUTS.items():
    _cut = planned(**_layout)
    CHECKS.case(_name, _cut.num_devices, memory_and_traffic, _cut)


if __name__ == "__main__":
    main(CHECKS)
