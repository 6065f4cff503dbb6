"""Every mistake in the flags is named before anything starts, all at once."""

from __future__ import annotations

import pytest

from helpers import tiny_config
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.training.settings import PretrainSettings, parse, validate

GOOD = "--mock-data --seq-length 32 --train-iters 10 --lr 1e-3"
VPP = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"


def settings(flags: str) -> PretrainSettings:
    return parse(f"{GOOD} {flags}".split())


def faults(flags: str, world_size: int = 1, config: Qwen2Config | None = None) -> tuple[str, ...]:
    return faults_of(settings(flags), world_size, config)


def faults_of_data(flags: str) -> tuple[str, ...]:
    return faults_of(parse(f"{GOOD.removeprefix('--mock-data')} {flags}".split()))


def faults_of(
    chosen: PretrainSettings, world_size: int = 1, config: Qwen2Config | None = None
) -> tuple[str, ...]:
    try:
        validate(chosen, config or tiny_config(), world_size)
    except UserError as error:
        return error.faults
    return ()


@pytest.mark.parametrize(
    ("flags", "world_size"),
    [
        ("", 1),
        ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
        ("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", 8),
        (f"{VPP} --global-batch-size 4", 2),
        ("--pipeline-model-parallel-size 2 --num-layer-list 3,1", 2),
        ("--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", 4),
        ("--recompute-granularity full --recompute-method block --recompute-num-layers 1", 1),
        ("--recompute-granularity full --recompute-method block", 1),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 5 --lr-warmup-iters 2", 1),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 5 --lr-wsd-decay-style linear", 1),
        ("--lr-warmup-init 1e-4 --lr-warmup-iters 2", 1),
        ("--lr-warmup-init 1e-4 --lr-warmup-fraction 0.2", 1),
        ("--bf16 --initial-loss-scale 4096", 1),
        ("--bf16 --loss-scale 8", 1),
        ("--ckpt-format torch --no-save-optim --no-save-rng", 1),
        ("--save x --save-interval 5 --exit-interval 5", 1),
        ("--save x --keep-last 1 --async-save --on-save-failure continue --no-save-rng", 1),
        (
            "--swap-attention --recompute-granularity full --recompute-method uniform "
            "--recompute-num-layers 2",
            1,
        ),
        ("--num-layer-list 4", 1),
        ("--device cpu --attention-backend unfused --no-fused-rmsnorm --no-fused-adamw", 1),
        ("--use-flash-attn --use-fused-rmsnorm --use-fused-swiglu --use-fused-rotary-pos-emb", 1),
        ("--device npu --attention-backend flash --use-flash-attn --use-fused-adamw", 1),
    ],
)
def test_good_settings_are_accepted(flags: str, world_size: int) -> None:
    assert faults(flags, world_size) == ()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--micro-batch-size 0", "--micro-batch-size 0 must be at least 1"),
        ("--lr 0", "--lr 0.0 must be above zero"),
        ("--lr nan", "--lr nan must be above zero"),
        ("--weight-decay -1", "--weight-decay -1.0 must not be below zero"),
        ("--adam-beta2 1.0", "--adam-beta2 1.0 must be from 0 to below 1"),
        ("--min-lr 1", "--min-lr 1.0 is above --lr 0.001"),
        ("--tensor-model-parallel-size 3", "tensor_model_parallel_size=3 does not divide"),
        ("--pipeline-model-parallel-size 3", "pipeline_model_parallel_size=3 does not divide"),
        ("--num-layer-list 4,x", "--num-layer-list 4,x is not a list of whole numbers"),
        ("--tensor-model-parallel-size 2", "1 process(es) cannot be shared out"),
        ("--global-batch-size 3 --micro-batch-size 2", "use a multiple of 2"),
        ("--train-samples 80", "give one of --train-iters and --train-samples"),
        ("--lr-warmup-iters 10", "--lr-warmup-iters 10 must be below the 10 steps"),
        ("--lr-warmup-fraction 1.5", "must be from 0 to below 1"),
        ("--lr-warmup-fraction 0.1 --lr-warmup-iters 2", "give one of them"),
        ("--lr-decay-style WSD", "needs --lr-wsd-decay-iters"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 11", "is above the 10 steps"),
        ("--bf16 --fp16", "--bf16 and --fp16"),
        ("--reuse-fp32-param", "--reuse-fp32-param needs --bf16"),
        ("--reuse-fp32-param --fp16", "--reuse-fp32-param needs --bf16"),
        ("--loss-scale 8", "--loss-scale needs --fp16 or --bf16"),
        (
            "--fp16 --loss-scale 8 --hysteresis 1 --initial-loss-scale 64",
            "--loss-scale 8 is fixed, so --initial-loss-scale, --hysteresis would have no effect",
        ),
        ("--o2-gradient", "--o2-gradient needs --bf16"),
        ("--o2-gradient --fp16", "--o2-gradient needs --bf16"),
        ("--o2-optimizer", "--o2-optimizer needs --bf16"),
        ("--o2-optimizer --fp16", "--o2-optimizer needs --bf16"),
        ("--use-distributed-optimizer --optimizer-cpu-offload", "needs --bf16 or --fp16"),
        ("--seq-length 129", "above the model's max_position_embeddings=128"),
        ("--overlap-param-gather", "--overlap-param-gather needs"),
        ("--recompute-granularity full", "needs --recompute-method"),
        ("--recompute-num-layers 2", "need --recompute-granularity full"),
        ("--data-path a", "give one of --data-path"),
        ("--save-interval 5", "--save-interval needs --save"),
        ("--keep-last 2", "--keep-last needs --save"),
        ("--async-save", "--async-save needs --save"),
        ("--on-save-failure continue", "--on-save-failure needs --save"),
        ("--save x --keep-last 0", "--keep-last 0 must be at least 1"),
        ("--save x --keep-last -1", "--keep-last -1 must be at least 1"),
        ("--exit-interval 5", "to try 5 steps say --train-iters 5"),
        ("--lr-wsd-decay-iters 2", "--lr-wsd-decay-iters needs --lr-decay-style WSD"),
        ("--lr-wsd-decay-style linear", "--lr-wsd-decay-style needs --lr-decay-style WSD"),
        ("--lr-warmup-init 1e-4", "--lr-warmup-init 0.0001 needs --lr-warmup-iters or"),
        ("--eod-mask-loss", "has no documents; leave --eod-mask-loss out"),
        ("--eod-token 3", "has no documents; leave --eod-token out"),
        (
            "--reset-attention-mask --eod-token 3",
            "has no documents; leave --reset-attention-mask and --eod-token out",
        ),
        ("--valid-data-path a --eval-iters 1", "--mock-data measures the validation loss on"),
        (
            "--swap-attention --recompute-granularity full --recompute-method uniform",
            "--swap-attention: of layers that are recomputed whole, one at a time,",
        ),
        ("--padded-vocab-size 100", "padded_vocab_size=100 is below vocab_size=256"),
        ("--device cpu --use-flash-attn", "--use-flash-attn asks for a kernel of torch_npu's, and"),
        ("--device cuda --attention-backend fused", "--attention-backend fused asks for a kernel"),
        ("--device cpu --use-fused-rotary-pos-emb", "and the device is cpu; leave it out"),
        ("--use-fused-adamw --no-fused-adamw", "--use-fused-adamw and --no-fused-adamw: give one"),
        (
            "--device cpu --use-flash-attn --attention-backend local",
            "--use-flash-attn and --attention-backend local: give one of them.",
        ),
    ],
)
def test_bad_settings_are_refused_in_words(flags: str, words: str) -> None:
    found = faults(flags)
    assert len(found) == 1 and words in found[0], found


