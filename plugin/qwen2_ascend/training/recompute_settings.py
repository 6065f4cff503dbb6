"""RecomputeSettings: flags of every launcher that trains; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Literal

from qwen2_ascend.flags import Flag, flag_of, number_faults
from qwen2_ascend.planning.job import ALL_LAYERS

RECOMPUTED_WHOLE = (
    "{}: --recompute-method uniform computes all layers again, whole; leave it out, or say "
    "--recompute-method block."
)


@dataclass(frozen=True, kw_only=True)
class RecomputeSettings:
    """Activations that are computed again in backward rather than kept."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """selective: only attention's core; full: whole layers."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full: uniform keeps the input of every --recompute-num-layers layers; block recomputes
    the first --recompute-num-layers of each stage and keeps the others whole."""
    recompute_num_layers: int | None = None
    """See --recompute-method; by default every layer is computed again, each on its own."""
    recompute_activation_function: Flag = False
    """Compute SwiGLU's output again in backward; of layers that are not recomputed whole."""
    recompute_activation_function_num_layers: int | None = None
    """Only in so many layers of each pipeline chunk; by default in all."""
    recompute_norm: Flag = False
    """Compute the norms' outputs again in backward; of layers that are not recomputed whole."""
    recompute_norm_num_layers: int | None = None
    """Only in so many layers of each pipeline chunk; by default in all."""
    swap_attention: Flag = False
    """What attention keeps for backward waits in the host's memory, and comes back before it is
    needed, on a stream of its own; on a CPU, where both are one, it saves nothing."""
    cross_entropy_chunk_size: int | None = None
    """Tokens whose logits exist at once; they are computed again in backward, and never all at
    once, which saves memory at a large vocabulary. By default the logits of all tokens are kept."""

    @property
    def method_and_layers(self) -> tuple[str | None, int | None]:
        """--recompute-method and --recompute-num-layers, with what they are by default."""
        if self.recompute_method is not None and self.recompute_num_layers is None:
            return "uniform", 1
        return self.recompute_method, self.recompute_num_layers

    def faults(self, num_layers: int, layers_of_chunks: Set[int] = frozenset()) -> list[str]:
        """What contradicts itself, or the model.

        Args:
            num_layers: the model's.
            layers_of_chunks: of the pipeline; empty where the layout is wrong or not known.
        """
        faults = number_faults(
            self, at_least_one=("recompute_num_layers", "cross_entropy_chunk_size")
        )
        is_full = self.recompute_granularity == "full"
        if is_full and self.recompute_method is None:
            faults.append("--recompute-granularity full needs --recompute-method.")
        if not is_full and (self.recompute_method or self.recompute_num_layers):
            faults.append(
                "--recompute-method and --recompute-num-layers need --recompute-granularity full."
            )
        if self.swap_attention and is_full and self.method_and_layers == ("uniform", 1):
            faults.append(
                "--swap-attention: of layers that are recomputed whole, one at a time, attention "
                "keeps nothing that could wait; leave it out, or say --recompute-method block and "
                "--recompute-num-layers."
            )
        faults += self._single_output_faults(num_layers)
        return faults + self._unit_faults(sorted(layers_of_chunks))

    def _single_output_faults(self, num_layers: int) -> list[str]:
        faults = []
        for what in ("activation_function", "norm"):
            flag, number = flag_of(f"recompute_{what}"), self._number_of(what)
            is_on = getattr(self, f"recompute_{what}")
            if number is not None and not is_on:
                faults.append(f"{flag}-num-layers {number} needs {flag}.")
            if number is not None and not 0 <= number <= num_layers:
                faults.append(f"{flag}-num-layers {number} must be from 0 to {num_layers}.")
            is_whole = self.recompute_granularity == "full"
            if is_on and is_whole and self.recompute_method == "uniform":
                faults.append(RECOMPUTED_WHOLE.format(flag))
        return faults

    def _unit_faults(self, counts: Sequence[int]) -> list[str]:
        """What megatron-core's recomputation cannot do with the layers of some chunk."""
        n = self.recompute_num_layers
        if self.recompute_method != "uniform" or n is None or n < 1:
            return []
        if not any(count % n for count in counts):
            return []
        fit = [m for m in range(1, counts[0] + 1) if not any(count % m for count in counts)]
        return [
            f"--recompute-method uniform: --recompute-num-layers {n} does not divide the "
            f"{' or '.join(map(str, counts))} layers of each pipeline chunk; use "
            f"{', '.join(map(str, fit))}."
        ]

    def single_outputs(
        self, what: Literal["activation_function", "norm"]
    ) -> tuple[int, int] | None:
        """(how many layers of a chunk, after how many that are recomputed whole); None is none."""
        if not getattr(self, f"recompute_{what}"):
            return None
        number, method_and_layers = self._number_of(what), self.method_and_layers
        whole = self.recompute_granularity == "full"
        is_all = whole and method_and_layers[0] == "uniform"
        after = (method_and_layers[1] or 0) if whole else 0
        return 0 if is_all else ALL_LAYERS if number is None else number, after

    def _number_of(self, what: str) -> int | None:
        return getattr(self, f"recompute_{what}_num_layers")
