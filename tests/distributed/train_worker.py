"""Training at every layout: losses, resuming, numbers that are not finite, precisions.

A check that trains returns its losses as JSON, so that the test can compare layouts with each
other; each is compared with an independent loop of transformers and torch.optim.AdamW here.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from distributed import trainings
from distributed.harness import Checks, Run, main
from distributed.trainings import (
    OVERLAP,
    PP2,
    RECOMPUTE,
    TP2,
    VPP2,
    ZERO1,
    apart,
    gather_state,
    join,
    mean_loss,
    mock_batches,
    save_once,
    settle,
    tiny_folder,
)
from helpers import tiny_config

if TYPE_CHECKING:
    from qwen2_ascend.training.loop import StepResult, TrainingRun

TOLERANCE = 2e-7
MOVED_TOLERANCE = 6e-7
"""Tolerance of fp32 losses and gradient norms after a resume at another layout."""
STEPS, WARMUP = 4, 2
LENGTH, GLOBAL_BATCH, MICRO_BATCH = 24, 8, 2
LR, MIN_LR, CLIP = 3e-3, 1e-4, 0.3

CHECKS = Checks()

LAYOUTS = {
    "tp1-pp1": (1, ""),
    "tp2": (2, TP2),
    "tp2-sp": (2, f"{TP2} --sequence-parallel"),
    "pp2": (2, PP2),
    "pp2-vpp2": (2, VPP2),
    "dp2-distributed-optimizer": (2, OVERLAP),
    "tp2-pp2": (4, f"{TP2} {PP2}"),
    "tp2-pp2-vpp2-distributed-optimizer": (4, f"{TP2} {VPP2} {ZERO1}"),
    "dp2-pp2-vpp2-distributed-optimizer": (4, f"{VPP2} {OVERLAP}"),
}
FLAGS = (
    f"--mock-data --seq-length {LENGTH} --global-batch-size {GLOBAL_BATCH} "
    f"--micro-batch-size {MICRO_BATCH} --train-iters {STEPS} --lr {LR} --min-lr {MIN_LR} "
    f"--lr-decay-style cosine --lr-warmup-iters {WARMUP} --lr-warmup-init 1e-4 "
    f"--weight-decay {trainings.WEIGHT_DECAY} --clip-grad {CLIP} --device cpu"
)


# --- losses --------------------------------------------------------------------------------------


def losses_are_those_of_transformers(layout: str, tied: bool, run: Run) -> str:
    """The losses of four steps, whose gradients and updates they therefore share."""
    training = start(run, f"{FLAGS} {LAYOUTS[layout][1]}", tied)
    results = steps(training, STEPS)
    expected_losses, expected_norms = reference(hugging_face_folder(run, tied), tied)
    losses = [result.loss for result in results]
    off = apart(losses, expected_losses)
    assert off <= TOLERANCE, f"losses {losses}, transformers {expected_losses}"
    norms = [result.grad_norm for result in results]
    worst = apart(norms, expected_norms)
    assert worst <= 2e-6, f"gradient norms {norms}, transformers {expected_norms}"
    assert min(norms) > CLIP, "clipping was not tried"
    return json.dumps({"losses": losses, "from transformers": off, "norms": worst})


for _layout, (_world_size, _) in LAYOUTS.items():
    for _tied in (False, True):
        _name = f"{_layout}-{'tied' if _tied else 'untied'}"
        CHECKS.case(_name, _world_size, losses_are_those_of_transformers, _layout, _tied)


@functools.cache
def reference(folder: Path, tied: bool) -> tuple[list[float], list[float]]:
    """(losses, gradient norms) of transformers and torch.optim.AdamW alone."""
    batches = mock_batches(STEPS, GLOBAL_BATCH, LENGTH, tiny_config().vocab_size)
    return trainings.reference(folder, batches, mean_loss, lr=reference_lr, clip=CLIP)


def reference_lr(step: int) -> float:
    if step <= WARMUP:
        return 1e-4 + (LR - 1e-4) * step / WARMUP
    part = (step - WARMUP) / (STEPS - WARMUP)
    return MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * part)) / 2


# --- resuming ------------------------------------------------------------------------------------


@CHECKS.add(world_size=2)
def padding_is_resumed_too(run: Run) -> str:
    """The vocabulary's padding takes part in training, so its rows and moments come back."""
    for form in ("torch_dist", "torch"):
        folder = run.folder / f"padding-{form}"
        flags = f"{FLAGS} {LAYOUTS['tp2'][1]} --padded-vocab-size 320 --ckpt-format {form}"
        training = started_and_saved(run, f"{flags} --save {folder}", 2)
        before, after = state_of(training), state_of(start(run, flags, load=folder))
        padding = before["0.output_layer.weight.exp_avg"][-64:]
        assert run.runtime.rank == 0 or padding.abs().max() > 0, "padding was not trained"
        assert_equal(before, after)
    return ""


