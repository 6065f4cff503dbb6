"""What other tools read of a checkpoint's `args`, and where.

`READERS` are pieces of their code, with every name that the code asks for. Where a name of
`required` is absent, the tool stops or takes the checkpoint for another model. Where another one is
absent, the tool keeps its own value. `written` gives the values that our checkpoints have, and
`LEFT_OUT` the names that they do not have, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.parallel import ParallelLayout


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A piece of a tool that reads args."""

    tool: str
    """Its name, as in the environment variable of its checkout."""
    versions: tuple[str, ...]
    """Where exactly these names are read; folders of other versions are not looked at."""
    file: str
    functions: tuple[str, ...] = ()
    """Functions of the file; none is all of it."""
    holders: tuple[str, ...]
    """What the code calls the args."""
    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MEGATRON = {
    "tool": "MEGATRON_LM",
    "file": "megatron/training/checkpointing.py",
    "holders": ("checkpoint_args", "ckpt_args", "state_dict['args']"),
}
_MINDSPEED = {"tool": "MINDSPEED_LLM"}
_BRIDGE = {"tool": "MEGATRON_BRIDGE", "holders": ("args",)}
_TAKEN_FROM_CHECKPOINT = names("""
    num_layers hidden_size ffn_hidden_size seq_length num_attention_heads num_query_groups
    group_query_attention kv_channels max_position_embeddings position_embedding_type
    add_position_embedding use_rotary_position_embeddings rotary_base rotary_percent
    rotary_interleaved add_bias_linear add_qkv_bias squared_relu swiglu
    untie_embeddings_and_output_weights apply_layernorm_1p normalization
    apply_query_key_layer_scaling attention_dropout hidden_dropout tokenizer_type padded_vocab_size
    ckpt_format tensor_model_parallel_size pipeline_model_parallel_size
    virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage
    expert_model_parallel_size num_experts moe_grouped_gemm is_hybrid_model
    heterogeneous_layers_config_path

    disable_bias_linear hybrid_override_pattern spec hybrid_attention_ratio hybrid_mlp_ratio
    moe_layer_freq moe_ffn_hidden_size moe_router_topk moe_token_dispatcher_type
    moe_router_pre_softmax moe_shared_expert_intermediate_size mamba_state_dim mamba_head_dim
    mamba_num_groups heterogeneous_layers_config_encoded_json tokenizer_model tiktoken_pattern
""")
_COMPARED = names("""
    num_layers hidden_size num_attention_heads add_position_embedding max_position_embeddings
    make_vocab_size_divisible_by padded_vocab_size tokenizer_type data_parallel_random_init
    tensor_model_parallel_size pipeline_model_parallel_size
""")
_ON_LOADING = names("""
    consumed_train_samples consumed_valid_samples skipped_train_samples no_save_optim no_save_rng
    ckpt_fully_parallel_save
""")
_LATENT_ATTENTION = names("""
    qk_pos_emb_head_dim qk_head_dim q_lora_rank kv_lora_rank v_head_dim
""")
_MINDSPEED_EXPERTS = names("""
    n_shared_experts first_k_dense_replace shared_expert_gate
""")
_V2_REQUIRED = names("""
    num_layers hidden_size num_attention_heads num_key_value_heads kv_channels
    tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size
    untie_embeddings_and_output_weights add_qkv_bias
""")
_MINDSPEED_V2 = {
    **_MINDSPEED,
    "file": "mindspeed_llm/tasks/checkpoint/convert_mg2hf.py",
    "functions": ("Mg2HfConvert",),
    "holders": ("self.load_model",),
    "required": _V2_REQUIRED,
}
_V2_OPTIONAL = (
    _LATENT_ATTENTION - names("kv_lora_rank")
    | _MINDSPEED_EXPERTS
    | names("""
    num_layer_list num_layers_per_virtual_pipeline_stage num_experts qk_layernorm
    expert_tensor_parallel_size qkv_type enable_dsa_indexer full_attention_interval router_bias
    """)
)
_INDEXER = names("indexer_types index_topk_freq index_skip_topk_offset")
_BRIDGE_MODEL = names("""
    max_position_embeddings padded_vocab_size normalization position_embedding_type rotary_base
    rotary_percent use_rope_scaling untie_embeddings_and_output_weights fp16_lm_cross_entropy
    transformer_impl num_experts moe_grouped_gemm qk_layernorm qk_l2_norm multi_latent_attention
    mtp_num_layers heterogeneous_layers_config_path
""")
_BRIDGE_CONFIG = names("""
    multi_latent_attention heterogeneous_layers_config_path no_persist_layer_norm params_dtype
    overlap_p2p_comm num_experts rotary_interleaved decoder_first_pipeline_num_layers
    decoder_last_pipeline_num_layers fp8_param_gather swiglu bias_swiglu_fusion bias_gelu_fusion
    squared_relu init_method_xavier_uniform group_query_attention num_query_groups
    config_logger_dir cp_comm_type is_hybrid_model
""")
_KITCHEN = names("kitchen_config_file kitchen_recipe_number")
_BRIDGE_VERSIONS = ("v0.3.1", "v0.4.2")

