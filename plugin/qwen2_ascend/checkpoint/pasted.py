"""What the pasted flags of `convert` mean; pasted_flags.py is the mechanism.

Two converters are behind them: MindSpeed-LLM's convert_ckpt.py ("v1", up to 2.3.0) and its
convert_ckpt_v2.py. The first has --model-type and writes a merged model into mg2hf/ inside
--save-dir, which is the original model's folder; the second writes into --save-dir itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen2_ascend.checkpoint.formats.megatron import MANIFEST_FILE
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.pasted_flags import MODEL_FLAGS, Meaning, Pasted, Table, same, split_flags

MERGED_FOLDER = "mg2hf"
"""What v1's users look for inside --save-dir."""

DENSE = "Qwen2 has no experts; leave it out"
ONE_WAY = "there is one way to read and to write; leave it out"
NO_BIAS = "Qwen2 has no such weights; leave it out"
FORMATS = "say --save-format megatron, safetensors or torch_dist"


def _is_the_vocabulary(value: str | None, settings: Any, config: Qwen2Config) -> str | None:
    if same(value, str(config.vocab_size)):
        return None
    return f"config.json says {config.vocab_size}, and it decides; leave it out"


CONVERT_FLAGS: Table = {
    **{
        flag: MODEL_FLAGS[flag]
        for flag in (
            "--use-mcore-models",
            "--add-qkv-bias",
            "--num-layers",
            "--transformer-impl",
            "--tokenizer-type",
            "--untie-embeddings-and-output-weights",
        )
    },
    "--model-type": Meaning("there is no other", ("GPT",)),
    "--model-type-hf": Meaning("config.json says it", ("llama2", "qwen2", "qwen25")),
    "--tokenizer-model": Meaning("the tokenizer beside config.json goes with the weights", None),
    "--tokenizer-name-or-path": Meaning(
        "the tokenizer beside config.json goes with the weights", None
    ),
    "--params-dtype": Meaning(
        "the weights are cast to it", ("bf16", "fp16", "fp32"), becomes=("--dtype", "{}")
    ),
    "--true-vocab-size": Meaning("config.json says it", None, check=_is_the_vocabulary),
    "--ckpt-format": Meaning(FORMATS, ("torch",)),
    "--target-expert-parallel-size": Meaning(DENSE, ("1",)),
    "--expert-tensor-parallel-size": Meaning(DENSE, ("1",)),
    "--expert-model-parallel-size": Meaning(DENSE, ("1",)),
    "--mtp-num-layers": Meaning("Qwen2 predicts one token", ("0",)),
    "--first-k-dense-replace": Meaning(DENSE, None, True),
    "--loader": Meaning("--load-dir is looked at", None),
    "--saver": Meaning("--save-model-type says it", None),
    "--megatron-path": Meaning("megatron-core is installed", None),
    "--max-queue-size": Meaning("there is no queue", None),
    "--no-checking": Meaning("names are always checked"),
    "--save-layer-by-layer": Meaning("memory does not grow with the model"),
    "--load-hf-from-config": Meaning("the weights of the original model are not read"),
    # refused
    "--spec": Meaning("the layers are Qwen2's; leave it out", None, True),
    "--orm": Meaning("there are no reward models here", refused=True),
    "--qlora-nf4": Meaning("weights in 4 bits are not written; leave it out", refused=True),
    "--save-lora-to-hf": Meaning(
        "the adapter is merged into the model; leave this out", refused=True
    ),
    "--load-checkpoint-loosely": Meaning("every tensor has to be there", refused=True),
    "--load-from-legacy": Meaning(ONE_WAY, refused=True),
    "--save-to-legacy": Meaning(ONE_WAY, refused=True),
    "--w-pack": Meaning(NO_BIAS, None, True),
    "--add-dense-bias": Meaning(NO_BIAS, refused=True),
    "--post-norm": Meaning(NO_BIAS, refused=True),
    "--embed-layernorm": Meaning(NO_BIAS, refused=True),
    "--add-output-layer-bias": Meaning(NO_BIAS, refused=True),
    "--noop-layers": Meaning("every layer is one of the model's; leave it out", None, True),
    "--schedules-method": Meaning("there is no dualpipev; leave it out", None, True),
    "--vocab-file": Meaning("config.json says the vocabulary's size; leave it out", None, True),
    "--ckpt-cfg-path": Meaning("the mapping of Qwen2 is built in; leave it out", None, True),
}
MOE_FLAGS = ("--moe-grouped-gemm", "--moe-tp-extend-ep", "--num-experts", "--mla-mm-split")
MOE_MODELS = ("moe", "mixtral", "deepseek")


def split_convert_flags(arguments: Sequence[str]) -> tuple[list[str], Pasted]:
    """A command line in our own words, and the flags that are no words of ours.

    Raises:
        UserError: the line is of a model with experts.
    """
    for before, word in zip(["", *arguments], arguments, strict=False):
        flag = word.partition("=")[0].replace("_", "-")
        is_model = before.replace("_", "-") == "--model-type-hf" or flag == "--model-type-hf"
        if flag in MOE_FLAGS or (is_model and any(name in word for name in MOE_MODELS)):
            raise UserError(
                f"{before if is_model else ''} {word}: is for models with experts; this project is "
                "for the dense models Qwen2 and Qwen2.5.".strip()
            )
    return split_flags(arguments, CONVERT_FLAGS)


def contradictions(arguments: Sequence[str], pasted: Pasted) -> list[str]:
    """What a command line says twice, and not the same each time."""
    words = [word.partition("=")[0].replace("_", "-") for word in arguments]
    faults = []
    if {"--adapter", "--lora-load"} <= set(words):
        faults.append("--adapter and --lora-load are two names of one flag; give it once.")
    if "--dtype" in words and (dtype := dict(pasted).get("--params-dtype")):
        faults.append(f"--params-dtype {dtype}: --dtype says it too; leave one of them out.")
    return faults


def merged_places(save: Path, config: Path | None, pasted: Pasted) -> tuple[Path, Path | None]:
    """Where MindSpeed-LLM's users mean --save-dir and --hf-cfg-dir of a merge to be.

    Merging, v1 takes config.json from --save-dir and writes into mg2hf/ in it. v2 would write over
    the original model where --save-dir is that; it is left alone here, and mg2hf/ is made too.
    """
    is_v1 = any(flag == "--model-type" for flag, _ in pasted)
    is_v2 = any(flag == "--model-type-hf" for flag, _ in pasted)
    is_original = (config is not None and _is_same(save, config)) or (is_v2 and _is_original(save))
    if not (is_v1 or is_original):
        return save, config
    if config is None and (save / "config.json").is_file():
        config = save
    return save / MERGED_FOLDER, config


def _is_original(folder: Path) -> bool:
    """Whether it is a model that nobody wrote with this project."""
    weights = (*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"))
    return (
        (folder / "config.json").is_file()
        and bool(weights)
        and not (folder / MANIFEST_FILE).exists()
    )


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)
