"""Alignment at several layouts; faults planted in the model, each located to the right sublayer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed.harness import Checks, Run, main
from helpers import make_tiny_hugging_face_folder, tiny_config
from qwen2_ascend.config import Qwen2Config

if TYPE_CHECKING:
    import torch

    from qwen2_ascend.alignment.judge import Judgement
    from qwen2_ascend.alignment.settings import AlignSettings
    from qwen2_ascend.checkpoint.readers.base import Source

LENGTH = 16
TIED = tiny_config(tie_word_embeddings=True)
TWO_GROUPS = tiny_config(num_query_groups=2, num_layers=2)
"""Fewer groups than TP4 has ranks."""

CHECKS = Checks()


def given(
    run: Run, flags: str, config: Qwen2Config = TIED
) -> tuple[AlignSettings, Source, torch.Tensor]:
    """Checked settings, the weights and the tokens; the groups of the layout are there."""
    import torch

    from qwen2_ascend import runtime
    from qwen2_ascend.alignment.align import make_tokens
    from qwen2_ascend.alignment.settings import parse, validate
    from qwen2_ascend.checkpoint.source import open_source

    folder = run.folder / f"{config.num_query_groups}-groups"
    if run.runtime.rank == 0 and not folder.exists():
        make_tiny_hugging_face_folder(folder, config, seed=5)
    torch.distributed.barrier()
    settings = parse(f"--load {folder} --device cpu --seq-length {LENGTH} {flags}".split())
    source = open_source(folder)
    validate(settings, source.config, run.runtime.world_size)
    runtime.destroy_model_parallel()
    runtime.initialize_model_parallel(settings.training().layout(), config.num_layers)
    run.runtime.seed_all(1)
    return settings, source, make_tokens(settings, source, None)


def judged(
    run: Run,
    flags: str,
    plant: Callable[[list[Any]], None] | None = None,
    config: Qwen2Config = TIED,
    dump: Path | None = None,
) -> Judgement | None:
    """The whole way; the judgement is rank 0's."""
    from qwen2_ascend.alignment.record import save_record
    from qwen2_ascend.alignment.subject import run_subject
    from qwen2_ascend.alignment.verdict import judge, judge_curve

    settings, source, tokens = given(run, flags, config)
    record, curve = run_subject(settings, source, run.runtime, tokens, plant)
    if record is None:
        return None
    if dump is not None:
        save_record(record, dump)
    found = judge(settings, source, record)
    if curve is not None:
        found = replace(found, steps=tuple(judge_curve(settings, source, curve, tokens)))
    return found


def verdict(found: Judgement) -> str:
    from qwen2_ascend.alignment.report import describe_verdict

    return describe_verdict(found)


def agrees(
    flags: str, worst_total: float, config: Qwen2Config, release: tuple[int, int], run: Run
) -> str:
    """Every sublayer, gradient and step agrees, and the whole model by `worst_total`."""
    from qwen2_ascend.errors import UserError
    from qwen2_ascend.runtime.megatron_compat import megatron_release

    if megatron_release() < release:
        try:
            judged(run, flags, config=config)
        except UserError as error:
            return str(error)
        raise AssertionError("not refused")
    found = judged(run, flags, config=config)
    if found is None:
        return ""
    assert found.aligned, verdict(found)
    assert len(found.findings) == 16 * config.num_layers + 4
    assert len(found.gradients) == 12 * config.num_layers + (2 if config is TIED else 3)
    worst = max(finding.total.worst for finding in found.findings)
    assert worst <= worst_total, f"{worst} of {worst_total}"
    # no dead comparison: what is judged is there, and none of it is zero
    assert all(x.float().abs().max() > 0 for x in found.record.activations.values())
    assert all(x.abs().max() > 0 for x in found.record.gradients.values())
    return f"{verdict(found)} Largest total {worst:.1e}."


def _agrees(
    world_size: int,
    name: str,
    flags: str,
    worst_total: float,
    config: Qwen2Config = TIED,
    release: tuple[int, int] = (0, 12),
) -> None:
    CHECKS.case(name, world_size, agrees, flags, worst_total, config, release)


TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
CP2 = "--context-parallel-size 2"
ULYSSES = "--context-parallel-algo ulysses_cp_algo"
GATHERED = "--context-parallel-algo kvallgather_cp_algo"

_agrees(2, "tp2-fp64", f"{TP2} --precision fp64", 1e-12)
_agrees(2, "tp2-bf16-curve", f"{TP2} --bf16 --train-iters 2", 0.1)
_agrees(2, "pp2-fp32-curve", f"{PP2} --micro-batch-size 2 --train-iters 3 --lr 1e-2", 1e-6)
_agrees(
    4,
    "tp2-pp2-sp-vpp-fp64",
    f"{TP2} {PP2} --sequence-parallel --precision fp64 --num-layers-per-virtual-pipeline-stage 1",
    1e-12,
)
_agrees(2, "cp2-fp64", f"{CP2} --precision fp64", 1e-12)
_agrees(2, "cp2-ulysses-bf16-curve", f"{CP2} {ULYSSES} --bf16 --train-iters 2", 0.1)
_agrees(
    4,
    "tp2-sp-cp2-fp32-curve",
    f"{TP2} --sequence-parallel {CP2} --micro-batch-size 2 --train-iters 3 --lr 1e-2",
    1e-6,
)
_agrees(4, "pp2-cp2-gathered-fp64", f"{PP2} {CP2} {GATHERED} --precision fp64", 1e-12)
_agrees(
    4,
    "more-ranks-than-groups",
    "--tensor-model-parallel-size 4 --sequence-parallel",
    1e-6,
    TWO_GROUPS,
    (0, 16),
)


