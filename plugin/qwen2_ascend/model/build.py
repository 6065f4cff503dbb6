"""Builds this rank's model chunks from a Qwen2Config and a ParallelLayout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import silu

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.dtypes import TORCH_DTYPES
from qwen2_ascend.errors import UserError
from qwen2_ascend.model.cross_entropy import ChunkedLossModel
from qwen2_ascend.model.layer_spec import get_qwen2_block_spec
from qwen2_ascend.model.overlap import make_overlap
from qwen2_ascend.model.recompute import RecomputedOutputs, choose_layers
from qwen2_ascend.model.rotary_embedding import Qwen2RotaryEmbedding
from qwen2_ascend.model.sequence_cut import SequenceCut, cut_attention
from qwen2_ascend.model.swap import swap_attention
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.runtime import current, supported_keywords
from qwen2_ascend.runtime.megatron_compat import (
    check_tensor_parallel,
    uneven_stages,
    virtual_pipeline_size,
    virtual_stage,
)


def build_model(
    config: Qwen2Config,
    layout: ParallelLayout,
    *,
    padded_vocab_size: int | None = None,
    dtype: str = "fp32",
    backend: str = "torch",
    plain: Collection[str] = (),
    perform_initialization: bool = True,
    cross_entropy_chunk_size: int | None = None,
    recompute_activations: RecomputedOutputs | None = None,
    recompute_norms: RecomputedOutputs | None = None,
    swaps_attention: bool = False,
    use_ascend_mc2: bool = False,
    coc_parallel_num: int = 1,
    **options: Any,
) -> list[GPTModel]:
    """This rank's model chunks, one without an interleaved pipeline.

    Args:
        config: the model's shape.
        layout: the cut; `runtime.initialize_model_parallel` has built its groups.
        padded_vocab_size: rows of the embedding over all ranks; the vocabulary's own by default.
        dtype: fp32, bf16, fp16 or fp64, of parameters and activations.
        backend: whose operators the layers call, "torch" or "npu".
        plain: names of operators to take from "torch" all the same.
        perform_initialization: draw the weights; False leaves them unset, to be loaded.
        cross_entropy_chunk_size: compute losses with the logits of this many tokens at a time, to
            save memory; None computes them all at once.
        recompute_activations: layers of each chunk that compute SwiGLU's output again in backward.
        recompute_norms: layers that do so with their norms' outputs.
        swaps_attention: move what attention keeps for backward to the host and back.
        use_ascend_mc2: let torch_npu's fused operators multiply and exchange in the layers' linear
            modules; the output layer stays as it is. Nothing is exchanged with tp=1.
        coc_parallel_num: cut those modules' products into so many pieces, and exchange each while
            the next is computed; 1 leaves them whole.
        **options: of `transformer_config`.

    Raises:
        UserError: layout and model do not fit, or the installed megatron-core cannot do it.
    """
    layout.check(config, padded_vocab_size)
    check_tensor_parallel(layout, config.num_query_groups)
    transformer = transformer_config(
        config, layout, dtype=dtype, perform_initialization=perform_initialization, **options
    )
    overlap = None
    if layout.tp > 1:
        overlap = make_overlap(use_ascend_mc2=use_ascend_mc2, coc_parallel_num=coc_parallel_num)
    spec = partial(get_qwen2_block_spec, backend=backend, plain=plain, overlap=overlap)
    vocab_size, chunk_size = padded_vocab_size or config.vocab_size, cross_entropy_chunk_size
    models = list(_gpt_models(config, layout, transformer, spec, vocab_size, chunk_size))
    for model in models:
        choose_layers(model.decoder.layers, recompute_activations, recompute_norms)
        if swaps_attention:
            swap_attention(model.decoder.layers, current().device)
        if not perform_initialization:
            _mark_tensor_parallel(model)
    return models


def _gpt_models(
    config: Qwen2Config,
    layout: ParallelLayout,
    transformer: TransformerConfig,
    spec: Callable[[int], ModuleSpec],
    vocab_size: int,
    cross_entropy_chunk_size: int | None,
) -> Iterator[GPTModel]:
    """This rank's chunks, with Qwen2's rotary tables and attention over the rank's own tokens."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    chunks = layout.stages(config.num_layers)[stage]
    sequence_cut = SequenceCut.of_layout(layout)
    model_class = GPTModel if cross_entropy_chunk_size is None else ChunkedLossModel
    for index, layers in enumerate(chunks):
        with virtual_stage(index if len(chunks) > 1 else None) as vp_stage:
            model = model_class(
                transformer,
                spec(len(layers)),
                vocab_size=vocab_size,
                max_sequence_length=config.max_position_embeddings,
                pre_process=(stage, index) == (0, 0),
                post_process=(stage, index) == (layout.pp - 1, len(chunks) - 1),
                share_embeddings_and_output_weights=config.tie_word_embeddings,
                position_embedding_type="rope",
                **supported_keywords(GPTModel.__init__, vp_stage=vp_stage),
            )
        if isinstance(model, ChunkedLossModel):
            model.cross_entropy_chunk_size = cross_entropy_chunk_size
        model.rotary_pos_emb = Qwen2RotaryEmbedding(
            config, transformer.params_dtype, current().device, sequence_cut
        )
        cut_attention(model.decoder.layers, sequence_cut)
        _check_layers(model, layers)
        yield model


