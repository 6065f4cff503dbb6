"""Flags of MindSpeed-LLM's Qwen2 and Qwen2.5 scripts: each holds here, or is refused by name."""

from __future__ import annotations

import pytest

from helpers import tiny_config
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning import settings as finetuning
from qwen2_ascend.finetuning.deepspeed import settings as deepspeed
from qwen2_ascend.pasted_flags import pasted_notes
from qwen2_ascend.training import settings as pretraining
from qwen2_ascend.training.megatron_flags import training_flags

PATHS = "--save out --load in --data-path data"
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
    --context-parallel-size 1 --context-parallel-algo megatron_cp_algo
    --use-cp-send-recv-overlap --use-fused-ring-attention-update
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
    "--reuse-fp32-param": "leave it out",
    "--swap-attention": "--recompute-granularity",
    "--recompute-activation-function": "--recompute-granularity",
    "--recompute-activation-function-num-layers 4": "--recompute-granularity",
    "--use-ascend-mc2": "leave it out",
    "--use-ascend-coc": "leave it out",
    "--coc-fused-kernel": "leave it out",
    "--coc-parallel-num 2": "leave it out",
    "--manual-gc": "leave it out",
    "--manual-gc-interval 50": "leave it out",
    "--o2-optimizer": "leave it out",
    "--o2-gradient": "leave it out",
    "--context-parallel-size 4": "--sequence-parallel",
    "--ai-framework mindspore": "only pytorch",
    "--transformer-impl transformer_engine": "only local",
    "--normalization LayerNorm": "only RMSNorm",
    "--hidden-dropout 0.1": "only 0",
    "--rope-scaling-type yarn": "the config says None",
    "--no-check-for-nan-in-loss-and-grad": "--on-nonfinite skip",
}
"""What else those scripts, or people, say; and the way out."""


def faults(module, flags: str, config: Qwen2Config | None = None, world_size: int = 64) -> list:
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
    assert faults(module, whole) == []
    settings = module.parse(whole.split())
    notes = "\n".join(pasted_notes(settings.pasted, training_flags(type(settings))))
    for word in ("--num-layers 80", "--no-masked-softmax-fusion", "--swiglu", "--log-throughput"):
        assert word in notes
    for own in ("--tensor-model-parallel-size", "--lr ", "--bf16", "--lora-r", "--sparse-mode 3"):
        assert own not in notes


@pytest.mark.parametrize(("flag", "way_out"), REFUSED.items())
@pytest.mark.parametrize("module", [pretraining, finetuning])
def test_what_has_no_counterpart_is_refused(module, flag: str, way_out: str) -> None:
    needed = f"{PATHS} --seq-length 32 --lr 1e-5 --train-iters 3"
    assert faults(module, needed, world_size=1) == []
    (fault,) = faults(module, f"{needed} {flag}", world_size=1)
    assert fault.startswith(flag) and way_out in fault


def test_all_of_them_are_named_at_once() -> None:
    needed = f"{PATHS} --seq-length 32 --lr 1e-5 --train-iters 3"
    found = faults(pretraining, f"{needed} {' '.join(REFUSED)} --micro-batch-size 0", world_size=1)
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
        ("--no-pad-to-seq-lengths", "say --variable-seq-lengths, in fine-tuning"),
        ("--reset-attention-mask", "a token sees all before it in its sample"),
        ("--is-instruction-dataset", "launch/finetune_qwen2.py"),
    ],
)
def test_a_script_for_another_model_or_launcher_is_refused(flags: str, words: str) -> None:
    needed = f"{PATHS} --seq-length 32 --lr 1e-5 --train-iters 3"
    (fault,) = faults(pretraining, f"{needed} {flags}", world_size=1)
    assert words in fault


def test_a_padded_vocabulary_and_its_divisor_may_say_the_same() -> None:
    needed = f"{PATHS} --seq-length 32 --lr 1e-5 --train-iters 3 --padded-vocab-size 152064"
    assert faults(pretraining, f"{needed} --make-vocab-size-divisible-by 128", world_size=1) == []
    (fault,) = faults(pretraining, f"{needed} --make-vocab-size-divisible-by 1000", world_size=1)
    assert "152064 is no multiple of --make-vocab-size-divisible-by 1000" in fault


def test_random_weights_are_those_of_the_config() -> None:
    needed = "--config 72B --data-path data --seq-length 32 --lr 1e-5 --train-iters 3"
    assert faults(pretraining, f"{needed} --init-method-std 0.02", world_size=1) == []
    (fault,) = faults(pretraining, f"{needed} --init-method-std 0.01", world_size=1)
    assert "initializer_range is 0.02" in fault


def test_a_tied_model_is_not_untied() -> None:
    needed = f"{PATHS} --seq-length 32 --lr 1e-5 --train-iters 3"
    flags = f"{needed} --untie-embeddings-and-output-weights"
    tied, untied = (tiny_config(tie_word_embeddings=value) for value in (True, False))
    assert faults(pretraining, flags, untied, 1) == []
    assert "tie_word_embeddings" in faults(pretraining, flags, tied, 1)[0]


def test_indices_that_each_node_writes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = f"{PATHS} --seq-length 32 --lr 1e-5 --train-iters 3 --no-shared-storage"
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    (fault,) = faults(pretraining, needed, world_size=1)
    assert "--data-cache-path" in fault


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