READERS = (
    # --use-checkpoint-args
    Reader(
        **_MEGATRON,
        versions=("0.12.1",),
        functions=("load_args_from_checkpoint",),
        optional=_TAKEN_FROM_CHECKPOINT,
    ),
    Reader(
        **_MEGATRON,
        versions=("0.16.1",),
        functions=("load_args_from_checkpoint",),
        optional=_TAKEN_FROM_CHECKPOINT
        | names("""
        mamba_num_heads moe_latent_size moe_router_score_function moe_router_enable_expert_bias
        moe_router_topk_scaling_factor
        """),
    ),
    # --load, without --finetune
    Reader(
        **_MEGATRON,
        versions=("0.12.1",),
        functions=("check_checkpoint_args",),
        required=_COMPARED,
    ),
    Reader(
        **_MEGATRON,
        versions=("0.16.1",),
        functions=("check_checkpoint_args",),
        required=_COMPARED,
        optional=names("global_batch_size"),
    ),
    Reader(
        **_MEGATRON,
        versions=("0.12.1",),
        functions=("load_checkpoint",),
        required=names("tensor_model_parallel_size pipeline_model_parallel_size"),
        optional=_ON_LOADING
        | names("encoder_tensor_model_parallel_size encoder_pipeline_model_parallel_size"),
    ),
    Reader(
        **_MEGATRON,
        versions=("0.16.1",),
        functions=("load_checkpoint",),
        optional=_ON_LOADING
        | names("""
        tensor_model_parallel_size pipeline_model_parallel_size world_size data_parallel_size
        """),
    ),
    # tools/checkpoint/convert.py
    Reader(
        tool="MEGATRON_LM",
        versions=("0.12.1", "0.16.1"),
        file="tools/checkpoint/loader_base.py",
        holders=("checkpoint_args", "self.checkpoint_args"),
        required=names("fp16 bf16"),
        optional=names("normalization"),
    ),
    Reader(
        tool="MEGATRON_LM",
        versions=("0.12.1", "0.16.1"),
        file="tools/checkpoint/saver_base.py",
        holders=("self.md.checkpoint_args",),
        required=names("sequence_parallel apply_query_key_layer_scaling"),
    ),
    # converter v1, and training with --use-checkpoint-args
    Reader(
        **_MINDSPEED,
        versions=("2.2.0",),
        file="mindspeed_llm/training/checkpointing.py",
        functions=("load_args_from_checkpoint_wrapper",),
        holders=("checkpoint_args",),
        optional=_LATENT_ATTENTION
        | _MINDSPEED_EXPERTS
        | names("""
        num_layer_list num_experts sequence_parallel expert_model_parallel_size qk_layernorm
        multi_latent_attention post_norm moe_intermediate_size moe_layer_freq
        """),
    ),
    Reader(
        **_MINDSPEED,
        versions=("2.2.0",),
        file="mindspeed_llm/tasks/checkpoint/models.py",
        holders=("self.args_megatron_checkpoint",),
        optional=_MINDSPEED_EXPERTS
        | names("""
        num_layer_list sequence_parallel qk_layernorm multi_latent_attention q_lora_rank
        kv_lora_rank moe_ffn_hidden_size
        """),
    ),
    # converter v2
    Reader(
        **_MINDSPEED_V2,
        versions=("26.0.0",),
        optional=_V2_OPTIONAL | names("num_query_groups post_attention fc_type"),
    ),
    Reader(
        **_MINDSPEED_V2,
        versions=("26.1.0",),
        optional=_V2_OPTIONAL | _INDEXER | names("num_query_groups post_attention qkv_split"),
    ),
    Reader(
        **_MINDSPEED_V2,
        versions=("master",),
        optional=_V2_OPTIONAL | _INDEXER | names("post_norm fc_type"),
    ),
    # a torch_dist folder without Bridge's own run_config.yaml counts as Megatron-LM's
    Reader(
        **_BRIDGE,
        versions=("v0.3.1",),
        file="src/megatron/bridge/training/mlm_compat/arguments.py",
        required=_BRIDGE_CONFIG,
        optional=_KITCHEN | names("norm_epsilon apply_layernorm_1p"),
    ),
    Reader(
        **_BRIDGE,
        versions=("v0.4.2",),
        file="src/megatron/bridge/training/mlm_compat/arguments.py",
        required=_BRIDGE_CONFIG,
        optional=_KITCHEN
        | names("""
        norm_epsilon apply_layernorm_1p layernorm_epsilon layernorm_zero_centered_gamma num_layers
        hybrid_layer_pattern hybrid_override_pattern
        """),
    ),
    Reader(
        **_BRIDGE,
        versions=("v0.3.1",),
        file="src/megatron/bridge/training/mlm_compat/model.py",
        functions=("_gpt_provider", "_get_transformer_layer_spec"),
        required=_BRIDGE_MODEL | names("moe_use_legacy_grouped_gemm"),
        optional=names("experimental_attention_variant"),
    ),
    Reader(
        **_BRIDGE,
        versions=("v0.4.2",),
        file="src/megatron/bridge/training/mlm_compat/model.py",
        functions=("_gpt_provider", "_get_transformer_layer_spec"),
        required=_BRIDGE_MODEL,
        optional=names("experimental_attention_variant"),
    ),
    Reader(
        **_BRIDGE,
        versions=_BRIDGE_VERSIONS,
        file="src/megatron/bridge/training/mlm_compat/model.py",
        functions=("_get_model",),
        required=names("fp16 bf16 init_model_with_meta_device"),
    ),
    Reader(
        **_BRIDGE,
        versions=_BRIDGE_VERSIONS,
        file="src/megatron/bridge/training/checkpointing.py",
        functions=("_extract_megatron_lm_args_from_state_dict",),
        optional=names("""
        tensor_model_parallel_size pipeline_model_parallel_size no_save_optim no_save_rng
        ckpt_fully_parallel_save encoder_tensor_model_parallel_size
        encoder_pipeline_model_parallel_size
        """),
    ),
    Reader(
        tool="MEGATRON_BRIDGE",
        versions=_BRIDGE_VERSIONS,
        file="src/megatron/bridge/training/model_load_save.py",
        holders=("megatron_args",),
        required=names("make_vocab_size_divisible_by"),
    ),
)

