"""Logits and gradients of the model at every layout against transformers, from the same weights.

With the gate and up halves cut on the wrong axis round trips, shapes and even TP1 logits are
right: logits at TP >= 2 from random biases and norm weights are what proves the mapping.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from distributed.harness import Checks, Run, main
from helpers import make_tiny_hugging_face_folder, tiny_config
from qwen2_ascend.config import Qwen2Config, YarnScaling
from qwen2_ascend.parallel import ParallelLayout

if TYPE_CHECKING:
    import torch

    from distributed.reference import Answer

FP32_TOLERANCE, FP64_TOLERANCE = 1e-6, 1e-14
"""Tolerances of logits near 1; in fp64 about three times what is seen of the wide model, the
largest. A gradient is allowed ten times as much, relative to the largest of its tensor."""
BATCHES, BATCH, LENGTH = 4, 2, 24
"""Micro-batches, sequences in each, tokens in each sequence."""

UNTIED = tiny_config()
TIED = tiny_config(tie_word_embeddings=True)
TWO_GROUPS = tiny_config(num_query_groups=2)
WIDE = tiny_config(
    num_layers=8, hidden_size=512, ffn_hidden_size=1408, num_query_groups=2, kv_channels=64
)
YARN = tiny_config(
    yarn=YarnScaling(factor=4.0, original_max_position_embeddings=16, attention_factor=1.2)
)
MODELS = {"untied": UNTIED, "tied": TIED, "2groups": TWO_GROUPS, "wide": WIDE, "yarn": YARN}

CHECKS = Checks()


@dataclass(frozen=True)
class Case:
    """A model cut in one way."""

    model: str
    layout: ParallelLayout
    padded_vocab_size: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Qwen2Config:
        return MODELS[self.model]


def _add(
    model: str,
    tp: int = 1,
    pp: int = 1,
    *,
    vpp: int | None = None,
    layers: tuple[int, ...] | None = None,
    padded_vocab_size: int = 256,
    **options: Any,
) -> None:
    layout = ParallelLayout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        num_layers_per_virtual_pipeline_stage=vpp,
        num_layer_list=layers,
    )
    words = [f"tp{tp}", f"pp{pp}", f"vpp{vpp}" if vpp else "", *map(str, layers or ())]
    words += [f"vocab{padded_vocab_size}" if padded_vocab_size != 256 else "", *options, model]
    name = "-".join(word for word in words if word)
    case = Case(model, layout, padded_vocab_size, options)
    CHECKS.case(name, tp * pp, parity, case)


def parity(case: Case, run: Run) -> str:
    """Compares logits and every parameter's gradient, in fp32 and in fp64."""
    from qwen2_ascend import runtime
    from qwen2_ascend.runtime.megatron_compat import megatron_release

    runtime.initialize_model_parallel(case.layout, case.config.num_layers)
    if megatron_release() < (needed := _needed_release(case)):
        return _refusal(case, needed)
    run.runtime.seed_all(1)
    found = []
    for dtype, tolerance in (("fp32", FP32_TOLERANCE), ("fp64", FP64_TOLERANCE)):
        if (case.model, dtype) in (("wide", "fp32"), ("yarn", "fp64")):
            # In fp32 transformers' own noise is 1.4e-6 there; its YaRN knows fp32 only.
            continue
        logits, gradients, largest = _differences(case, dtype, run)
        found.append(f"{dtype} logits {logits:.1e} of {largest:.1f}, gradients {gradients:.1e}")
        assert logits <= tolerance, found[-1]
        assert gradients <= 10 * tolerance, found[-1]
    return "; ".join(found)


def _needed_release(case: Case) -> tuple[int, int]:
    """The first megatron-core that can cut the model so."""
    if case.layout.tp > case.config.num_query_groups:
        return (0, 16)
    return (0, 13) if len(set((case.layout.num_layer_list or ())[1:-1])) > 1 else (0, 12)


def _refusal(case: Case, needed: tuple[int, int]) -> str:
    """The message, which has to name the release that can."""
    from qwen2_ascend.errors import UserError
    from qwen2_ascend.model.build import build_model

    way_out = rf"install megatron-core {needed[0]}\.{needed[1]}"
    with pytest.raises(UserError, match=way_out) as caught:
        build_model(case.config, case.layout, padded_vocab_size=case.padded_vocab_size)
    return str(caught.value)


def _differences(case: Case, dtype: str, run: Run) -> tuple[float, float, float]:
    """The largest difference of a logit on all ranks, that of a gradient relative to its tensor's
    largest, and the largest logit itself."""
    import torch

    answer = _answer(case, dtype, run)
    chunks = _loaded_chunks(case, dtype, run)
    logits = _forward_backward(chunks, case, answer.tokens, answer.weights)
    differences = torch.zeros(2, dtype=torch.float64)
    if logits is not None:
        logits = logits[..., : case.config.vocab_size]
        differences[0] = (logits - answer.logits).abs().max()
    differences[1] = _gradient_difference(chunks, case, answer.gradients)
    torch.distributed.all_reduce(differences, torch.distributed.ReduceOp.MAX)
    return *differences.tolist(), answer.logits.abs().max().item()