RESUMED = [
    # saved at, resumed at, format, flags of both, tied, how far the losses may differ
    ("tp1-pp1", "tp1-pp1", "torch_dist", "", True, 0.0),
    ("tp1-pp1", "tp1-pp1", "torch", "--bf16", False, 0.0),
    ("tp2-sp", "tp2-sp", "torch_dist", "", False, 0.0),
    ("dp2-distributed-optimizer", "dp2-distributed-optimizer", "torch_dist", "", True, 0.0),
    ("dp2-distributed-optimizer", "dp2-distributed-optimizer", "torch", "--bf16", False, 0.0),
    ("pp2-vpp2", "pp2-vpp2", "torch", "", True, 0.0),
    ("tp2", "pp2", "torch_dist", "", False, MOVED_TOLERANCE),
    ("dp2-distributed-optimizer", "tp2-sp", "torch", "", True, MOVED_TOLERANCE),
    ("pp2-vpp2", "tp2-sp", "torch_dist", "", True, MOVED_TOLERANCE),
    ("tp2", "dp2-distributed-optimizer", "torch_dist", "", False, MOVED_TOLERANCE),
    ("dp2-distributed-optimizer", "pp2", "torch_dist", "", True, MOVED_TOLERANCE),
    ("dp2-distributed-optimizer", "tp2", "torch_dist", "--bf16", False, 2e-3),
    ("tp2-pp2", "tp2-pp2", "torch_dist", "--bf16", True, 0.0),
    ("tp2-pp2", "tp2-pp2", "torch", "", False, 0.0),
    ("tp2-pp2", "dp2-pp2-vpp2-distributed-optimizer", "torch_dist", "", True, MOVED_TOLERANCE),
    ("dp2-pp2-vpp2-distributed-optimizer", "tp2-pp2", "torch_dist", "", False, MOVED_TOLERANCE),
]


def resumed_losses(
    before: str, after: str, form: str, flags: str, tied: bool, tolerance: float, run: Run
) -> str:
    """Two steps after a checkpoint of the second give the losses of a run that went through.

    Two, because one shared count of updates spoils only the second.
    """
    flags = f"{FLAGS} {flags} --ckpt-format {form}"
    through = steps(start(run, f"{flags} {LAYOUTS[before][1]}", tied), STEPS)
    folder = run.folder / f"resume-{before}-{after}-{form}-{flags.count('bf16')}-{tied}"
    flags_before = f"{flags} {LAYOUTS[before][1]} --save {folder}"
    state = state_of(started_and_saved(run, flags_before, 2, tied))
    resumed = start(run, f"{flags} {LAYOUTS[after][1]}", tied, load=folder)
    assert resumed.progress.iteration == 2
    assert resumed.progress.consumed_samples == 2 * GLOBAL_BATCH
    if before == after:
        assert_equal(state, state_of(resumed))
    found = steps(resumed, 2)
    differences = [
        abs(getattr(a, key) - getattr(b, key))
        for a, b in zip(found, through[2:], strict=True)
        for key in ("loss", "grad_norm", "lr")
    ]
    assert max(differences) <= tolerance, f"{found} instead of {through[2:]}"
    return f"largest difference {max(differences):.1e}"


for _case in RESUMED:
    _before, _after, _format, _flags, _tied, _ = _case
    _words = [_before, *(["to", _after] if _after != _before else []), _format, _flags.strip("-")]
    _name = "-".join(filter(None, ["resume", *_words]))
    CHECKS.case(_name, LAYOUTS[_before][0], resumed_losses, *_case)


@CHECKS.add(world_size=2)
def a_run_can_change_its_precision(run: Run) -> str:
    """The fp32 main weights are what goes on, in either direction."""
    import torch

    layouts = [LAYOUTS[name][1] for name in ("tp2", "dp2-distributed-optimizer")]
    folder = run.folder / "from-bf16"
    main = main_weights(started_and_saved(run, f"{FLAGS} --bf16 {layouts[0]} --save {folder}", 2))
    resumed = start(run, f"{FLAGS} {layouts[0]}", load=folder)
    assert all(torch.equal(main[name], value) for name, value in weights(resumed).items())
    losses = [result.loss for result in steps(resumed, 2)]
    again = [r.loss for r in steps(start(run, f"{FLAGS} {layouts[1]}", load=folder), 2)]
    assert apart(losses, again) <= 1e-6

    for form in ("torch_dist", "torch"):
        folder = run.folder / f"from-fp32-{form}"
        flags = f"{FLAGS} {layouts[0]} --ckpt-format {form} --save {folder}"
        saving = started_and_saved(run, flags, 1)
        found = main_weights(start(run, f"{FLAGS} --bf16 {layouts[0]}", load=folder))
        assert all(torch.equal(found[name], value) for name, value in weights(saving).items())
    return ""


