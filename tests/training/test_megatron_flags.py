"""Flags of MindSpeed-LLM's Qwen2 and Qwen2.5 scripts: each holds here, or is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import make_tiny_hugging_face_folder, tiny_config
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning import settings as finetuning
from qwen2_ascend.finetuning.deepspeed import settings as deepspeed
from qwen2_ascend.finetuning.plan import make_plan
from qwen2_ascend.pasted_flags import pasted_notes
from qwen2_ascend.training import settings as pretraining
from qwen2_ascend.training.megatron_flags import training_flags

PATHS = "--save out --load in --data-path data"
NEEDED = f"{PATHS} --seq-length 32 --lr 1e-5 --train-iters 3"
MODEL_72B = """
    --use-mcore-models --transformer-impl local --num-layers 80 --hidden-size 8192
    --ffn-hidden-size 29568 --num-attention-heads 64 --group-query-attention --num-query-groups 8
    --max-position-embeddings 32768 --position-embedding-type rope --rotary-base 1000000
    --use-rotary-position-embeddings --normalization RMSNorm --norm-epsilon 1e-5 --swiglu
    --add-qkv-bias --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0.0 --hidden-dropout 0 --init-method-std 0.01
    --make-vocab-size-divisible-by 1 --padded-vocab-size 152064
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path tokenizer
"""
TRAINING = """
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 --sequence-parallel
    --num-layer-list 17,20,22,21 --use-distributed-optimizer --overlap-grad-reduce
    --overlap-param-gather --micro-batch-size 1 --global-batch-size 128 --seq-length 4096
    --train-iters 2000 --lr 1.25e-6 --min-lr 1.25e-7 --lr-decay-style cosine
    --lr-warmup-fraction 0.01 --weight-decay 1e-1 --clip-grad 1.0 --adam-beta1 0.9
    --adam-beta2 0.95 --initial-loss-scale 4096 --bf16 --use-flash-attn --use-fused-rmsnorm
    --use-fused-rotary-pos-emb --use-fused-swiglu --attention-softmax-in-fp32
    --no-masked-softmax-fusion --no-gradient-accumulation-fusion --sparse-mode 2
    --recompute-granularity full --recompute-method block --recompute-num-layers 1
    --split 100,0,0 --log-interval 1 --save-interval 2000 --eval-interval 2000 --eval-iters 0
    --ckpt-format torch --no-load-optim --no-load-rng --no-save-optim --no-save-rng --seed 42
    --distributed-backend nccl --log-throughput --exit-on-missing-checkpoint
    --enable-hf2mg-convert --model-type-hf qwen25 --no-shared-storage
    --context-parallel-size 1 --context-parallel-algo megatron_cp_algo --cp-window-size 1
    --use-cp-send-recv-overlap --use-fused-ring-attention-update --attention-mask-type causal
"""
TUNING = """
    --finetune --stage sft --is-instruction-dataset --prompt-type qwen --variable-seq-lengths
    --no-pad-to-seq-lengths --tokenizer-not-use-fast --padded-samples --no-shuffle
    --reset-attention-mask --reset-position-ids --pad-to-multiple-of 8
    --lora-r 8 --lora-alpha 16 --lora-fusion
    --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2