def _answer(case: Case, dtype: str, run: Run) -> Answer:
    """What transformers says; rank 0 asks it once per model and dtype of a launch."""
    import torch

    from distributed.reference import ask_transformers, read_answer

    folder = run.folder / case.model
    if run.runtime.rank == 0 and not folder.exists():
        make_tiny_hugging_face_folder(folder, case.config, seed=3)
    path = run.folder / f"{case.model}-{dtype}.pt"
    if run.runtime.rank == 0 and not path.exists():
        ask_transformers(folder, dtype, (BATCHES, BATCH, LENGTH), path)
    torch.distributed.barrier()
    return read_answer(path)


def _loaded_chunks(case: Case, dtype: str, run: Run) -> list[Any]:
    """Megatron's DDP around this rank's chunks, filled as `--load` fills them."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from qwen2_ascend.checkpoint.load import load_checkpoint_weights
    from qwen2_ascend.model.build import build_model

    chunks = build_model(
        case.config,
        case.layout,
        padded_vocab_size=case.padded_vocab_size,
        dtype=dtype,
        perform_initialization=False,
        **case.options,
    )
    load_checkpoint_weights(
        chunks,
        run.folder / case.model,
        case.layout,
        padded_vocab_size=case.padded_vocab_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_stage=parallel_state.get_pipeline_model_parallel_rank(),
    )
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=False)
    return [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]


def _expected(case: Case, index: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What chunk `index` of this rank holds of the reference's `tensors`."""
    from megatron.core import parallel_state

    from distributed.reference import expected_parameters
    from qwen2_ascend.checkpoint.rules import Shard

    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    shard = Shard(tp_rank, parallel_state.get_pipeline_model_parallel_rank(), index)
    return expected_parameters(case.config, case.layout, case.padded_vocab_size, shard, tensors)


def _forward_backward(
    chunks: list[Any], case: Case, tokens: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor | None:
    """Runs megatron-core's own schedule; the logits of all micro-batches on the last stage."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    seen: list[torch.Tensor] = []
    tp, tp_rank = case.layout.tp, parallel_state.get_tensor_model_parallel_rank()
    padding = case.padded_vocab_size - case.config.vocab_size
    weights = torch.nn.functional.pad(weights, (0, padding)).chunk(tp, dim=-1)[tp_rank]

    def step(iterator, model):
        index = next(iterator)
        output = model(tokens[index], None, None)

        def loss(logits):
            seen.append(gather_from_tensor_model_parallel_region(logits.detach()))
            return (logits * weights[index]).sum(), {}

        return output, loss

    for chunk in chunks:
        chunk.zero_grad_buffer()
    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(range(BATCHES)) for _ in chunks],
        model=chunks,
        num_microbatches=BATCHES,
        seq_length=LENGTH,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    return torch.stack(seen) if seen else None


def _gradient_difference(
    chunks: list[Any], case: Case, gradients: dict[str, torch.Tensor]
) -> float:
    worst = 0.0
    for index, chunk in enumerate(chunks):
        expected = _expected(case, index, gradients)
        parameters = dict(chunk.module.named_parameters())
        assert parameters.keys() == expected.keys(), sorted(parameters.keys() ^ expected.keys())
        for name, parameter in parameters.items():
            difference = (parameter.main_grad - expected[name]).abs().max()
            worst = max(worst, (difference / expected[name].abs().max()).item())
    return worst


for _model in ("untied", "tied", "2groups", "wide", "yarn"):
    _add(_model)
_add("tied", recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
_add("untied", recompute_granularity="selective")

for _model in ("untied", "tied", "2groups", "wide", "yarn"):
    _add(_model, tp=2)
for _model in ("untied", "tied", "wide"):
    _add(_model, pp=2)
for _model in ("untied", "tied"):
    _add(_model, tp=2, sequence_parallel=True)
    _add(_model, pp=2, vpp=1)
_add("untied", pp=2, layers=(1, 3))
_add("tied", pp=2, layers=(3, 1))
_add("untied", tp=2, padded_vocab_size=320)

for _model in ("untied", "tied", "2groups", "wide"):
    _add(_model, tp=4)
    _add(_model, tp=2, pp=2)
_add("tied", tp=4, sequence_parallel=True)
_add("2groups", tp=4, sequence_parallel=True)
_add("tied", tp=2, pp=2, sequence_parallel=True)
_add("tied", tp=2, pp=2, vpp=1, sequence_parallel=True)
_add("wide", tp=2, pp=2, vpp=2)
_add("wide", pp=4, layers=(1, 2, 4, 1))
_add("tied", pp=4)


if __name__ == "__main__":
    main(CHECKS)
