"""The chunked cross entropy against megatron-core's own, and against torch's, at every layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distributed.harness import Checks, Run, main
from helpers import tiny_config
from qwen2_ascend.parallel import ParallelLayout

if TYPE_CHECKING:
    import torch

CHECKS = Checks()
S, B, H, VOCABULARY = 12, 3, 32, 200
"""VOCABULARY counts rows of padding too; labels are below REAL."""
REAL = 190

# sizes of chunks: one token; no divisor of the tokens; all tokens; more than there are
CHUNKS = (1, 7, S * B, 1000)


def layout(run: Run, tp: int = 1, pp: int = 1, **options: Any) -> ParallelLayout:
    from qwen2_ascend import runtime

    cut = ParallelLayout(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **options)
    runtime.destroy_model_parallel()
    runtime.initialize_model_parallel(cut, tiny_config().num_layers)
    run.runtime.seed_all(5)
    return cut


def example(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """hidden `[s, b, h]`, weight `[vocabulary, h]`, labels `[b, s]`, gradients `[b, s]`; the labels
    have one that is outside the vocabulary, whose loss is masked."""
    import torch

    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(S, B, H, generator=generator)
    weight = 0.3 * torch.randn(VOCABULARY, H, generator=generator)
    weight[REAL:] = 0  # padding
    labels = torch.randint(REAL, (B, S), generator=generator)
    grads = torch.rand(B, S, generator=generator)
    labels[1, 2], grads[1, 2] = -100, 0
    return hidden.to(dtype), weight.to(dtype), labels, grads


def part(tensor: torch.Tensor, tp: int, dim: int = 0) -> torch.Tensor:
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    return tensor.chunk(tp, dim=dim)[rank].clone()


def plain(hidden, weight, labels, sequence_parallel: bool):
    """What GPTModel does: ColumnParallelLinear's product, then its cross entropy."""
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        vocab_parallel_cross_entropy,
    )

    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    losses = vocab_parallel_cross_entropy(hidden @ weight.t(), labels.t().contiguous())
    return losses.t()


def chunked(*inputs: Any, **options: Any) -> torch.Tensor:
    """`chunked_cross_entropy`."""
    from qwen2_ascend.model.cross_entropy import chunked_cross_entropy

    return chunked_cross_entropy(*inputs, **options)


def equals_the_plain_one(tp: int, sequence_parallel: bool, run: Run) -> str:
    """Losses and both gradients, within fp32's rounding, for any chunk."""
    import torch

    layout(run, tp)
    hidden, weight, labels, grads = example(torch.float32)
    if sequence_parallel:
        hidden = part(hidden, tp)
    inputs = [hidden.requires_grad_(), part(weight, tp).requires_grad_()]
    expected = plain(*inputs, labels, sequence_parallel)
    expected_grads = torch.autograd.grad(expected, inputs, grads)
    worst = 0.0
    for chunk_size in CHUNKS:
        losses = chunked(
            *inputs, labels, chunk_size=chunk_size, sequence_parallel=sequence_parallel
        )
        found = (losses, *torch.autograd.grad(losses, inputs, grads))
        for one, other in zip(found, (expected, *expected_grads), strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
            worst = max(worst, ((one - other).abs().max() / other.abs().max()).item())
    assert worst <= 1e-6, worst
    return f"{worst:.1e} of the largest"


for _tp, _sequence_parallel in ((1, False), (2, False), (2, True), (4, False), (4, True)):
    _name = f"tp{_tp}{'-sp' if _sequence_parallel else ''}-equals-the-plain-one"
    CHECKS.case(_name, _tp, equals_the_plain_one, _tp, _sequence_parallel)


@CHECKS.add(world_size=2)
def half_precision_is_as_near_to_the_exact_one_as_the_plain_one(run: Run) -> str:
    """fp64 has the same rounded inputs, whatever the size of the chunks."""
    import torch

    layout(run, 2)
    notes = []
    for dtype in (torch.bfloat16, torch.float16):
        hidden, weight, labels, grads = example(dtype)
        exact_inputs = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
        logits = exact_inputs[0] @ exact_inputs[1].t()
        exact = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.t().flatten(), reduction="none", ignore_index=-100
        )
        exact_grads = torch.autograd.grad(exact, exact_inputs, grads.t().flatten().double())
        inputs = [hidden.requires_grad_(), part(weight, 2).requires_grad_()]
        exact_grads = (exact_grads[0], part(exact_grads[1], 2))

        def off(losses, inputs=inputs, grads=grads, exact_grads=exact_grads):
            found = torch.autograd.grad(losses, inputs, grads)
            assert [grad.dtype for grad in found] == [x.dtype for x in inputs]
            return [
                (one - other).abs().max().item()
                for one, other in zip(found, exact_grads, strict=True)
            ]

        noise = off(plain(*inputs, labels, False))
        for chunk_size in CHUNKS:
            own = off(chunked(*inputs, labels, chunk_size=chunk_size))
            assert all(a <= 1.2 * b for a, b in zip(own, noise, strict=True)), (own, noise)
        notes.append(f"{dtype}: off by {own}, the plain one by {noise}")
    return "; ".join(notes)