@CHECKS.add(world_size=1)
def a_save_that_fails_leaves_the_last_checkpoint(run: Run) -> str:
    from qwen2_ascend.checkpoint import iteration
    from qwen2_ascend.training.checkpointer import SaveError

    def full(*_):
        raise OSError(28, "No space left on device")

    folder = run.folder / "failing"
    training = started_and_saved(run, f"{FLAGS} --ckpt-format torch --save {folder}", 1)
    steps(training, 1)
    for broken in ("begin_iteration", "publish_iteration"):
        whole = getattr(iteration, broken)
        setattr(iteration, broken, full)
        try:
            with pytest.raises(SaveError, match=r"iteration 2.*No space left"):
                save(training)
        finally:
            setattr(iteration, broken, whole)
        assert start(run, FLAGS, load=folder).progress.iteration == 1
    save(training)
    assert start(run, FLAGS, load=folder).progress.iteration == 2
    assert not list(folder.glob(".*")), "what was left unfinished is gone"
    return ""


@CHECKS.add(world_size=1)
def merging_a_training_checkpoint_gives_its_weights(run: Run) -> str:
    """Both formats go back to Hugging Face with nothing but the checkpoint folder."""
    import torch
    from transformers import AutoModelForCausalLM

    from qwen2_ascend.checkpoint.convert import Conversion, convert, prepare
    from qwen2_ascend.checkpoint.load import unwrap

    tokens = torch.arange(24).view(1, -1)
    for form, dtype in (("torch_dist", "bf16"), ("torch", "fp32")):
        folder = run.folder / f"merge-{form}"
        flags = f"{FLAGS} --ckpt-format {form} --save {folder}" + (
            " --bf16" if dtype == "bf16" else ""
        )
        training = started_and_saved(run, flags, 1, tied=True)
        merged = run.folder / f"merged-{form}"
        request = Conversion(load_dir=folder, save_dir=merged, save_model_type="hf", verify=True)
        convert(prepare(request))
        model = AutoModelForCausalLM.from_pretrained(merged)
        assert model.dtype == getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[dtype])
        embedding = dict(unwrap(training.chunks[0]).named_parameters())[
            "embedding.word_embeddings.weight"
        ]
        assert torch.equal(model.model.embed_tokens.weight, embedding)
        ours = unwrap(training.chunks[0])(tokens, None, None)
        limit = 1e-5 if dtype == "fp32" else 0.1
        assert (ours - model(tokens).logits).abs().max() < limit
    return ""


@CHECKS.add(world_size=2)
def weights_alone_can_be_taken(run: Run) -> str:
    folder = run.folder / "weights-alone"
    flags = f"{FLAGS} {LAYOUTS['tp2'][1]} --ckpt-format torch --save {folder}"
    started_and_saved(run, flags, 1)
    weights_only = start(run, f"{FLAGS} {LAYOUTS['pp2'][1]} --no-load-optim", load=folder)
    assert weights_only.progress.iteration == 1
    losses = []
    for layout in ("pp2", "tp2"):
        fresh = start(run, f"{FLAGS} {LAYOUTS[layout][1]} --finetune", load=folder)
        assert fresh.progress.iteration == 0
        losses += [result.loss for result in steps(fresh, 1)]
    assert abs(losses[0] - losses[1]) <= TOLERANCE
    return ""


# --- numbers that are not finite -----------------------------------------------------------------

BAD_SAMPLE = 11
"""A sample of the second step, in its second micro-batch of two."""


def spoil(training: TrainingRun) -> None:
    """Makes the forward pass of one sample give numbers that are not finite."""
    marker = training.train_data[BAD_SAMPLE]["tokens"]

    def hook(module, inputs, output):
        is_bad = (inputs[0] == marker).all(dim=1)  # [b]
        return output.masked_fill(is_bad[None, :, None], float("nan"))  # [s, b, h]

    for chunk in training.chunks:
        if chunk.module.pre_process:
            chunk.module.embedding.word_embeddings.register_forward_hook(
                lambda module, inputs, output: hook(
                    module, inputs, output.transpose(0, 1)
                ).transpose(0, 1)
            )


