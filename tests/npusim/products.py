"""What a layer at TP2 launches and exchanges, whole, by fused operators and in pieces.

    PYTHONPATH=tests python -m npusim.products           # the table of docs/benchmarks.md
    PYTHONPATH=tests python -m npusim.products --write   # goldens/products.json anew

A launch is one call of an aclnn operator, as in launches.py. Exchanges are calls to HCCL; what a
fused operator does inside is none.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npusim.run import on_cards
from qwen2_ascend import markdown

if TYPE_CHECKING:
    from npusim.simulator import Simulator
    from qwen2_ascend.runtime import Runtime

GOLDEN = Path(__file__).parent / "goldens" / "products.json"
FUSED = {"aclnnAllGatherMatmul", "aclnnMatmulReduceScatter"}
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "`--use-ascend-mc2`": {"use_ascend_mc2": True},
    "`--coc-parallel-num 4`": {"coc_parallel_num": 4},
}
SEQUENCE_PARALLEL = {"TP2 SP": True, "TP2": False}
CASES = [
    (cut, way)
    for cut, in_sequence in SEQUENCE_PARALLEL.items()
    for way, options in WAYS.items()
    if in_sequence or "use_ascend_mc2" not in options
]
WIDE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 64,
}
"""The narrowest layer whose products at TP2 the fused operators take: 256 columns each or more."""


def measure(runtime: Runtime, simulator: Simulator, cut: str, way: str) -> dict[str, Any]:
    """Launches, fused ones and exchanges of one bf16 layer, forward and backward."""
    import torch

    from helpers import tiny_config
    from npusim.cards import hccl_calls
    from npusim.launches import host_code
    from npusim.simulator import recording
    from qwen2_ascend import runtime as runtimes
    from qwen2_ascend.model.build import build_model
    from qwen2_ascend.parallel import ParallelLayout

    config = tiny_config(**{**WIDE, "num_layers": 1})
    layout, is_cut = ParallelLayout(tensor_model_parallel_size=2), SEQUENCE_PARALLEL[cut]
    runtimes.destroy_model_parallel()
    runtimes.initialize_model_parallel(layout, config.num_layers)
    runtime.seed_all(1)
    options = {"dtype": "bf16", "backend": "npu", "sequence_parallel": is_cut, **WAYS[way]}
    (model,) = build_model(config, layout, **options)
    model = model.to(runtime.device)
    length, batch = 16, 2
    table = model.rotary_pos_emb(length)
    shape = (length // (2 if is_cut else 1), batch, config.hidden_size)
    hidden, upstream = (torch.randn(shape).bfloat16().to(runtime.device) for _ in range(2))
    found: dict[str, Any] = {}
    with host_code(simulator):
        for _ in range(2):  # the second time masks and tables are there already
            model.zero_grad(set_to_none=True)
            leaf = hidden.clone().requires_grad_()
            for part in ("forward", "backward"):
                before = len(hccl_calls())
                with recording() as record:
                    if part == "forward":
                        output, _ = model.decoder.layers[0](leaf, None, rotary_pos_emb=table)
                    else:
                        output.backward(upstream)
                fused = [op for op in record.ops if op in FUSED]
                found[part] = {
                    "launches": len(record.ops),
                    "fused": fused,
                    # a fused operator's reference makes one call of its own
                    "exchanges": len(hccl_calls()) - before - len(fused),
                }
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    rows = []
    for name, parts in found.items():
        numbers = [parts[part][what] for what in ("launches", "exchanges") for part in parts]
        rows.append([*name.split(" | "), *map(str, numbers)])
    head = ("layout", "products", "forward", "backward", "exchanges forward", "backward")
    return markdown.table(head, rows)


def main() -> None:
    """Measures on two cards, and prints or writes."""
    parser = argparse.ArgumentParser(prog="npusim.products", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write goldens/products.json")
    parser.add_argument("--inside", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        _inside(options.inside)
        return
    found = on_cards(__file__, 2)
    if options.write:
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


def _inside(folder: Path) -> None:
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    from qwen2_ascend import runtime as runtimes

    runtime, simulator = runtimes.start("npu"), _get_current_dispatch_mode()
    found = {
        f"{cut} | {way}": measure(runtime, simulator, cut, way)  # type: ignore[arg-type]
        for cut, way in CASES
    }
    if runtime.rank == 0:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    runtime.close()


if __name__ == "__main__":
    main()