def transformer_config(
    config: Qwen2Config,
    layout: ParallelLayout,
    *,
    dtype: str = "fp32",
    sequence_parallel: bool = False,
    **options: Any,
) -> TransformerConfig:
    """megatron-core's configuration of this model, cut by `layout`.

    Args:
        config: the model's shape.
        layout: the cut.
        dtype: bf16, fp16, fp32, or, for proofs, fp64.
        sequence_parallel: cut the norms' and residuals' sequence over the tensor-parallel ranks.
        **options: further fields of TransformerConfig, under their own names; nothing is dropped
            without attention_dropout and hidden_dropout. recompute_num_layers counts the layers
            of a unit with recompute_method "uniform", those of a stage with "block".

    Raises:
        UserError: sequence parallelism without tensor parallelism, or a cut that the installed
            megatron-core cannot do.
    """
    if sequence_parallel and layout.tp == 1:
        raise UserError("sequence_parallel needs tensor_model_parallel_size of at least 2.")
    virtual_size = virtual_pipeline_size(layout, config.num_layers)
    on_cpu = current().name == "cpu"
    fields: dict[str, Any] = {
        **_shape(config),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": TORCH_DTYPES[dtype],
        "pipeline_dtype": TORCH_DTYPES[dtype],
        "bf16": dtype == "bf16",
        "fp16": dtype == "fp16",
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "context_parallel_size": layout.cp,
        "virtual_pipeline_model_parallel_size": virtual_size,
        "sequence_parallel": sequence_parallel,
        "use_cpu_initialization": on_cpu,
        # A CPU has no stream to wait for.
        "batch_p2p_sync": not on_cpu,
        **_p2p(virtual_size),
        **uneven_stages(layout),
        **options,
    }
    return TransformerConfig(**fields)


def _shape(config: Qwen2Config) -> dict[str, Any]:
    """The fields of TransformerConfig that the model itself decides."""
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.norm_epsilon,
        "activation_func": silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "init_method_std": config.init_method_std,
    }


def _p2p(virtual_size: int | None) -> dict[str, bool]:
    """The interleaved schedule trains silently wrong with batched, unoverlapped transfers."""
    if virtual_size is None:
        return {}
    return {"overlap_p2p_comm": True, "batch_p2p_comm": False}


def _check_layers(model: Any, layers: range) -> None:
    built = [layer.layer_number - 1 for layer in model.decoder.layers]
    assert built == list(layers), f"megatron-core built layers {built}, not {list(layers)}"


def _mark_tensor_parallel(model: GPTModel) -> None:
    """Sets what megatron-core's initialization sets besides values.

    Without these marks the gradient norm counts each cut weight on one rank only.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding, RowParallelLinear)):
            weight, dim = module.weight, int(isinstance(module, RowParallelLinear))
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)