@CHECKS.add(world_size=1)
def its_peak_memory_grows_with_the_chunk_and_not_with_the_tokens(run: Run) -> str:
    """Bytes of all tensors that exist at once, counted; the weight's gradient is in every way."""
    import torch

    from planning.tensor_memory import TensorMemory

    layout(run)
    rows, width, tokens = 4096, 16, 256
    weight = torch.randn(rows, width)
    logits_bytes, gradient_bytes = 4 * rows * tokens, weight.nbytes

    def peak(num_tokens: int, chunk_size: int | None) -> int:
        with TensorMemory() as memory:
            inputs = [torch.randn(num_tokens, 1, width).requires_grad_(), weight.clone()]
            inputs[1].requires_grad_()
            labels = torch.randint(rows, (1, num_tokens))
            before = memory.live
            if chunk_size is None:
                losses = plain(*inputs, labels, False)
            else:
                losses = chunked(*inputs, labels, chunk_size=chunk_size)
            losses.sum().backward()
        return memory.peak - before

    whole, some, small = peak(tokens, None), peak(tokens, 32), peak(tokens, 8)
    assert whole >= logits_bytes, (whole, logits_bytes)
    # of a chunk two copies at most, of which the plain way has one of all tokens
    assert some - gradient_bytes <= 2 * whole * 32 / tokens, (some, whole)
    assert small < some < whole / 3
    longer = peak(2 * tokens, 32)
    assert longer - some < logits_bytes / 8, (longer, some)
    return f"plain {whole}, chunks of 32 {some}, of 8 {small}, of 32 twice as long {longer}"


@CHECKS.add(world_size=1)
def it_is_torchs_cross_entropy(run: Run) -> None:
    """An independent one, in fp32, over the same rows."""
    import torch

    layout(run)
    hidden, weight, labels, grads = example(torch.float32)
    labels[1, 2] = 0
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    expected = torch.nn.functional.cross_entropy(
        (hidden @ weight.t()).permute(1, 2, 0), labels, reduction="none"
    )
    expected_grads = torch.autograd.grad(expected, inputs, grads)
    losses = chunked(*inputs, labels, chunk_size=5)
    found_grads = torch.autograd.grad(losses, inputs, grads)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    for one, other in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@CHECKS.add(world_size=1)
def extreme_logits_are_no_nan(run: Run) -> None:
    import torch

    layout(run)
    hidden, weight, labels, grads = example(torch.float32)
    inputs = [(hidden * 1e4).requires_grad_(), weight.requires_grad_()]
    losses = chunked(*inputs, labels, chunk_size=5)
    assert losses.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(losses, inputs, grads))


@CHECKS.add(world_size=1)
def a_frozen_weight_gets_no_gradient(run: Run) -> None:
    import torch

    layout(run)
    hidden, weight, labels, grads = example(torch.float32)
    hidden.requires_grad_()
    losses = chunked(hidden, weight, labels, chunk_size=5)
    (frozen,) = torch.autograd.grad(losses, hidden, grads)
    losses = chunked(hidden, weight.requires_grad_(), labels, chunk_size=5)
    assert torch.equal(frozen, torch.autograd.grad(losses, hidden, grads)[0])


