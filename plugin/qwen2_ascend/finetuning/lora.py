"""LoRA on a model of any layout.

`apply_lora` is called once the weights are loaded and before DDP. It freezes them and adds adapters
that change nothing yet (B = 0); build_optimizer then sees the adapters alone. Their files are those
of `finetuning/adapter.py` and `finetuning/lora_checkpoint.py`; they are merged without a model by
`qwen2-ascend convert --load-dir BASE --adapter FOLDER ...`.

The representation. PEFT gives q_proj, k_proj and v_proj a pair A `[r, h]`, B `[rows, r]` each;
Megatron holds them as one linear_qkv whose rows are mixed by query group. Here a Megatron module
has one pair that holds all of them: lora_A stacks the targets' A (`[targets * r, h]`), lora_B has a
row for every row of the module (`[rows, r]`), in the module's own order, and the row's projection
says which A it belongs to. So a B is cut exactly as the weight is, at more tensor-parallel ranks
than query groups too. Rows of projections that are not targets are zero and stay zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor
from torch.nn.functional import dropout, linear

from qwen2_ascend.checkpoint.adapter_rules import LORA_B, adapter_rules
from qwen2_ascend.checkpoint.load import unwrap
from qwen2_ascend.checkpoint.plan import overlap, volume
from qwen2_ascend.checkpoint.rules import BY_COLUMNS, Box, Rule
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.lora_config import LoraConfig
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.runtime.megatron_compat import sums_only_gradients_that_are_there


def apply_lora(
    chunks: Sequence[Any],
    lora: LoraConfig,
    config: Qwen2Config,
    layout: ParallelLayout,
    *,
    seed: int = 1234,
) -> None:
    """Freezes this rank's model chunks and adds adapters, of which B is zero.

    A is PEFT's default, uniform within 1 / sqrt(columns), from a generator that is seeded by the
    tensor's name: the same values at any layout.

    Args:
        chunks: what `build_model` gave, with their weights, not yet in DistributedDataParallel.
        lora: the adapter.
        config: the model's shape.
        layout: how it is cut.
        seed: the seed of the values of A.
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    rules = adapter_rules(config, lora)
    for chunk, layers in zip(chunks, layout.stages(config.num_layers)[stage], strict=True):
        chunk.requires_grad_(False)
        for local, layer in enumerate(layers):
            for rule_a, rule_b in zip(rules[::2], rules[1::2], strict=True):
                name = rule_b.megatron.format(local).removesuffix(f".{LORA_B}")
                module = chunk.get_submodule(name)
                adapter = Adapter(module, rule_a, rule_b, lora, layout.tp)
                adapter.initialize(rule_a, layer, seed)
                module.add_module("adapter", adapter)
                module.register_forward_hook(_add_adapter)
        _let_gradients_through(chunk)
        if not sums_only_gradients_that_are_there():
            _hold_frozen_embedding(chunk, layout)