LEFT_OUT = {
    "a model of another kind has it, and the tool asks for a default": _LATENT_ATTENTION
    | _MINDSPEED_EXPERTS
    | _INDEXER
    | _KITCHEN
    | names("""
    spec hybrid_override_pattern hybrid_layer_pattern hybrid_attention_ratio hybrid_mlp_ratio
    moe_layer_freq moe_ffn_hidden_size moe_intermediate_size moe_router_topk
    moe_token_dispatcher_type moe_router_pre_softmax moe_shared_expert_intermediate_size
    moe_router_score_function moe_router_enable_expert_bias moe_router_topk_scaling_factor
    moe_latent_size mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads
    heterogeneous_layers_config_encoded_json encoder_tensor_model_parallel_size
    encoder_pipeline_model_parallel_size post_norm post_attention enable_dsa_indexer
    full_attention_interval router_bias qkv_split experimental_attention_variant
    """),
    "the tool sets it for the kind of model that it is told": names("qkv_type fc_type"),
    "the older or newer name of one that is written": names("""
    disable_bias_linear layernorm_epsilon layernorm_zero_centered_gamma
    """),
    "the tool then takes tensor_model_parallel_size": names("expert_tensor_parallel_size"),
    "it is a path or a pattern that would replace what the user gives": names("""
    tokenizer_model tiktoken_pattern
    """),
    "only a run has it, and its checkpoints write it": names("global_batch_size"),
    "it speaks of an optimizer that is sharded as Megatron-LM shards it": names("""
    ckpt_fully_parallel_save
    """),
}


def written(config: Qwen2Config, layout: ParallelLayout, rows: int, dtype: str) -> dict[str, Any]:
    """What the args of converted shards say; `params_dtype` as torch's name.

    Args:
        config: the model's.
        layout: of the ranks.
        rows: of the padded vocabulary.
        dtype: bf16, fp16 or fp32.
    """
    tp, pp = layout.tp, layout.pp
    per_chunk = layout.num_layers_per_virtual_pipeline_stage
    return {
        # the model's shape
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "num_key_value_heads": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "rotary_base": config.rotary_base,
        "rotary_percent": 1.0,
        "norm_epsilon": config.norm_epsilon,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": 0.0,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": rows,
        "make_vocab_size_divisible_by": rows // tp,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        # what every Qwen2 is
        "group_query_attention": True,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": True,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_qkv_bias": True,
        "tokenizer_type": "HuggingFaceTokenizer",
        "transformer_impl": "local",
        "no_persist_layer_norm": True,
        # what no Qwen2 is
        **dict.fromkeys(
            names("""
            rotary_interleaved use_rope_scaling apply_layernorm_1p squared_relu add_bias_linear
            qk_layernorm qk_l2_norm apply_query_key_layer_scaling multi_latent_attention
            moe_grouped_gemm moe_use_legacy_grouped_gemm is_hybrid_model sequence_parallel
            data_parallel_random_init bias_gelu_fusion bias_swiglu_fusion fp16_lm_cross_entropy
            fp8_param_gather init_method_xavier_uniform init_model_with_meta_device
            overlap_p2p_comm
            """),
            False,
        ),
        **dict.fromkeys(
            names("""
            num_experts mtp_num_layers heterogeneous_layers_config_path
            decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
            """)
        ),
        "cp_comm_type": ["p2p"],
        "config_logger_dir": "",
        # the ranks
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": per_chunk and config.num_layers // pp // per_chunk,
        "num_layers_per_virtual_pipeline_stage": per_chunk,
        "num_layer_list": ",".join(map(str, layout.num_layer_list or ())) or None,
        "expert_model_parallel_size": 1,
        "world_size": tp * pp,
        "data_parallel_size": 1,
        # the weights, and that they are all
        "params_dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype],
        "bf16": dtype == "bf16",
        "fp16": dtype == "fp16",
        "iteration": 1,
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
        "no_save_optim": True,
        "no_save_rng": True,
    }
