"""Runs that change tools: begun here, continued by megatron-core's own code, and the other way.

Nothing changes in the next losses. `megatron_core_files` writes and loads what is not ours.
"""

from __future__ import annotations

import functools
import random
import shutil
from pathlib import Path
from typing import Any

from distributed.harness import Checks, Run, main
from distributed.train_worker import FLAGS, LAYOUTS, save, settle, start, state_of, steps
from interop import megatron_core_files

CHECKS = Checks()

# torch's own loop over parameters is what megatron-core runs, and a checkpoint does not say
PLAIN = f"{FLAGS} --no-fused-adamw"

SAME = [
    # layout, format, how the distributed optimizer is kept in torch_dist, flags, tied
    ("tp1-pp1", "torch", "", "", False),
    ("tp1-pp1", "torch", "", "--bf16", True),
    ("tp1-pp1", "torch", "", "--fp16 --initial-loss-scale 4096", False),
    ("tp1-pp1", "torch_dist", "", "", False),
    ("tp1-pp1", "torch_dist", "", "--bf16", True),
    ("tp1-pp1", "torch_dist", "", "--fp16 --initial-loss-scale 4096", False),
    ("tp2", "torch", "", "--bf16", False),
    ("tp2", "torch_dist", "", "", True),
    ("pp2", "torch", "", "", True),
    ("pp2-vpp2", "torch", "", "--bf16", False),
    ("pp2", "torch_dist", "", "--bf16", True),
    ("dp2-distributed-optimizer", "torch", "", "--bf16", False),
    ("dp2-distributed-optimizer", "torch", "", "", True),
    ("dp2-distributed-optimizer", "torch_dist", "fully_reshardable", "--bf16", False),
    ("dp2-distributed-optimizer", "torch_dist", "fully_reshardable", "", True),
]
ONLY_THEIRS = [
    # megatron-core before 0.15 writes the first by default, and only it does
    ("dp2-distributed-optimizer", "torch_dist", "fully_sharded_model_space", "--bf16", False),
    ("tp2-pp2-vpp2-distributed-optimizer", "torch_dist", "fully_sharded_model_space", "", True),
    ("dp2-distributed-optimizer", "torch_dist", "dp_reshardable", "--bf16", False),
    ("dp2-distributed-optimizer", "torch_dist", "dp_reshardable", "", True),
    ("dp2-distributed-optimizer", "torch_dist", "dp_zero_gather_scatter", "--bf16", True),
    ("tp2-pp2-vpp2-distributed-optimizer", "torch_dist", "dp_reshardable", "--bf16", True),
    ("dp2-pp2-vpp2-distributed-optimizer", "torch", "", "--bf16", True),
]


def from_theirs(
    layout: str, form: str, sharding_type: str, flags: str, tied: bool, run: Run
) -> str:
    """What megatron-core wrote is resumed here: same state, same losses as without a break."""
    if not _has(sharding_type):
        return f"megatron-core's release has no {sharding_type}"
    flags = f"{PLAIN} {flags} {LAYOUTS[layout][1]}"
    writing = start(run, flags, tied)
    steps(writing, 2)
    settle(writing)
    folder = _folder(run, "theirs", layout, form, sharding_type, flags, tied)
    megatron_core_files.write(writing, folder, form, sharding_type)
    _give_config(run, folder, tied)
    drawn, state = _draw(), state_of(writing)
    through = steps(writing, 2)
    resumed = start(run, flags, load=folder)
    assert resumed.progress.iteration == 2 and resumed.progress.consumed_samples == 16
    assert _draw() == drawn, "the random number generators are not as they were"
    assert _changed(state, state_of(resumed)) == []
    return _equal(steps(resumed, 2), through)


def _has(sharding_type: str) -> bool:
    """Whether the installed megatron-core has this way of keeping a state."""
    from qwen2_ascend.runtime.megatron_compat import megatron_release

    new, old = ("dp_reshardable", "fully_reshardable"), ("fully_sharded_model_space",)
    return sharding_type not in (new if megatron_release() < (0, 14) else old)


def to_theirs(layout: str, form: str, sharding_type: str, flags: str, tied: bool, run: Run) -> str:
    """What is written here is loaded by megatron-core itself: same state, same losses."""
    from qwen2_ascend.runtime.megatron_compat import megatron_release

    if not _has(sharding_type):
        return f"megatron-core's release has no {sharding_type}"
    if layout == "pp2" and form == "torch_dist" and megatron_release() < (0, 13):
        return "later stages have other parameter groups than the first, whose are stored"
    flags = f"{PLAIN} {flags} {LAYOUTS[layout][1]}"
    folder = _folder(run, "ours", layout, form, sharding_type, flags, tied)
    writing = start(run, f"{flags} --ckpt-format {form} --save {folder}", tied)
    steps(writing, 2)
    settle(writing)
    save(writing)
    drawn, state = _draw(), state_of(writing)
    through = steps(writing, 2)
    loading = start(run, flags, tied)
    megatron_core_files.load(loading, folder, form)
    assert _draw() == drawn, "the random number generators are not as they were"
    assert _changed(state, state_of(loading)) == []
    return _equal(steps(loading, 2), through)


for _case in (*SAME, *ONLY_THEIRS):
    _layout, _form, _sharding, _flags, _tied = _case
    _words = [_layout, _form, _sharding, *_flags.split()[:1]]
    _name = "-".join(word.strip("-") for word in _words if word)
    for _direction in (from_theirs, to_theirs) if _case in SAME else (from_theirs,):
        CHECKS.add(world_size=LAYOUTS[_layout][0], name=f"{_direction.__name__}-{_name}")(
            functools.partial(_direction, *_case)
        )


def _folder(run: Run, *words: object) -> Path:
    return run.folder / str(abs(hash_of(words)))


def hash_of(words: tuple[object, ...]) -> int:
    """The same on every rank, which Python's own is not."""
    import xxhash

    return xxhash.xxh3_64_intdigest(repr(words).encode())


def _give_config(run: Run, folder: Path, tied: bool) -> None:
    """Megatron-LM writes no config.json; its user puts the model's there."""
    import torch

    if run.runtime.rank == 0:
        source = run.folder / ("tied" if tied else "untied") / "config.json"
        shutil.copy(source, folder / "config.json")
    torch.distributed.barrier()


def _draw() -> tuple[float, ...]:
    """A number of each generator, which is then as it was before."""
    import numpy as np
    import torch
    from megatron.core import tensor_parallel

    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    own = {name: value.clone() for name, value in tracker.get_states().items()}
    with tracker.fork():
        forked = torch.rand(()).item()
    drawn = random.random(), float(np.random.rand()), torch.rand(()).item(), forked
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    tracker.set_states(own)
    return drawn


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name in before if not (before[name] == after[name]).all()]


def _equal(found: list[Any], expected: list[Any]) -> str:
    """Both runs' losses, norms and rates, bit for bit."""
    for key in ("loss", "grad_norm", "lr"):
        pairs = [(getattr(a, key), getattr(b, key)) for a, b in zip(found, expected, strict=True)]
        assert all(a == b for a, b in pairs), (key, pairs)
    return f"losses {[result.loss for result in found]}"


if __name__ == "__main__":
    main(CHECKS)