def test_sequence_parallel_needs_a_length_that_divides() -> None:
    found = faults("--seq-length 31 --tensor-model-parallel-size 2 --sequence-parallel", 2)
    assert len(found) == 1 and "multiple of tensor_model_parallel_size=2" in found[0]


def test_interleaving_needs_whole_rounds_of_micro_batches() -> None:
    assert "is a multiple of 2." in faults(f"{VPP} --global-batch-size 3", 2)[0]


@pytest.mark.parametrize(
    ("layout", "world_size", "n", "fit"),
    [
        ("", 1, 3, "1, 2, 4"),
        ("--pipeline-model-parallel-size 2 --num-layer-list 3,1", 2, 3, "1"),
        (VPP, 2, 2, "1"),
    ],
)
def test_uniform_recomputation_needs_a_number_that_divides_each_chunk(
    layout: str, world_size: int, n: int, fit: str
) -> None:
    """megatron-core asks for layers behind the last one otherwise."""
    recompute = "--recompute-granularity full --recompute-method {} --recompute-num-layers {}"
    uniform = recompute.format("uniform", n)
    (found,) = faults(f"{layout} --global-batch-size 4 {uniform}", world_size)
    assert f"--recompute-num-layers {n} does not divide" in found and f"use {fit}." in found
    assert not faults(f"{layout} --global-batch-size 4 {recompute.format('block', n)}", world_size)