# --- in the model ---------------------------------------------------------------------------------

MODELS = {
    "tp1": (1, {}, False),
    "tp2-sp": (2, {"tp": 2}, True),
    "pp2": (2, {"pp": 2}, False),
    "pp2-vpp2": (2, {"pp": 2, "num_layers_per_virtual_pipeline_stage": 1}, False),
    "tp2-pp2": (4, {"tp": 2, "pp": 2}, False),
}


def model_gradients(name: str, tied: bool, chunk_size: int | None, run: Run):
    """(losses of the last stage, main gradients) of two micro-batches through the schedule."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from qwen2_ascend.model.build import build_model
    from qwen2_ascend.runtime.megatron_compat import finalize_gradients
    from qwen2_ascend.training.loop import wrap_chunks
    from qwen2_ascend.training.settings import ParallelSettings

    _, sizes, sequence_parallel = MODELS[name]
    config = tiny_config(tie_word_embeddings=tied)
    cut = layout(run, **sizes)
    chunks = build_model(
        config,
        cut,
        sequence_parallel=sequence_parallel,
        cross_entropy_chunk_size=chunk_size,
        padded_vocab_size=264,
    )
    with torch.no_grad():  # biases and norms that are not their defaults
        for chunk in chunks:
            for key, parameter in chunk.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.arange(len(parameter)).remainder(7))
                assert "_chunk" not in key
    wrapped = wrap_chunks(chunks, ParallelSettings())
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    losses = []
    tokens = torch.randint(
        config.vocab_size, (2, 2, 17), generator=torch.Generator().manual_seed(1)
    )

    def forward_step(batches, model):
        batch = next(batches)
        output = model(batch[:, :-1], None, None, labels=batch[:, 1:])

        def total(values):
            losses.append(values.detach())
            return values.sum(), torch.tensor(values.numel(), dtype=torch.int), {}

        return output, total

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(tokens) for _ in wrapped],
        model=wrapped,
        num_microbatches=2,
        seq_length=16,
        micro_batch_size=2,
        forward_only=False,
    )
    assert wrapped[0].config.finalize_model_grads_func is finalize_gradients
    grads = {
        f"{index}.{key}": parameter.main_grad.clone()
        for index, chunk in enumerate(chunks)
        for key, parameter in chunk.named_parameters()
    }
    return losses, grads


def in_the_model(name: str, tied: bool, run: Run) -> str:
    """Same losses and same main gradients, accumulated over micro-batches and stages."""
    losses, grads = model_gradients(name, tied, None, run)
    found, found_grads = model_gradients(name, tied, 5, run)
    assert len(losses) == len(found) and grads.keys() == found_grads.keys()
    worst = 0.0
    for one, other in [*zip(found, losses, strict=True)] + [
        (found_grads[key], grads[key]) for key in grads
    ]:
        largest = other.abs().max().item()
        assert largest > 0
        worst = max(worst, (one - other).abs().max().item() / largest)
    assert worst <= 5e-6, worst
    return f"{worst:.1e} of the largest"


for _name, (_world_size, _, _) in MODELS.items():
    for _tied in (False, True):
        _case = f"model-{_name}-{'tied' if _tied else 'untied'}"
        CHECKS.case(_case, _world_size, in_the_model, _name, _tied)


@CHECKS.add(world_size=1)
def without_labels_it_gives_logits(run: Run) -> None:
    import torch

    from qwen2_ascend.model.build import build_model

    found = []
    for chunk_size in (None, 4):
        cut = layout(run)
        (chunk,) = build_model(tiny_config(), cut, cross_entropy_chunk_size=chunk_size)
        tokens = torch.arange(24).view(2, 12)
        found.append((chunk(tokens, None, None), chunk.state_dict().keys()))
    (logits, names), (again, same_names) = found
    assert torch.equal(logits, again) and names == same_names


if __name__ == "__main__":
    main(CHECKS)
