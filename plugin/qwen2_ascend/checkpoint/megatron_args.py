"""The `args` of a Megatron checkpoint: what other tools read beside the tensors.

Megatron-LM keeps the training arguments as an `argparse.Namespace` in every checkpoint. Its
loaders, MindSpeed-LLM's converters and Megatron-Bridge compare some of them, take over others, and
fail where one is absent. `tests/interop/args_read.py` lists each name with the place that reads it.

Three things are absent on purpose. A path of the tokenizer would replace the one that a user gives.
The YaRN constants have other names in each tool; `config.json` has them. `bert_binary_head` and the
like are read from the tool's own defaults, never from a checkpoint.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from qwen2_ascend.checkpoint.formats.pickles import DType
from qwen2_ascend.config import DTYPES, Qwen2Config
from qwen2_ascend.parallel import ParallelLayout

ITERATION = 1
"""Converted shards carry this iteration, as MindSpeed-LLM's and Megatron's converters write."""
CHECKPOINT_FORMATS = {"megatron": "torch", "torch_dist": "torch_dist"}
"""Megatron's `ckpt_format` of what the splitter calls `--save-format`."""


def megatron_args(
    config: Qwen2Config, layout: ParallelLayout, padded_vocab_size: int, dtype: str
) -> Namespace:
    """What is known of a model without its training, under Megatron's names.

    Args:
        config: the model's.
        layout: the layout of the ranks that hold it.
        padded_vocab_size: the rows of the embedding in the shards.
        dtype: the dtype of the weights: bf16, fp16 or fp32.
    """
    names = {short: long for long, short in DTYPES.items()}
    return Namespace(
        **_shape(config),
        **_kind_of_model(config),
        **_places(config, layout),
        **_vocabulary(config, layout, padded_vocab_size),
        params_dtype=DType(names[dtype]),
        bf16=dtype == "bf16",
        fp16=dtype == "fp16",
        **_without_training(),
    )


def _shape(config: Qwen2Config) -> dict[str, Any]:
    base = config.rotary_base
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": config.num_query_groups,
        "num_key_value_heads": config.num_query_groups,  # MindSpeed-LLM's name
        "kv_channels": config.kv_channels,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "rotary_base": int(base) if base == int(base) else base,  # --rotary-base is a whole number
        "rotary_percent": 1.0,
        "norm_epsilon": config.norm_epsilon,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": 0.0,
    }


def _kind_of_model(config: Qwen2Config) -> dict[str, Any]:
    """What Qwen2 is, and what it is not: a name that is absent would keep the other tool's own."""
    return {
        "add_position_embedding": True,
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "rotary_interleaved": False,
        "use_rope_scaling": False,
        "normalization": "RMSNorm",
        "apply_layernorm_1p": False,
        "no_persist_layer_norm": True,
        "swiglu": True,
        "squared_relu": False,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "qk_layernorm": False,
        "qk_l2_norm": False,
        "apply_query_key_layer_scaling": False,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "multi_latent_attention": False,
        "num_experts": None,
        "moe_grouped_gemm": False,
        "moe_use_legacy_grouped_gemm": False,
        "mtp_num_layers": None,
        "is_hybrid_model": False,
        "heterogeneous_layers_config_path": None,
        "transformer_impl": "local",
    }


def _places(config: Qwen2Config, layout: ParallelLayout) -> dict[str, Any]:
    """Which rank holds what."""
    layers = layout.num_layer_list
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline_size(config.num_layers),
        "num_layers_per_virtual_pipeline_stage": layout.num_layers_per_virtual_pipeline_stage,
        "num_layer_list": ",".join(map(str, layers)) if layers else None,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "expert_model_parallel_size": 1,
        "sequence_parallel": False,
        "world_size": layout.tp * layout.pp,
        "data_parallel_size": 1,
    }


def _vocabulary(
    config: Qwen2Config, layout: ParallelLayout, padded_vocab_size: int
) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "make_vocab_size_divisible_by": padded_vocab_size // layout.tp,
        "tokenizer_type": "HuggingFaceTokenizer",
    }


def _without_training() -> dict[str, Any]:
    """What a converted checkpoint says of its training, and the defaults of what has no effect."""
    return {
        "iteration": ITERATION,
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
        "data_parallel_random_init": False,
        "no_save_optim": True,
        "no_save_rng": True,
        "bias_gelu_fusion": False,
        "bias_swiglu_fusion": False,
        "fp16_lm_cross_entropy": False,
        "fp8_param_gather": False,
        "init_method_xavier_uniform": False,
        "init_model_with_meta_device": False,
        "overlap_p2p_comm": False,
        "cp_comm_type": ["p2p"],
        "config_logger_dir": "",
    }