# --- faults ----------------------------------------------------------------------------------


def swap_gate_and_up(chunks: list[Any]) -> None:
    import torch

    weight = layer(chunks, 2).mlp.linear_fc1.weight
    with torch.no_grad():
        weight.copy_(torch.cat(weight.chunk(2)[::-1]))


def another_rotary_base(chunks: list[Any]) -> None:
    for chunk in chunks:
        chunk.rotary_pos_emb.inv_freq *= 1.5


def no_key_bias(chunks: list[Any]) -> None:
    """Every query group loses it; q and v keep theirs."""
    import torch

    bias = layer(chunks, 1).self_attention.linear_qkv.bias
    groups = TIED.num_query_groups // 2
    with torch.no_grad():
        bias.view(groups, TIED.heads_per_group + 2, TIED.kv_channels)[:, -2].zero_()


def no_causal_mask(chunks: list[Any]) -> None:
    def attend(q: Any, k: Any, v: Any, *, softmax_scale: float, **_: Any) -> Any:
        from torch.nn.functional import scaled_dot_product_attention

        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        context = scaled_dot_product_attention(q, k, v, scale=softmax_scale, enable_gqa=True)
        return context.permute(2, 0, 1, 3).flatten(2)

    core = layer(chunks, 3).self_attention.core_attention
    core._ops = core._ops._replace(attention=attend)


def another_order_of_positions(chunks: list[Any]) -> None:
    """Layer 1's attention takes CP2's chunks for one piece, as Ulysses has it."""
    attention = layer(chunks, 1).self_attention.core_attention
    attention.sequence_cut = replace(attention.sequence_cut, algorithm="ulysses_cp_algo")


def nothing_from_the_other_rank(chunks: list[Any]) -> None:
    """Layer 2's queries see only the keys of their own rank, of CP2's two."""
    core = layer(chunks, 2).self_attention.core_attention
    core.sequence_cut = None


def no_sum_over_ranks(chunks: list[Any]) -> None:
    """linear_proj's output is one rank's part of the sum."""
    projection = layer(chunks, 0).self_attention.linear_proj
    projection.explicit_expert_comm = True


def another_norm_on_the_second_rank(chunks: list[Any]) -> None:
    """The first rank, whose hidden states are looked at, is right."""
    import torch
    from megatron.core import parallel_state

    if parallel_state.get_tensor_model_parallel_rank() == 1:
        with torch.no_grad():
            layer(chunks, 1).pre_mlp_layernorm.weight.mul_(1.05)


def another_norm_epsilon(chunks: list[Any]) -> None:
    """1e-5 for 1e-6: the smallest of mistakes here."""
    layer(chunks, 1).pre_mlp_layernorm.eps = 1e-5


def half_a_gradient(chunks: list[Any]) -> None:
    """Forward is right; on the way back layer 2's norm halves its weight's gradient."""
    layer(chunks, 2).input_layernorm.weight.register_hook(lambda gradient: gradient / 2)


FAULTS = {
    # fault: (the first sublayer that parts, those that part by themselves besides)
    swap_gate_and_up: ("layers.2.gate", {"layers.2.up"}),
    another_rotary_base: (
        "layers.0.query_rotary",
        {f"layers.{n}.{x}_rotary" for n in range(4) for x in ("query", "key")}
        - {"layers.0.query_rotary"},
    ),
    no_key_bias: ("layers.1.key", set()),
    no_causal_mask: ("layers.3.core_attention", set()),
    # the ranks go on with different hidden states, so nearly all that is cut is wrong after it
    no_sum_over_ranks: ("layers.0.linear_proj", None),
    another_norm_on_the_second_rank: (
        "layers.1.pre_mlp_layernorm",
        {"layers.1.gate", "layers.1.up"},
    ),
    another_norm_epsilon: ("layers.1.pre_mlp_layernorm", set()),
}


def layer(chunks: list[Any], number: int) -> Any:
    """A layer of TP2, or of CP2."""
    return chunks[0].decoder.layers[number]


def is_located(
    plant: Callable[[list[Any]], None],
    first: str,
    also: set[str] | None,
    precision: str,
    run: Run,
    layout: str = TP2,
) -> str:
    """The first is named, and exactly those that are wrong themselves: none that inherit."""
    flags = f"{layout} --no-gradients --precision {precision}"
    found = judged(run, flags, plant)
    if found is None:
        return ""
    assert found.first is not None and found.first.name == first, verdict(found)
    if also is not None:
        parted = {finding.name for finding in found.parted}
        assert parted == {first} | also, verdict(found)
    logits = next(finding for finding in found.findings if finding.name == "logits")
    error, noise = logits.total.mean, logits.total_noise.mean
    if plant is another_norm_on_the_second_rank:
        assert list(found.record.disagreement) == ["layers.1.pre_mlp_layernorm"]
    elif plant is not no_sum_over_ranks:
        assert not found.record.disagreement
    if precision == "fp32":  # in bf16 the logits of some show nothing of it
        assert error > 20 * noise, f"{error}, noise {noise}"
    return f"{verdict(found)} The logits are off by {error / noise:.1f} times the noise."


