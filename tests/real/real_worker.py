"""Logits of a real checkpoint at TP2 PP2 and TP1 PP4, against those that transformers gave."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from distributed.harness import Checks, Run, main
from qwen2_ascend.parallel import ParallelLayout

RELATIVE_TOLERANCE = 1e-5
"""Share of the largest logit in fp32; transformers' eager and SDPA differ by about 1e-6."""

CHECKS = Checks()


def logits(source: str, tp: int, pp: int, run: Run) -> str:
    """Loads `source` (a folder in QWEN2_REAL_FOLDER) and compares with its `logits.npy`."""
    import numpy as np
    import torch
    from megatron.core import parallel_state

    from qwen2_ascend import runtime
    from qwen2_ascend.checkpoint.load import load_checkpoint_weights
    from qwen2_ascend.checkpoint.source import open_source
    from qwen2_ascend.model.build import build_model

    folder = Path(os.environ["QWEN2_REAL_FOLDER"])
    opened = open_source(folder / source)
    layout = ParallelLayout(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    runtime.initialize_model_parallel(layout, opened.config.num_layers)
    run.runtime.seed_all(1)
    vocabulary = opened.config.vocab_size
    model = build_model(opened.config, layout, dtype="fp32", perform_initialization=False)
    load_checkpoint_weights(
        model,
        opened,
        layout,
        padded_vocab_size=vocabulary,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_stage=parallel_state.get_pipeline_model_parallel_rank(),
    )
    found = _forward(model, torch.from_numpy(np.load(folder / "tokens.npy")))
    difference = torch.zeros(())
    scale = float("nan")
    if found is not None:
        expected = torch.from_numpy(np.load(folder / "logits.npy"))
        scale = expected.abs().max().item()
        difference = (found - expected).abs().max() / scale
    torch.distributed.all_reduce(difference, torch.distributed.ReduceOp.MAX)
    assert difference <= RELATIVE_TOLERANCE, f"logits differ by {difference:.1e} of {scale:.1f}"
    return f"{source} at TP{tp} PP{pp}: {difference:.1e} of the largest logit"


def _forward(model, tokens):
    """Logits `[b, s, vocabulary]` on the last stage, None elsewhere."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    seen = []

    def step(iterator, chunk):
        next(iterator)
        output = chunk(tokens, None, None)

        def keep(values):
            seen.append(gather_from_tensor_model_parallel_region(values))
            return values.sum(), {}

        return output, keep

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([0]),
            model=model,
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
        )
    return seen[0] if seen else None


for name, tp, pp in (("hf", 2, 2), ("tp2pp2", 2, 2), ("pp4", 1, 4)):
    CHECKS.add(world_size=4, name=f"{name}-at-tp{tp}-pp{pp}")(
        functools.partial(logits, name, tp, pp)
    )

if __name__ == "__main__":
    main(CHECKS)
