"""This project's attention in transformers' attention interface, under names of its own.

Packed documents are kept apart by their ends, which the caller of the model gives as a keyword: no
mask of s x s numbers is ever made. On an npu it is torch_npu's fused operator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
import transformers

from qwen2_ascend.errors import UserError
from qwen2_ascend.ops import get_ops


def register_attention(backend: str, *, plain: Collection[str] = ()) -> str:
    """Makes `ops.attention` known to transformers.

    Args:
        backend: of `get_ops`, "torch" or "npu".
        plain: of `get_ops`.

    Returns:
        The name for a config's `_attn_implementation`: qwen2_ascend_npu, qwen2_ascend_torch, or
        qwen2_ascend_unfused where attention is one of `plain`.

    Raises:
        UserError: the backend or transformers' interface is not there.
    """
    try:
        interface, masks = transformers.AttentionInterface, transformers.AttentionMaskInterface
    except AttributeError as error:
        raise UserError(
            f"transformers has no attention interface ({error}); 4.53 and later do."
        ) from None
    name = f"qwen2_ascend_{'unfused' if 'attention' in plain else backend}"
    interface.register(name, partial(_attend, get_ops(backend, plain=plain).attention))
    masks.register(name, _no_mask)
    return name


def _no_mask(*_: Any, attention_mask: torch.Tensor | None = None, **__: Any) -> None:
    """What transformers hands to `_attend`; it is causal, and `ends` say the rest."""
    assert attention_mask is None, "padding comes after the documents, which are causal: no mask"


def _attend(
    attention: Callable[..., torch.Tensor],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    ends: Sequence[int] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function as transformers calls it.

    Args:
        attention: of `ops`.
        module: the layer.
        query: `[b, np, s, hn]`.
        key: `[b, ng, s, hn]`.
        value: `[b, ng, s, hn]`.
        attention_mask: None.
        scaling: what the scores are multiplied by.
        dropout: share of the attention weights to drop.
        sliding_window: None.
        ends: where documents end, as `ops.attention` has it.

    Returns:
        `[b, s, np, hn]`, and no weights.
    """
    assert attention_mask is None
    assert sliding_window is None, "Qwen2Config refuses sliding windows"
    b, heads, s, width = query.shape
    q, k, v = (x.permute(2, 0, 1, 3) for x in (query, key, value))
    context = attention(q, k, v, softmax_scale=scaling, dropout_p=dropout, ends=ends)
    return context.view(s, b, heads, width).transpose(0, 1), None
