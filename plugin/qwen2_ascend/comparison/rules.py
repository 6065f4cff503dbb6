"""Rules: what is compared of two dumps, and what passes; flags of `qwen2-ascend compare`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tyro.conf import UseAppendAction


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is compared, and what passes; tolerances are not for integers."""

    rtol: float | None = None
    """An element may differ by atol + rtol * |theirs|. Without it by dtype: fp64 1e-10, fp32 1e-5,
    fp16 0.03, bf16 0.2, which is a few times the noise of a whole model; integers must be equal."""
    atol: float | None = None
    """The default is rtol times the largest of the element's row. Rows that differ by at most a
    given --atol are not asked for their cosine: it is the level below which everything is noise."""
    min_cosine: float | None = None
    """Least cosine similarity of a row; without it by dtype: fp64 1 - 1e-12, fp32 1 - 1e-10, fp16
    0.9995, bf16 0.98."""
    max_relative_l2: float | None = None
    """Largest relative L2 of the median row; without it by dtype: fp64 1e-10, fp32 3e-6, fp16 0.01,
    bf16 0.08."""
    max_kl: float | None = None
    """Largest mean KL divergence of logits, in nats; without it by dtype: fp64 1e-12, fp32 1e-10,
    fp16 1e-4, bf16 5e-3."""
    min_top1: float | None = None
    """Least share of logits' rows that agree on the likeliest token; not judged without it."""
    names: UseAppendAction[tuple[str, ...]] = ()
    """Compare only names that fit this pattern, as 'decoder.layers.*'."""
    logits: UseAppendAction[tuple[str, ...]] = ()
    """Pattern of names that are logits, whatever their case; '*logits*' without it."""
    gradients: UseAppendAction[tuple[str, ...]] = ()
    """Pattern of names, or names of files, that are gradients; '*grad*' without it. Their defaults
    are wider (fp32: rtol 2e-3, cosine 1 - 2e-6, L2 1e-4; bf16: 2, 0.3, 0.5), and rows shorter than
    the median one are held to its size: where terms cancel, what is left is their rounding."""
    precision: Literal["fp64", "fp32", "fp16", "bf16"] | None = None
    """What the runs computed in, where arrays are of a finer dtype, as gradients of bf16 runs are;
    what --dump of align_qwen2.py has written says so itself."""
    any_dtype: bool = False
    """Let dtypes differ; the coarser one's tolerances hold, as they do without this flag."""
    common_only: bool = False
    """Leave out names that only one side has."""
    equal_nonfinite: bool = False
    """Accept the same infinity, or NaN, at the same places of both sides (masked logits)."""
