"""OverlapSettings: the exchange between tensor parallel ranks, hidden behind their products.

The flags are MindSpeed-LLM's. As there, the two ways exclude each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen2_ascend.flags import Flag
from qwen2_ascend.ops.mc2_limits import COLUMNS, DTYPES, RANKS

if TYPE_CHECKING:
    from qwen2_ascend.config import Qwen2Config

PIECES = (1, 2, 4, 8)
"""Values of --coc-parallel-num, as in MindSpeed."""


@dataclass(frozen=True, kw_only=True)
class OverlapSettings:
    """Tensor parallel layers that exchange while they multiply; without tensor parallelism nothing
    is exchanged, and these have no effect."""

    use_ascend_mc2: Flag = False
    """torch_npu's fused operators multiply and exchange at once, in bf16 or fp16, in the linear
    layers of every decoder layer; it needs an npu and --sequence-parallel."""
    use_ascend_coc: Flag = False
    """Cut the products of these layers into --coc-parallel-num pieces, and exchange each while the
    next is computed; on every device."""
    coc_parallel_num: int = 1
    """With --use-ascend-coc: how many pieces, 1 (not cut), 2, 4 or 8."""
    coc_fused_kernel: Flag = False
    """With --use-ascend-coc, in MindSpeed: kernels of a library of their own. They are not used
    here: the products are cut into pieces all the same."""

    @property
    def number_of_pieces(self) -> int:
        """`build_model`'s coc_parallel_num."""
        return self.coc_parallel_num if self.use_ascend_coc else 1

    @property
    def is_on(self) -> bool:
        """Whether products and exchanges overlap, given tensor parallelism."""
        return self.use_ascend_mc2 or self.number_of_pieces > 1

    def faults(self, settings: Any, config: Qwen2Config) -> list[str]:
        """What contradicts itself, the layout, the precision or the model.

        `settings` is a TrainingSettings, which this module cannot import.
        """
        faults = self.flag_faults()
        if self.number_of_pieces in PIECES[1:]:
            faults += _pieces_faults(self.coc_parallel_num, settings)
        if self.use_ascend_mc2:
            faults += _fused_faults(settings, config)
        return faults

    def flag_faults(self) -> list[str]:
        """What contradicts itself."""
        faults = []
        if self.use_ascend_mc2 and self.use_ascend_coc:
            faults.append("--use-ascend-mc2 and --use-ascend-coc: give one of them.")
        if self.coc_parallel_num not in PIECES:
            faults.append(
                f"--coc-parallel-num {self.coc_parallel_num} is not 1, 2, 4 or 8, as in MindSpeed."
            )
        elif self.coc_parallel_num > 1 and not self.use_ascend_coc:
            faults.append(f"--coc-parallel-num {self.coc_parallel_num} needs --use-ascend-coc.")
        if self.coc_fused_kernel and not self.use_ascend_coc:
            faults.append("--coc-fused-kernel needs --use-ascend-coc.")
        return faults

    def device_faults(self, settings: Any, device: str) -> list[str]:
        """What the device, cpu, cuda or npu, does not have."""
        tp = settings.parallel.tensor_model_parallel_size
        if not self.use_ascend_mc2 or tp == 1 or device == "npu":
            return []
        return [
            f"--use-ascend-mc2 asks for operators of torch_npu's, and the device is {device}; "
            "leave it out, or say --use-ascend-coc --coc-parallel-num 2."
        ]

    def notes(self, tensor_model_parallel_size: int) -> list[str]:
        """Lines for the log: what is overlapped, and which flags have no effect."""
        given = "--use-ascend-mc2" if self.use_ascend_mc2 else "--use-ascend-coc"
        if not self.use_ascend_mc2 and not self.use_ascend_coc:
            return []
        if tensor_model_parallel_size == 1:
            return [f"{given} has no effect: without tensor parallelism nothing is exchanged"]
        if self.use_ascend_mc2:
            return [
                "linear layers of decoder layers: multiplied and exchanged by torch_npu's fused "
                "operators (the output layer is not)"
            ]
        notes = []
        if self.coc_fused_kernel:
            notes.append(
                "--coc-fused-kernel has no effect: its library of kernels is not used; "
                "--use-ascend-mc2 has fused ones of torch_npu's"
            )
        number = self.number_of_pieces
        if number == 1:
            return [
                *notes,
                "--use-ascend-coc has no effect with --coc-parallel-num 1; 2, 4 or 8 cut products",
            ]
        return [
            *notes,
            f"linear layers of decoder layers: products in {number} pieces, each exchanged while "
            "the next is computed (the output layer's is not cut)",
        ]


def _pieces_faults(number: int, settings: Any) -> list[str]:
    """Pieces are of one size, as in MindSpeed; batches of their own lengths have others."""
    parallel, batch = settings.parallel, settings.batch
    tp = parallel.tensor_model_parallel_size
    if tp == 1 or settings.variable_seq_lengths:
        return []
    parts = tp if parallel.sequence_parallel else 1
    parts *= parallel.context_parallel_size
    rows = batch.seq_length * batch.micro_batch_size // max(parts, 1)
    if rows % number == 0:
        return []
    fit = ", ".join(str(n) for n in PIECES if rows % n == 0)
    return [
        f"--coc-parallel-num {number} does not divide the {rows} rows that a rank multiplies "
        "(--seq-length times --micro-batch-size, over the context parallel ranks, and over the "
        f"tensor parallel ranks with --sequence-parallel); use {fit}, or other lengths."
    ]


def _fused_faults(settings: Any, config: Qwen2Config) -> list[str]:
    """What the operators' documents rule out."""
    parallel, precision = settings.parallel, settings.precision_name()
    tp = parallel.tensor_model_parallel_size
    if tp == 1:
        return []
    faults = []
    if not parallel.sequence_parallel:
        faults.append(
            "--use-ascend-mc2 needs --sequence-parallel, as in MindSpeed: torch_npu's operator for "
            "whole sequences is documented for inference; add it, or say --use-ascend-coc "
            "--coc-parallel-num 2."
        )
    if precision not in DTYPES:
        faults.append(f"--use-ascend-mc2 multiplies bf16 or fp16, not {precision}; add --bf16.")
    if tp not in RANKS:
        faults.append(
            f"--use-ascend-mc2 takes tensor_model_parallel_size=2, 4 or 8, not {tp}; leave it out."
        )
    else:
        faults += [
            f"--use-ascend-mc2 takes from {COLUMNS.start} to {COLUMNS.stop - 1} columns of a "
            f"rank's {layer}, not {columns}; leave it out, or choose another "
            "tensor_model_parallel_size."
            for layer, columns in _columns(config, tp).items()
            if columns not in COLUMNS
        ]
    return faults


def _columns(config: Qwen2Config, tp: int) -> dict[str, int]:
    """How many columns each product of a layer adds up on a rank, forward and backward."""
    heads = config.num_attention_heads + 2 * config.num_query_groups
    return {
        "hidden states": config.hidden_size,
        "linear_qkv": heads * config.kv_channels // tp,
        "linear_proj": config.num_attention_heads * config.kv_channels // tp,
        "linear_fc1": 2 * config.ffn_hidden_size // tp,
        "linear_fc2": config.ffn_hidden_size // tp,
    }