def test_all_faults_come_at_once() -> None:
    found = faults("--bf16 --fp16 --lr 0 --tensor-model-parallel-size 3 --save-interval 0")
    assert len(found) == 5, found


def test_the_run_is_as_long_as_its_samples() -> None:
    flags = "--mock-data --seq-length 8 --train-samples 50 --lr 1 --micro-batch-size 4"
    chosen = parse(flags.split())
    assert chosen.global_batch_size(world_size=2) == 8
    assert chosen.length(world_size=2).train_iters == 6


def test_names_are_accepted_as_megatron_spells_them_either_way() -> None:
    assert settings("--micro_batch_size 3").batch.micro_batch_size == 3
    assert settings("--data-path 0.3 A 0.7 B").data.data_path == ("0.3", "A", "0.7", "B")
    assert settings("--exit-signal-handler").runtime.exit_signal_handler
    assert settings("--hf-cfg-dir 7B").model.config == "7B"


def test_what_is_fused_depends_on_the_device_and_the_switches() -> None:
    everything = ("attention", "rms_norm", "rotary", "swiglu", "adamw")
    default = settings("").fusion
    assert (default.fused("npu"), default.fused("cpu"), default.plain) == (everything, (), ())
    assert default.describe("cpu") == "fused: nothing"
    fused_adamw = [default.has_fused_adamw(device) for device in ("cpu", "cuda", "npu")]
    assert fused_adamw == [True, False, True], "torch's own is used on a cpu"
    assert [default.backend(device) for device in ("cpu", "cuda", "npu")] == [
        "torch",
        "torch",
        "npu",
    ]
    megatron = settings("--attention-backend local --no-rope-fusion --no-bias-swiglu-fusion").fusion
    assert megatron.plain == ("attention", "rotary", "swiglu")
    assert megatron.fused("npu") == ("rms_norm", "adamw")
    rest = settings("--no-fused-rmsnorm --no-fused-adamw").fusion
    assert rest.plain == ("rms_norm",) and not rest.has_fused_adamw("cpu")
    assert rest.describe("npu") == (
        "fused: attention, rotary, swiglu; switched off: rms_norm, adamw"
    )


def test_only_rank_zero_speaks_of_a_misspelt_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, speaks in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as exit_:
            settings("--micro-batch-sise 3")
        assert exit_.value.code == 2
        captured = capsys.readouterr()
        assert ("--micro-batch-size" in captured.err + captured.out) is speaks


def test_every_layer_is_recomputed_where_no_number_is_given() -> None:
    """A unit of one layer each: of block's first layers all, and the finest of uniform's."""
    full = f"{GOOD} --recompute-granularity full --recompute-method"
    for method in ("block", "uniform"):
        assert parse(f"{full} {method}".split()).recompute.method_and_layers == ("uniform", 1)
        given = parse(f"{full} {method} --recompute-num-layers 3".split())
        assert given.recompute.method_and_layers == (method, 3)
    assert parse(GOOD.split()).recompute.method_and_layers == (None, None)


@pytest.mark.parametrize("token", [-1, 99999])
def test_an_end_that_no_token_is_is_refused(token: int) -> None:
    (found,) = faults_of_data(f"--data-path a --eod-mask-loss --eod-token {token}")
    assert f"--eod-token {token} must be from 0 to" in found


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--data-path a --eod-token 3", "--eod-token 3 needs --eod-mask-loss,"),
        (
            "--data-path a --valid-data-path b --eval-iters 1",
            "--data-path and --valid-data-path: --split takes",
        ),
        ("--train-data-path a --valid-data-path b", "--valid-data-path needs --eval-iters"),
    ],
)
def test_data_that_would_not_be_looked_at_is_refused(flags: str, words: str) -> None:
    (found,) = faults_of_data(flags)
    assert words in found


@pytest.mark.parametrize(
    "flags",
    [
        "--data-path a --eval-iters 0",
        "--data-path a --eod-mask-loss --eod-token 3",
        "--data-path a --reset-attention-mask --eod-token 3",
        "--data-path a --reset-position-ids --eod-token 3",
        "--train-data-path a --valid-data-path b --eval-iters 0",
        "--train-data-path a --valid-data-path b --eval-iters 2",
    ],
)
def test_data_that_is_looked_at_or_is_not_by_the_users_word_is_taken(flags: str) -> None:
    assert faults_of_data(flags) == ()