@CHECKS.add(world_size=2)
def a_loss_that_is_not_finite_stops_before_the_weights_are_touched(run: Run) -> str:
    from qwen2_ascend.training.loop import NonFiniteError

    for layout in ("pp2", "dp2-distributed-optimizer"):
        training = start(run, f"{FLAGS} {LAYOUTS[layout][1]}")
        spoil(training)
        steps(training, 1)
        settle(training)
        before = state_of(training)
        words = "iteration 2: loss nan.*samples 10-11 of the training data"
        with pytest.raises(NonFiniteError, match=words) as caught:
            steps(training, 1)
        settle(training)
        assert_equal(before, state_of(training))
    return str(caught.value)


@CHECKS.add(world_size=2)
def skipping_leaves_the_update_out(run: Run) -> str:
    for layout in ("tp2", "dp2-distributed-optimizer"):
        training = start(run, f"{FLAGS} {LAYOUTS[layout][1]} --on-nonfinite skip")
        spoil(training)
        (first,) = steps(training, 1)
        settle(training)
        before = state_of(training)
        (bad,) = steps(training, 1)
        settle(training)
        assert first.updated and not bad.updated and math.isnan(bad.loss)
        assert_equal(before, state_of(training))
        (last,) = steps(training, 1)
        assert last.updated and math.isfinite(last.loss) and math.isfinite(last.grad_norm)
        assert last.lr == bad.lr, "the schedule does not count a skipped step"
        assert training.progress.skipped_iterations == 1
        assert training.progress.consumed_samples == 3 * GLOBAL_BATCH
    return ""


@CHECKS.add(world_size=1)
def a_gradient_that_is_not_finite_stops_too(run: Run) -> str:
    from qwen2_ascend.training.loop import NonFiniteError

    training = start(run, FLAGS)
    weight = training.chunks[0].module.decoder.layers[1].mlp.linear_fc2.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    before = state_of(training)
    with pytest.raises(NonFiniteError, match=r"every micro-batch's loss finite \(samples 0 to 7\)"):
        steps(training, 1)
    assert_equal(before, state_of(training))
    return ""


# --- precision, memory and the batch -------------------------------------------------------------


@CHECKS.add(world_size=1)
def recomputing_changes_nothing(run: Run) -> str:
    plain = [result.loss for result in steps(start(run, FLAGS), 3)]
    for flags in (
        "--recompute-granularity selective",
        RECOMPUTE,
        "--recompute-granularity full --recompute-method block --recompute-num-layers 2",
        "--recompute-activation-function --recompute-norm",
        "--swap-attention",
        "--swap-attention --recompute-granularity selective --recompute-norm",
        "--swap-attention --recompute-granularity full --recompute-method block "
        "--recompute-num-layers 2",
        "--recompute-granularity selective --recompute-norm --recompute-norm-num-layers 2",
        "--recompute-granularity full --recompute-method block --recompute-num-layers 1 "
        "--recompute-activation-function --recompute-activation-function-num-layers 2",
    ):
        losses = [result.loss for result in steps(start(run, f"{FLAGS} {flags}"), 3)]
        assert losses == plain, f"{flags}: {losses} instead of {plain}"
    return ""


@CHECKS.add(world_size=2)
def outputs_computed_again_change_nothing_on_ranks(run: Run) -> str:
    """Where a product keeps its part of the sequence, and where chunks have layers of their own."""
    for layout in ("tp2-sp", "pp2-vpp2"):
        flags = f"{FLAGS} {LAYOUTS[layout][1]}"
        plain = [result.loss for result in steps(start(run, flags), 3)]
        again = f"{flags} --recompute-activation-function --recompute-norm --swap-attention"
        assert [result.loss for result in steps(start(run, again), 3)] == plain, layout
    return ""


@CHECKS.add(world_size=2)
def reused_fp32_weights_change_no_bit(run: Run) -> str:
    """Losses, weights, moments and fp32 weights, also through a checkpoint; and what is held."""
    from qwen2_ascend.training import optimizer as optimizers

    found = {}
    for layout in ("dp2-distributed-optimizer", "tp2"):
        flags = f"{FLAGS} --bf16 {LAYOUTS[layout][1]}"
        training = start(run, flags)
        plain = [result.loss for result in steps(training, STEPS)]
        settle(training)
        expected, before = state_of(training), held_bytes(training)
        flags += " --reuse-fp32-param"
        training = start(run, f"{flags} --save {run.folder}/halves-{layout}")
        losses = [result.loss for result in steps(training, 2)]
        folder = save(training).parent
        losses += [result.loss for result in steps(training, STEPS - 2)]
        assert losses == plain, (layout, losses, plain)
        own, whole = updated_weights(training), len_of(weights(training).values())
        after = held_bytes(training)
        found[layout] = (before, after)
        assert before >= 6 * whole + 12 * own, (layout, before)
        assert 6 * whole + 10 * own <= after <= 1.01 * (6 * whole + 10 * own), (layout, after)
        resumed = start(run, flags, load=folder)
        optimizers.settle(resumed.optimizer)
        assert [result.loss for result in steps(resumed, STEPS - 2)] == plain[2:], layout
        for one in (training, resumed):
            settle(one)
            assert_equal(expected, state_of(one))
    return str(found)