"""
PRETRAINING = "--handler-name GeneralPretrainHandler --reset-position-ids"
REFUSED = {
    "--use-mc2": "--use-ascend-mc2",
    "--coc-parallel-num 2": "--use-ascend-coc",
    "--wandb-project mine": "--tensorboard-dir",
    "--rope-scaling-type linear": "only yarn is supported",
    "--cp-comm-type p2p": "--context-parallel-algo",
    "--ulysses-degree-in-cp 2": "--context-parallel-algo",
    "--cp-window-size 2": "only 1",
    "--attention-mask-type general": "--reset-attention-mask",
    "--ai-framework mindspore": "only pytorch",
    "--transformer-impl transformer_engine": "only local",
    "--normalization LayerNorm": "only RMSNorm",
    "--hidden-dropout 0.1": "only 0",
    "--rope-scaling-type llama3": "only yarn",
    "--rope-scaling-mscale 0.707": "only 1",
    "--spec some.module layer_spec": "leave it out",
    "--noop-layers 4,5": "--num-layer-list",
    "--no-check-for-nan-in-loss-and-grad": "--on-nonfinite skip",
}
"""What else those scripts, or people, say; and the way out."""


def faults(module, flags: str, config: Qwen2Config | None = None, world_size: int = 1) -> list:
    try:
        module.validate(module.parse(flags.split()), config or Qwen2Config.named("72B"), world_size)
    except UserError as error:
        return list(error.faults)
    return []


@pytest.mark.parametrize(
    ("module", "flags"),
    [(pretraining, PRETRAINING), (finetuning, TUNING)],
    ids=["pretrain", "tune"],
)
def test_a_pasted_script_starts(module, flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2.5-72B on eight nodes; their indices lie on storage that is shared."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "64")
    whole = f"{PATHS} {MODEL_72B} {TRAINING} {flags}"
    assert faults(module, whole, world_size=64) == []
    settings = module.parse(whole.split())
    notes = "\n".join(pasted_notes(settings.pasted, training_flags(type(settings))))
    for word in ("--num-layers 80", "--no-masked-softmax-fusion", "--swiglu", "--log-throughput"):
        assert word in notes
    for own in ("--tensor-model-parallel-size", "--lr ", "--bf16", "--lora-r", "--sparse-mode 3"):
        assert own not in notes


@pytest.mark.parametrize(("flag", "way_out"), REFUSED.items())
@pytest.mark.parametrize("module", [pretraining, finetuning])
def test_what_has_no_counterpart_is_refused(module, flag: str, way_out: str) -> None:
    assert faults(module, NEEDED) == []
    (fault,) = faults(module, f"{NEEDED} {flag}")
    assert fault.startswith(flag) and way_out in fault


def test_all_of_them_are_named_at_once() -> None:
    found = faults(pretraining, f"{NEEDED} {' '.join(REFUSED)} --micro-batch-size 0")
    assert len(found) == len(REFUSED) + 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-layers 81", "--num-layers 81: the config says 80"),
        ("--num_layers=81", "--num-layers 81: the config says 80"),
        ("--rotary-base 10000", "--rotary-base 10000: the config says 1000000.0"),
        ("--norm-epsilon 1e-6", "--norm-epsilon 1e-6: the config says 1e-05"),
        ("--num-layers --swiglu", "--num-layers: the config says 80"),
        ("--swiglu=1", "--swiglu 1: takes no value"),
        ("--max-position-embeddings 16", "is below --seq-length 32"),
        ("--no-pad-to-seq-lengths", "launch/finetune_qwen2.py"),
        ("--is-instruction-dataset", "launch/finetune_qwen2.py"),
        (
            "--rope-scaling-type yarn --beta-fast 1 --beta-slow 32",
            "--beta-fast 1 must be above --beta-slow 32",
        ),
        ("--rope-scaling-type yarn", "needs --rope-scaling-factor and --rope-scaling-original-max"),
        ("--rope-scaling-factor 8", "says nothing without --rope-scaling-type yarn"),
        ("--beta-fast 16", "says nothing without --rope-scaling-type yarn"),
        ("--manual-gc-interval 50", "need --manual-gc"),
        ("--num-experts 64 --moe-grouped-gemm --moe-router-topk 8", "dense models only"),
        ("--expert-model-parallel-size 2", "dense models only"),
        ("--moe-something-new 3 --moe_other", "--moe-something-new, --moe-other: these are flags"),
    ],
)
def test_a_script_for_another_model_or_launcher_is_refused(flags: str, words: str) -> None:
    (fault,) = faults(pretraining, f"{NEEDED} {flags}")
    assert words in fault


def test_a_padded_vocabulary_and_its_divisor_may_say_the_same() -> None:
    needed = f"{NEEDED} --padded-vocab-size 152064"
    assert faults(pretraining, f"{needed} --make-vocab-size-divisible-by 128") == []
    (fault,) = faults(pretraining, f"{needed} --make-vocab-size-divisible-by 1000")
    assert "152064 is no multiple of --make-vocab-size-divisible-by 1000" in fault


def test_random_weights_are_those_of_the_config() -> None:
    needed = "--config 72B --data-path data --seq-length 32 --lr 1e-5 --train-iters 3"
    assert faults(pretraining, f"{needed} --init-method-std 0.02") == []
    (fault,) = faults(pretraining, f"{needed} --init-method-std 0.01")
    assert "initializer_range is 0.02" in fault


def test_a_tied_model_is_not_untied() -> None:
    flags = f"{NEEDED} --untie-embeddings-and-output-weights"
    tied, untied = (tiny_config(tie_word_embeddings=value) for value in (True, False))
    assert faults(pretraining, flags, untied) == []
    assert "tie_word_embeddings" in faults(pretraining, flags, tied)[0]


@pytest.mark.parametrize(
    ("config", "flag", "names"),
    [
        ("72B", "--norm-epsilon 1e-6", ("Qwen2.5-72B-Instruct", "Qwen2-72B-Instruct")),
        ("7B", "--rotary-base 10000", ("Qwen2.5-Math-7B", "DeepSeek-R1-Distill-Qwen-7B")),
    ],
)
def test_a_size_is_told_which_model_a_flag_is_of(
    config: str, flag: str, names: tuple[str, ...]
) -> None:
    needed = f"--config {config} --data-path data --seq-length 32 --lr 1e-5 --train-iters 3"
    (fault,) = faults(pretraining, f"{needed} {flag}", Qwen2Config.named(config))
    for name in names:
        assert name in fault
        named = needed.replace(f"--config {config}", f"--config {name}")
        assert faults(pretraining, f"{named} {flag}", Qwen2Config.named(name)) == []


def test_nodes_with_disks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretraining writes an index on each; chats must be prepared, or their place be shared."""
    needed = "--load in --save out --seq-length 32 --lr 1e-5 --train-iters 3 --no-shared-storage"
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert faults(pretraining, f"{needed} --data-path data") == []
    assert faults(finetuning, f"{needed} --data-path data") == []
    for module in (pretraining, finetuning):
        assert module.parse(f"{needed} --data-path data".split()).has_own_disks
        words = needed.replace("--no-shared-storage", "--data-path data")
        assert not module.parse(words.split()).has_own_disks
    (fault,) = faults(finetuning, f"{needed} --data-path a.jsonl")
    assert "rank 0 prepares a.jsonl" in fault and "qwen2-ascend preprocess" in fault
    shared = f"{needed} --data-path a.jsonl --data-cache-path shared"
    assert faults(finetuning, shared) == []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert faults(finetuning, f"{needed} --data-path a.jsonl") == []


