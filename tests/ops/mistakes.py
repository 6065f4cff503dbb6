"""Calls of the operators that every implementation must refuse, each with its message.

torch_npu's host code lets most of them pass, so plain torch and the fused operators are both asked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qwen2_ascend.ops import Ops


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def attention(q=(6, 2, 4, 8), k=(6, 2, 2, 8), v=None, dtypes=(torch.float32,) * 3, **options):
    """A call of attention, right but for what is given."""
    shapes = (q, k, k if v is None else v)
    inputs = [zeros(*shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    return "attention", inputs, {"softmax_scale": 0.3, **options}


def cached(q=(1, 2, 4, 8), cache=(2, 2, 9, 8), values=None, **options):
    """A call of cached_attention, right but for what is given."""
    inputs = [zeros(*shape).half() for shape in (q, cache, values or cache)]
    return "cached_attention", inputs, {"softmax_scale": 0.3, "lengths": [4, 9], **options}


def rms_norm(x=(6, 2, 8), weight=(8,), dtype=torch.float32):
    return "rms_norm", [zeros(*x), zeros(*weight, dtype=dtype), 1e-6], {}


def rotary(x=(6, 2, 4, 8), cos=(6, 8), sin=None, dtype=torch.float32):
    tables = [zeros(*shape, dtype=dtype) for shape in (cos, sin or cos)]
    return "rotary", [zeros(*x), *tables], {}


Call = tuple[str, list, dict]
MISTAKES: dict[str, tuple[Call, str]] = {
    "query heads no multiple": (attention(q=(6, 2, 5, 8)), "np a multiple of ng"),
    "more groups than heads": (attention(q=(6, 2, 1, 8)), "np a multiple of ng"),
    "k shorter": (attention(k=(5, 2, 2, 8)), r"k \[5, 2, 2, 8\]"),
    "v wider": (attention(v=(6, 2, 2, 16)), r"v \[6, 2, 2, 16\]"),
    "v of other groups": (attention(v=(6, 2, 1, 8)), r"v \[6, 2, 1, 8\]"),
    "heads flattened": (attention(q=(6, 2, 32)), "q has 3 axes"),
    "k in another dtype": (
        attention(dtypes=(torch.float32, torch.bfloat16, torch.float32)),
        r"one dtype; got q torch.float32, k torch.bfloat16",
    ),
    "dropout of everything": (attention(dropout_p=1.0), "attention_dropout=1.0"),
    "negative dropout": (attention(dropout_p=-0.1), "attention_dropout=-0.1"),
    "leading zero": (attention(ends=(0, 6, 12)), "without the leading 0"),
    "ends that fall": (attention(ends=(6, 4, 12)), "they rise"),
    "an empty document": (attention(ends=(6, 6, 12)), "they rise"),
    "tokens left over": (attention(ends=(6, 11)), "to 12"),
    "more tokens than there are": (attention(ends=(6, 12, 18)), "to 12"),
    "no documents": (attention(ends=()), "to 12"),
    "a document over two rows": (attention(ends=(5, 8, 12)), "each row's end"),
    "ends on the device": (attention(ends=torch.tensor([6, 12])), "host numbers"),
    "cached heads": (cached(q=(1, 2, 5, 8)), "np a multiple of ng"),
    "a cache of other sequences": (cached(cache=(3, 2, 9, 8)), r"keys \[3, 2, 9, 8\]"),
    "values of another capacity": (cached(values=(2, 2, 8, 8)), r"values \[2, 2, 8, 8\]"),
    "more than the cache holds": (cached(lengths=[4, 10]), "capacity of 9"),
    "fewer keys than new tokens": (cached(q=(5, 2, 4, 8)), "5 newest"),
    "a length missing": (cached(lengths=[4]), "each of 2 sequence"),
    "a weight of another width": (rms_norm(weight=(4,)), r"is \[4\] and must be \[8\]"),
    "a weight that broadcasts": (rms_norm(weight=(1,)), r"is \[1\] and must be \[8\]"),
    "a weight in another dtype": (rms_norm(dtype=torch.bfloat16), "weight torch.bfloat16"),
    "half as wide tables": (rotary(cos=(6, 4)), r"cos \[6, 4\]"),
    "tables of one position": (rotary(cos=(1, 8)), r"cos \[1, 8\]"),
    "tables of other sequences": (rotary(cos=(6, 1, 8)), r"cos \[6, 1, 8\]"),
    "sin unlike cos": (rotary(sin=(6, 2, 8)), r"sin \[6, 2, 8\]"),
    "odd heads": (rotary(x=(6, 2, 4, 7), cos=(6, 7)), "hn even"),
    "tables in another dtype": (rotary(dtype=torch.bfloat16), "cos torch.bfloat16"),
    "odd gate and up": (("swiglu", [zeros(6, 2, 7)], {}), r"x \[6, 2, 7\]"),
}


def call(ops: Ops, wrong: Call, to: Callable[[torch.Tensor], torch.Tensor]) -> object:
    """Makes the call, with its tensors wherever `to` puts them."""
    name, inputs, options = wrong
    moved = [to(x) if isinstance(x, torch.Tensor) else x for x in inputs]
    return getattr(ops, name)(*moved, **options)