BF16_STATE = 8e-4
"""How far losses of four steps may be from those with fp32 gradients and moments; it was 2.5e-4."""


@CHECKS.add(world_size=2)
def o2_holds_4n_and_8n_over_dp_bytes(run: Run) -> str:
    """bf16 gradients and moments, alone, together and with reused fp32 weights."""
    found = {}
    for layout in ("dp2-distributed-optimizer", "tp2"):
        flags = f"{FLAGS} --bf16 {LAYOUTS[layout][1]}"
        plain = [result.loss for result in steps(start(run, flags), STEPS)]
        for more, per_weight, per_own in (
            ("--o2-gradient", 4, 12),
            ("--o2-optimizer", 6, 8),
            ("--o2-gradient --o2-optimizer", 4, 8),
            ("--o2-gradient --o2-optimizer --reuse-fp32-param", 4, 6),
        ):
            training = start(run, f"{flags} {more}")
            losses = [result.loss for result in steps(training, STEPS)]
            off = apart(losses, plain)
            own, whole = updated_weights(training), len_of(weights(training).values())
            expected, held = per_weight * whole + per_own * own, held_bytes(training)
            found[f"{layout} {more}"] = f"{off:.1e} {held / expected - 1:.2%}"
            assert losses != plain and off < BF16_STATE, (layout, more, losses, plain)
            assert expected <= held <= 1.01 * expected, (layout, more, held, expected)
    return str(found)


@CHECKS.add(world_size=2)
def bf16_moments_are_resumed_to_the_last_bit(run: Run) -> str:
    """The layout is the same; another one gives its losses, and fp32 runs go on from them."""
    from qwen2_ascend.training import optimizer as optimizers

    flags = f"{FLAGS} --bf16 --o2-gradient --o2-optimizer"
    layouts, off = [LAYOUTS[name][1] for name in ("dp2-distributed-optimizer", "tp2")], [0.0]
    for form in ("torch_dist", "torch"):
        for number, layout in enumerate(layouts):
            folder = run.folder / f"o2-{form}-{number}"
            saving = f"{flags} {layout} --ckpt-format {form} --save {folder}"
            through = started_and_saved(run, saving, 2)
            state = state_of(through)
            expected = [(result.loss, result.grad_norm) for result in steps(through, 2)]
            resumed = start(run, f"{flags} {layout}", load=folder)
            optimizers.settle(resumed.optimizer)
            assert_equal(state, state_of(resumed))
            found = [(result.loss, result.grad_norm) for result in steps(resumed, 2)]
            assert found == expected, (form, layout, found, expected)
            other = start(run, f"{flags} {layouts[1 - number]}", load=folder)
            optimizers.settle(other.optimizer)
            for one, (loss, _) in zip(steps(other, 2), expected, strict=True):
                off.append(abs(one.loss - loss))
            whole = start(run, f"{FLAGS} --bf16 {layout}", load=folder)
            off.append(abs(steps(whole, 1)[0].loss - expected[0][0]))
    assert max(off) < 2e-3, off
    return f"elsewhere {max(off):.1e}"


def updated_weights(training: TrainingRun) -> int:
    """Elements of which this rank has the fp32 weights."""
    from qwen2_ascend.training.optimizer import state_slices

    return sum(own.stop - own.start for own in state_slices(training.optimizer).values())