YARN = "--rope-scaling-type yarn --rope-scaling-factor 8 "
YARN += "--rope-scaling-original-max-position-embeddings 4096"


def test_yarn_is_given_to_a_model_that_has_none() -> None:
    flags = f"{PATHS} --seq-length 32768 --lr 1e-5 --train-iters 3 {YARN} --beta-fast 16"
    settings, config = pretraining.parse(flags.split()), Qwen2Config.named("Math-7B")
    run = settings.config_of_run(config)
    assert run == config.with_yarn(8, 4096, beta_fast=16)
    pretraining.validate(settings, run, 1)
    without = pretraining.parse(flags.replace(YARN, "").replace("--beta-fast 16", "").split())
    assert without.config_of_run(config) == config


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--rope-scaling-factor 4", "the config says 8.0"),
        ("--rope-scaling-original-max-position-embeddings 32768", "the config says 4096"),
        ("--beta-slow 2", "the config says 1.0"),
    ],
)
def test_yarn_that_contradicts_the_models_own_is_refused(flag: str, words: str) -> None:
    config = Qwen2Config.named("7B").with_yarn(8, 4096)
    assert faults(pretraining, f"{NEEDED} {YARN}", config) == []
    (fault,) = faults(pretraining, f"{NEEDED} --rope-scaling-type yarn {flag}", config)
    assert fault.startswith(f"{flag}: {words}, and it decides")
    settings = pretraining.parse(f"{NEEDED} {YARN} {flag}".split())
    assert settings.config_of_run(config) == config


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--rope-scaling-factor 0.5", "must be a number from 1 on"),
        ("--rope-scaling-factor much", "must be a number from 1 on"),
        ("--rope-scaling-original-max-position-embeddings 0.5", "must be a whole number"),
        ("--beta-fast -1", "must be a number above zero"),
    ],
)
def test_yarn_of_numbers_that_are_none_is_refused(flag: str, words: str) -> None:
    name = flag.split()[0]
    yarn = " ".join(part for part in YARN.replace(" --", "\n--").split("\n") if name not in part)
    words_given = f"{NEEDED} {yarn} {flag}"
    settings = pretraining.parse(words_given.split())
    assert settings.config_of_run(tiny_config()) == tiny_config()
    (fault,) = faults(pretraining, words_given, tiny_config())
    assert words in fault


def test_an_adapter_does_not_carry_yarn(tmp_path: Path) -> None:
    folder = make_tiny_hugging_face_folder(tmp_path / "hf")
    flags = f"--load {folder} --data-path a --seq-length 32 --lr 1e-5 --train-iters 3 {YARN}"
    made = make_plan(finetuning.parse(flags.split()))
    assert made.config.yarn is not None and made.config.yarn.factor == 8
    with pytest.raises(UserError, match="write rope_scaling into the config"):
        make_plan(finetuning.parse(f"{flags} --lora-r 8".split()))
    plain = flags.replace(YARN, "--lora-r 8")
    assert make_plan(finetuning.parse(plain.split())).config == tiny_config()


def test_other_names_of_what_is_a_setting() -> None:
    settings = finetuning.parse(f"{NEEDED} --no-pad-to-seq-lengths".split())
    assert settings.data.variable_seq_lengths
    for flag in ("--reset-attention-mask", "--reset-position-ids"):
        assert pretraining.parse(f"{NEEDED} {flag}".split()).data.keep_documents_apart
        assert finetuning.parse(f"{NEEDED} {flag}".split()).keeps_apart
    assert finetuning.parse(f"{NEEDED} --neat-pack".split()).keeps_apart
    assert not finetuning.parse(NEEDED.split()).keeps_apart
    (fault,) = faults(
        pretraining, f"{NEEDED.replace('--data-path data', '--mock-data')} {flag}", world_size=1
    )
    assert "--mock-data has no documents" in fault


def test_deepspeeds_way_takes_them_too() -> None:
    needed = "--load in --data-path data --seq-length 32 --lr 1e-5 --train-iters 3"
    flags = f"{needed} {MODEL_72B.replace('--make-vocab-size-divisible-by 1', '')}"
    flags = flags.replace("--padded-vocab-size 152064", "") + " --no-masked-softmax-fusion"
    assert faults(deepspeed, flags, world_size=4) == []


def test_they_are_no_settings(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        pretraining.parse(["--help"])
    said = capsys.readouterr().out
    assert "pasted" not in said and "--swiglu" not in said