class Adapter(torch.nn.Module):
    """The adapter of one linear module, cut over the tensor-parallel ranks as the module is.

    Of a column-parallel module every rank has all of A and its rows of B; of a row-parallel one its
    columns of A and all of B. What is exchanged between ranks is the product with A, `rank` numbers
    a token and target.

    Attributes:
        lora_A: `[targets * rank, in]`
        lora_B: `[out, rank]`
    """

    def __init__(self, module: Any, rule_a: Rule, rule_b: Rule, lora: LoraConfig, tp: int) -> None:
        super().__init__()
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        weight = module.weight
        self.is_row_parallel = rule_a.shard_axis == BY_COLUMNS
        self.sequence_parallel = bool(module.config.sequence_parallel and tp > 1)
        self.scaling, self.dropout_p = lora.scaling, lora.dropout
        self._box_a, box_b = rule_a.shard(tp, tp_rank), rule_b.shard(tp, tp_rank)
        like = {"dtype": weight.dtype, "device": weight.device}
        self.lora_A = torch.nn.Parameter(torch.zeros(rule_a.shape(self._box_a), **like))
        self.lora_B = torch.nn.Parameter(torch.zeros(rule_b.shape(box_b), **like))
        assert len(self.lora_B) == len(weight), (self.lora_B.shape, weight.shape)
        self.register_buffer("_owners", _owners(rule_b, box_b, **like), persistent=False)
        cut, whole = self.lora_B, self.lora_A
        if self.is_row_parallel:
            cut, whole = whole, cut
        set_tensor_model_parallel_attributes(cut, True, int(self.is_row_parallel), 1)
        # Of these every rank sees its part of the sequence only: megatron-core adds them up.
        whole.sequence_parallel = self.sequence_parallel  # pyright: ignore

    @torch.no_grad()
    def initialize(self, rule_a: Rule, layer: int, seed: int) -> None:
        """Draws each target's whole A and takes this rank's columns; B stays zero."""
        _, rows, (start, stop) = self._box_a
        for own, (name, box) in zip(self.lora_A.split(rows[1]), rule_a.parts, strict=True):
            own.copy_(initial_a(name.format(layer), rows[1], box[2][1], seed)[:, start:stop])

    def forward(self, x: Tensor) -> Tensor:
        """The module's input to what is added to its output, with the module's shapes."""
        low = linear(self._dropped(x), self.lora_A) * self.scaling
        if self.is_row_parallel:
            if self.sequence_parallel:
                low = reduce_scatter_to_sequence_parallel_region(low)
            else:
                low = reduce_from_tensor_model_parallel_region(low)
        elif self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True)
        else:
            low = copy_to_tensor_model_parallel_region(low)
        return linear(low, self._wide_b())

    def _wide_b(self) -> Tensor:
        """`[out, targets * rank]`: each row of B under its own target's A, zero under the others.

        So that one product serves all targets, in whichever order the module has their rows.
        """
        owners: Any = self._owners
        if owners is None:
            return self.lora_B
        return (self.lora_B.unsqueeze(1) * owners.unsqueeze(2)).flatten(1)

    def _dropped(self, x: Tensor) -> Tensor:
        if self.dropout_p == 0.0 or not self.training:
            return x
        # Where ranks hold parts of x each drops in its own; under sequence parallelism the block
        # forked already. Else all ranks drop alike.
        tracker: Any = tensor_parallel.get_cuda_rng_tracker()
        forks = self.is_row_parallel and not self.sequence_parallel
        with tracker.fork() if forks else nullcontext():
            return dropout(x, self.dropout_p)


def initial_a(name: str, rank: int, columns: int, seed: int) -> Tensor:
    """One whole A, `[rank, columns]` in fp32, as `apply_lora` says.

    Args:
        name: the tensor's in PEFT.
        rank: the rank of the adapter.
        columns: inputs of the projection.
        seed: the seed of all adapters.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    drawn = torch.empty(rank, columns)
    return drawn.uniform_(-(columns**-0.5), columns**-0.5, generator=generator)


def lora_state(chunks: Sequence[Any]) -> list[dict[str, torch.nn.Parameter]]:
    """The adapters' parameters of each chunk, by their names in the unwrapped model."""
    return [
        {
            f"{name}.{key}": parameter
            for name, module in unwrap(chunk).named_modules()
            if isinstance(module, Adapter)
            for key, parameter in module.named_parameters()
        }
        for chunk in chunks
    ]


def _add_adapter(module: Any, args: tuple[Tensor, ...], output: Any) -> Any:
    """Forward hook of a linear module: (output, bias) with the adapter's output added."""
    out, bias = output
    return out + module.adapter(args[0]), bias


def _owners(rule_b: Rule, box: Box, **like: Any) -> Tensor | None:
    """Which target each row of B belongs to, one-hot `[out, targets]`; None if all to one."""
    columns = box[2]
    owners = torch.zeros(*(stop - start for start, stop in box[:2]), len(rule_b.parts))
    for target, (_, part) in enumerate(rule_b.parts):
        common = overlap((*part[:2], columns), box)
        if volume(common):
            (b0, b1), (r0, r1), _ = common
            block, row = box[0][0], box[1][0]
            owners[b0 - block : b1 - block, r0 - row : r1 - row, target] = 1
    owners = owners.flatten(0, 1)
    return owners.to(**like) if len(rule_b.parts) > 1 or not owners.all() else None


def _let_gradients_through(chunk: Any) -> None:
    """Makes the frozen embedding's output ask for a gradient.

    Recomputed layers give none to their adapters unless one of their inputs does.
    """

    def ask(module: Any, args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()

    if chunk.pre_process:
        chunk.embedding.register_forward_hook(ask)


def _hold_frozen_embedding(chunk: Any, layout: ParallelLayout) -> None:
    """Gives megatron-core 0.12 a gradient to add up over the stages of a tied embedding.

    It asks for one without looking whether the embedding is frozen.
    """
    if layout.pp > 1 and chunk.share_embeddings_and_output_weights:
        weight = chunk.shared_embedding_or_output_weight()
        if weight is not None:
            weight.main_grad = torch.zeros(1, dtype=torch.float32, device=weight.device)