def len_of(tensors: Iterable[Any]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def held_bytes(training: TrainingRun) -> int:
    """Bytes of weights, gradients and all that the optimizer keeps between two steps."""
    from qwen2_ascend.training.halves import split_mains

    tensors = list(weights(training).values())
    tensors += [parameter.main_grad for parameter in tensors]
    inner = getattr(training.optimizer, "chained_optimizers", [training.optimizer])[0].optimizer
    tensors += [p for group in inner.param_groups for p in group["params"]]
    moments = ("exp_avg", "exp_avg_sq")
    tensors += [state[kind] for state in inner.state.values() for kind in moments]
    # weights and gradients are parts of buffers; the fp32 weights may have no memory at all
    size = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
    mains = split_mains(training.optimizer)
    return size + (mains.num_bytes if mains else 0)


@CHECKS.add(world_size=1)
def half_precision_stays_near_fp32(run: Run) -> str:
    plain = steps(start(run, FLAGS), STEPS)
    found = {}
    for flags, tolerance in (
        ("--bf16", 5e-3),
        ("--bf16 --loss-scale 8", 5e-3),
        ("--fp16 --initial-loss-scale 1024", 1e-3),
    ):
        results = steps(start(run, f"{FLAGS} {flags}"), STEPS)
        assert all(result.updated for result in results)
        loss = max(abs(a.loss - b.loss) for a, b in zip(results, plain, strict=True))
        norm = max(abs(a.grad_norm / b.grad_norm - 1) for a, b in zip(results, plain, strict=True))
        found[flags] = (loss, norm)
        assert loss < tolerance and norm < 10 * tolerance, found
    return str(found)


@CHECKS.add(world_size=2)
def fp16_finds_its_loss_scale(run: Run) -> str:
    """Steps that overflow are left out, whatever --on-nonfinite says, and halve the scale."""
    from qwen2_ascend.training.optimizer import loss_scale

    flags = f"{FLAGS} --fp16 --hysteresis 1 --initial-loss-scale 65536 {LAYOUTS['tp2'][1]}"
    training = start(run, f"{flags} --train-iters 8")
    results = steps(training, 8)
    updated = [result.updated for result in results]
    assert not updated[0] and results[0].overflow and updated[-1], updated
    assert updated == sorted(updated), "once it fits it stays"
    assert loss_scale(training.optimizer) == 2.0 ** (16 - updated.count(False))
    assert training.progress.skipped_iterations == updated.count(False)
    return f"scale {loss_scale(training.optimizer):g}"


@CHECKS.add(world_size=2)
def every_token_counts_the_same(run: Run) -> str:
    """However unevenly the loss masks fall on micro-batches and data-parallel ranks."""
    import torch
    from transformers import AutoModelForCausalLM

    training = start(run, f"{FLAGS} {LAYOUTS['dp2-distributed-optimizer'][1]}")
    training.train_data = Masked(training.train_data, lambda index: index + 1)
    (result,) = steps(training, 1)
    model = AutoModelForCausalLM.from_pretrained(hugging_face_folder(run, False)).float()
    samples = [training.train_data[index] for index in range(GLOBAL_BATCH)]
    tokens, labels, mask = (
        torch.stack([sample[key] for sample in samples])
        for key in ("tokens", "labels", "loss_mask")
    )
    logits = model(tokens, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none"
    )
    loss = (losses * mask.flatten()).sum() / mask.sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
    assert result.num_tokens == mask.sum()
    assert abs(result.loss - loss.item()) <= 1e-6, f"{result.loss} instead of {loss.item()}"
    assert abs(result.grad_norm - norm) <= 2e-6, f"{result.grad_norm} instead of {norm}"
    return ""


class Masked:
    """A dataset whose sample i keeps the loss of its first `kept(i)` tokens."""

    def __init__(self, data: Any, kept: Callable[[int], int]) -> None:
        self.data, self.kept = data, kept

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        sample = self.data[index]
        sample["loss_mask"][self.kept(index) :] = 0
        return sample


@CHECKS.add(world_size=2)
def the_validation_loss_is_that_of_transformers(run: Run) -> str:
    import torch
    from transformers import AutoModelForCausalLM

    training = start(run, f"{FLAGS} --eval-iters 2 {LAYOUTS['pp2-vpp2'][1]}")
    before = state_of(training)
    found, again = training.evaluate(), training.evaluate()
    assert found == again
    assert_equal(before, state_of(training))
    model = AutoModelForCausalLM.from_pretrained(hugging_face_folder(run, False)).float()
    samples = [training.valid_data[index] for index in range(2 * GLOBAL_BATCH)]
    with torch.no_grad():
        expected = mean_loss(model, samples).item()
    assert abs(found - expected) <= 1e-6, f"{found} instead of {expected}"
    return ""


# --- building ------------------------------------------------------------------------------------


@CHECKS.add(world_size=1)
def the_last_checkpoint_is_said_to_be_the_last(run: Run) -> str:
    """Its step may be one of --save-interval's, too: it must succeed, exports are made of it."""
    from qwen2_ascend.training.loop import train

    training = start(run, f"{FLAGS} --save {run.folder}/last --save-interval 1")
    saved = []

    class Saver:
        def poll(self) -> None: ...
        def wait_until_copied(self) -> None: ...
        def finish(self) -> None: ...
        def save(self, *, is_last: bool = False) -> None:
            saved.append((training.progress.iteration, is_last))

    train(
        training,
        on_step=lambda *_: None,
        on_validation=lambda _: None,
        checkpointer=Saver(),
    )
    assert saved == [(number, number == STEPS) for number in range(1, STEPS + 1)], saved
    return str(saved)


# --- documents -----------------------------------------------------------------------------------

APART = {
    "mask": (1, "--reset-attention-mask --micro-batch-size 1"),
    "positions": (1, "--reset-position-ids --micro-batch-size 4"),
    "both": (1, "--reset-attention-mask --reset-position-ids --micro-batch-size 2"),
    "mask-without-eod": (1, "--reset-attention-mask --micro-batch-size 2"),
    "tp2-sp": (2, f"--reset-attention-mask --micro-batch-size 2 {TP2} --sequence-parallel"),
    "pp2": (2, f"--reset-position-ids --micro-batch-size 2 {PP2}"),
    "tp2-pp2": (4, f"--reset-attention-mask --reset-position-ids {TP2} {PP2}"),
}


def documents_are_trained_as_alone(name: str, flags: str, run: Run, *, device: str = "cpu") -> str:
    """The loss of each token, and the gradient, are those of transformers with one document."""
    import torch

    from qwen2_ascend.training.loop import token_loss

    has_eod = "without-eod" not in name
    prefix, folder = write_documents(run, name, has_eod), hugging_face_folder(run, tied=False)
    flags += f" --data-path {prefix} --split 100,0,0 --seq-length 48 --global-batch-size 4"
    flags += f" --train-iters 1 --lr 1e-3 --clip-grad 0 --device {device}"
    training = start(run, flags + (" --eod-token 0" if has_eod else ""))
    kept: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def objective(losses: torch.Tensor, batch: dict[str, Any]):
        kept.append((losses.detach().clone(), batch))
        return token_loss(losses, batch)

    training.objective = objective
    result = training.step(training.batches())
    if not training.chunks[-1].module.post_process:
        return "no last stage"
    rows = [
        (tokens, labels, row)
        for losses, batch in kept
        for tokens, labels, row in zip(
            batch["tokens"].cpu(), batch["labels"].cpu(), losses.cpu(), strict=True
        )
    ]
    expected, norm = trained_alone(folder, rows, has_eod)
    apart = max((own - alone)[~alone.isnan()].abs().max().item() for own, alone in expected)
    assert apart < 1e-5, apart
    mean = torch.cat([alone[~alone.isnan()] for _, alone in expected]).mean().item()
    assert abs(result.loss - mean) < 1e-5, (result.loss, mean)
    assert abs(result.grad_norm / norm - 1) < 1e-4, (result.grad_norm, norm)
    return f"{apart:.1e}"


def write_documents(run: Run, name: str, has_eod: bool) -> Path:
    """12 documents of 9 to 31 tokens; no two have a token in common, so each says where it is from.

    With `has_eod` 0 ends each of them.
    """
    import numpy as np
    import torch

    from qwen2_ascend.data.indexed import IndexedDatasetBuilder

    prefix = run.folder / f"documents-{name}"
    if run.runtime.rank == 0:
        draw = np.random.default_rng(5)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for i in range(12):
            ids = draw.integers(2 + 20 * i, 22 + 20 * i, draw.integers(9, 32)).tolist()
            ids[-1] = 0 if has_eod else ids[-1]
            builder.add_document(ids, [len(ids)])
        builder.finalize(f"{prefix}.idx")
    torch.distributed.barrier()
    return prefix


def trained_alone(
    folder: Path, rows: list[tuple[Any, Any, Any]], has_eod: bool
) -> tuple[list[tuple[Any, Any]], float]:
    """Our losses and transformers' of each document's part of a row, and its gradient's norm.

    The loss of a token whose label is another document's is NaN, unless the token is 0.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).float()
    pairs, trained = [], []
    for tokens, labels, row in rows:
        numbers = torch.where(tokens == 0, -1, (tokens - 2) // 20)
        numbers = [int(n) for n in numbers]
        numbers = [n if n >= 0 else numbers[i - 1] if i else -1 for i, n in enumerate(numbers)]
        starts = [i for i, n in enumerate(numbers) if i == 0 or n != numbers[i - 1]]
        assert len(starts) > 1, "a row has several documents"
        for start, end in zip(starts, [*starts[1:], len(numbers)], strict=True):
            logits = model(tokens[None, start:end]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, labels[start:end], reduction="none")
            is_strange = not has_eod and (int(labels[end - 1]) - 2) // 20 != numbers[end - 1]
            trained.append(losses[: len(losses) - is_strange])
            alone = losses.detach().clone()
            if is_strange:
                alone[-1] = torch.nan
            pairs.append((row[start:end], alone))
    torch.cat(trained).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), torch.inf).item()
    return pairs, norm


for _name, (_world_size, _flags) in APART.items():
    CHECKS.case(f"documents-{_name}", _world_size, documents_are_trained_as_alone, _name, _flags)


def hugging_face_folder(run: Run, tied: bool) -> Path:
    return tiny_folder(run, "tied" if tied else "untied", tie_word_embeddings=tied)


def start(run: Run, flags: str, tied: bool = False, load: Path | None = None) -> TrainingRun:
    """A run as `launch/pretrain_qwen2.py` builds it, resumed if `load` is a training checkpoint."""
    from qwen2_ascend.training.plan import make_plan
    from qwen2_ascend.training.pretrain import prepare
    from qwen2_ascend.training.settings import parse, validate

    load = load or hugging_face_folder(run, tied)
    plan = make_plan(parse([*flags.split(), "--load", str(load)]))
    join(run, plan, validate)
    return prepare(plan, run.runtime)


def save(training: TrainingRun) -> Path:
    """Writes a checkpoint as `launch/pretrain_qwen2.py` does."""
    from qwen2_ascend.training.checkpointing import megatron_checkpointer
    from qwen2_ascend.training.plan import make_plan
    from qwen2_ascend.training.setup import checkpoint_identity

    identity = checkpoint_identity(make_plan(training.settings))
    return save_once(training, functools.partial(megatron_checkpointer, training, identity))


def started_and_saved(run: Run, flags: str, count: int, tied: bool = False) -> TrainingRun:
    """A run after `count` steps and a checkpoint of the last."""
    training = start(run, flags, tied)
    steps(training, count)
    save(training)
    return training


def train_and_save(
    training: TrainingRun,
    on_step: Callable[..., None],
    log: Callable[[str], None] = lambda line: None,
    copies: Any = None,
) -> None:
    """Trains to the end as the launcher does; `copies` copy what --async-save writes."""
    from qwen2_ascend.training.checkpointing import megatron_checkpointer
    from qwen2_ascend.training.loop import train
    from qwen2_ascend.training.plan import make_plan
    from qwen2_ascend.training.setup import checkpoint_identity

    identity = checkpoint_identity(make_plan(training.settings))
    with contextlib.closing(megatron_checkpointer(training, identity, log)) as checkpointer:
        checkpointer._copies = copies or checkpointer._copies
        checkpointer.claim()
        train(training, on_step=on_step, on_validation=lambda _: None, checkpointer=checkpointer)
    training.runtime.barrier()


def track(run: Run, folder: Path, iteration: int) -> None:
    """Makes an iteration the one that is resumed."""
    run.runtime.barrier()
    if run.runtime.rank == 0:
        (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    run.runtime.barrier()


def steps(training: TrainingRun, count: int) -> list[StepResult]:
    batches = training.batches()
    return [training.step(batches) for _ in range(count)]


def weights(training: TrainingRun) -> dict[str, Any]:
    from qwen2_ascend.checkpoint.load import unwrap

    return dict(unwrap(training.chunks[0]).named_parameters())


def main_weights(training: TrainingRun) -> dict[str, Any]:
    """The fp32 weights that the optimizer keeps beside 16-bit ones."""
    from qwen2_ascend.checkpoint.formats.megatron_optimizer import MAIN
    from qwen2_ascend.checkpoint.load import unwrap

    chunks = [unwrap(chunk) for chunk in training.chunks]
    return {name: values[MAIN] for _, name, values in gather_state(training.optimizer, chunks)}


def state_of(training: TrainingRun) -> dict[str, Any]:
    """Every weight and every tensor of the optimizer, copied."""
    from qwen2_ascend.checkpoint.load import unwrap

    chunks = [unwrap(chunk) for chunk in training.chunks]
    state = {
        f"{index}.{name}": parameter.detach().clone()
        for index, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }
    for index, name, values in gather_state(training.optimizer, chunks):
        state |= {f"{index}.{name}.{kind}": value.clone() for kind, value in values.items()}
    return state


def assert_equal(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Both are of `state_of`."""
    changed = [name for name in before if not (before[name] == after[name]).all()]
    assert before.keys() == after.keys() and not changed, changed


if __name__ == "__main__":
    main(CHECKS)