IN_BF16 = (swap_gate_and_up, another_rotary_base, no_key_bias, no_causal_mask)

for _plant, (_first, _also) in FAULTS.items():
    for _precision in ("fp32", "bf16") if _plant in IN_BF16 else ("fp32",):
        _name = f"{_plant.__name__}-{_precision}"
        CHECKS.case(_name, 2, is_located, _plant, _first, _also, _precision)

for _plant, _layer in ((another_order_of_positions, 1), (nothing_from_the_other_rank, 2)):
    _first = f"layers.{_layer}.core_attention"
    CHECKS.case(_plant.__name__, 2, is_located, _plant, _first, set(), "fp32", layout=CP2)


@CHECKS.add(world_size=2)
def padding_of_the_vocabulary_is_seen_in_the_loss(run: Run) -> str:
    """Its logits are 0, not minus infinity: Megatron's softmax counts them, and nothing else."""
    found = judged(run, f"{TP2} --padded-vocab-size 320")
    if found is None:
        return ""
    assert [finding.name for finding in found.parted] == ["loss"], verdict(found)
    assert found.record.activations["logits"].shape[-1] == TIED.vocab_size
    return verdict(found)


@CHECKS.add(world_size=2)
def a_fault_of_backward_is_located(run: Run) -> str:
    found = judged(run, TP2, half_a_gradient)
    if found is None:
        return ""
    assert found.first is None
    parted = [finding.name for finding in found.gradients if finding.parted]
    assert parted == ["model.layers.2.input_layernorm.weight"], parted
    assert "PARTED in backward" in verdict(found)
    return verdict(found)


@CHECKS.add(world_size=2)
def a_fault_of_the_optimizer_is_seen(run: Run) -> str:
    """Half the learning rate: the first loss is right, the second is not."""
    from qwen2_ascend.alignment.subject import run_subject
    from qwen2_ascend.alignment.verdict import judge, judge_curve

    settings, source, tokens = given(run, f"{TP2} --train-iters 2 --lr 1e-3")
    half = replace(settings, checks=replace(settings.checks, lr=5e-4))
    record, curve = run_subject(half, source, run.runtime, tokens)
    if record is None:
        return ""
    assert curve is not None
    found = judge(settings, source, record)
    found = replace(found, steps=tuple(judge_curve(settings, source, curve, tokens)))
    assert found.first is None and found.first_gradient is None
    assert found.first_step is not None and found.first_step.step == 2
    return verdict(found)


@CHECKS.add(world_size=4)
def dumps_of_two_layouts_compare(run: Run) -> str:
    """One run dumped at TP2 PP2 with sequence parallelism, another at PP4: the same record."""
    import torch

    from qwen2_ascend.alignment.judge import compare_records
    from qwen2_ascend.alignment.record import load_record

    folder = run.folder / "dump"
    other = judged(run, f"{TP2} {PP2} --sequence-parallel", dump=folder)
    ours = judged(run, "--pipeline-model-parallel-size 4", dump=run.folder / "dump-pp4")
    if ours is None or other is None:
        return ""
    read = load_record(folder)
    assert read.loss == other.record.loss and torch.equal(read.tokens, other.record.tokens)
    for name, tensor in other.record.activations.items():
        assert torch.equal(tensor, read.activations[name]), name
    assert ours.aligned and other.aligned
    between = compare_records(ours.record, other)
    assert between.activations.keys() == read.activations.keys()
    assert between.gradients.keys() == read.gradients.keys()
    worst = max(error.worst for error in between.activations.values())
    assert 0 < worst <= 1e-6
    _compares_at_the_defaults(run.folder / "dump-pp4", folder)
    return f"activations within {worst:.1e}, gradients {max(between.gradients.values()):.1e}"


def _compares_at_the_defaults(ours: Path, theirs: Path) -> None:
    """Both activations and gradients pass as files; a planted fault of either kind does not."""
    from safetensors.torch import load_file, save_file

    from qwen2_ascend.comparison.compare import compare
    from qwen2_ascend.comparison.dumps import open_dumps
    from qwen2_ascend.comparison.rules import Rules

    def failed() -> list[str]:
        return [x.name for x in compare(*open_dumps(ours, theirs), Rules()).failed]

    assert failed() == []
    file = ours / "gradients.safetensors"
    tensors = load_file(file)
    name = "model.layers.2.self_attn.k_proj.weight"
    row = tensors[name].norm(dim=1).argmin()
    tensors[name][row] *= 0.9  # of all the row that is the most rounding
    save_file(tensors, file)
    assert failed() == [name]


if __name__ == "__main__":
    main(CHECKS)
