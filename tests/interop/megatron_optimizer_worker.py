"""Runs that change tools: begun here, continued by megatron-core's own code, and the other way.

Nothing changes in the next losses. `megatron_core_files` writes and loads what is not ours.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import random
import shutil
from pathlib import Path
from typing import Any

from distributed.harness import Checks, Run, main
from distributed.train_worker import FLAGS, LAYOUTS, save, settle, start, state_of, steps
from interop import megatron_core_files
from logs import logged_lines

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
    _advance()
    folder = _folder(run, "theirs", layout, form, sharding_type, flags, tied)
    megatron_core_files.write(writing, folder, form, sharding_type)
    _give_config(run, folder, run.folder / ("tied" if tied else "untied"))
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
    _advance()
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
        CHECKS.case(f"{_direction.__name__}-{_name}", LAYOUTS[_layout][0], _direction, *_case)


MOVED = [
    # from, to, format, sharding type, flags, how far losses may differ
    ("tp2", "pp2", "torch", "", "", 1e-6),
    ("pp2", "dp2-distributed-optimizer", "torch_dist", "", "--bf16", 2e-3),
    ("dp2-distributed-optimizer", "tp2-sp", "torch", "", "", 1e-6),
    ("dp2-distributed-optimizer", "pp2-vpp2", "torch_dist", "dp_reshardable", "", 1e-6),
]


def at_another_layout(
    before: str,
    after: str,
    form: str,
    sharding_type: str,
    flags: str,
    tolerance: float,
    run: Run,
) -> str:
    """What megatron-core wrote is resumed at a layout that it does not reshard to."""
    if not _has(sharding_type):
        return f"megatron-core's release has no {sharding_type}"
    writing = start(run, f"{PLAIN} {flags} {LAYOUTS[before][1]}", tied=True)
    steps(writing, 2)
    settle(writing)
    folder = _folder(run, "moved", before, after, form)
    megatron_core_files.write(writing, folder, form, sharding_type)
    _give_config(run, folder, run.folder / "tied")
    through = steps(writing, 2)
    resumed = steps(start(run, f"{PLAIN} {flags} {LAYOUTS[after][1]}", load=folder), 2)
    worst = max(abs(a.loss - b.loss) for a, b in zip(resumed, through, strict=True))
    assert worst <= tolerance, (resumed, through)
    return f"largest difference {worst:.1e}"


for _moved in MOVED:
    CHECKS.case(f"{_moved[0]}-to-{_moved[1]}-{_moved[2]}", 2, at_another_layout, *_moved)


@CHECKS.add(world_size=2)
def buckets_of_another_size(run: Run) -> str:
    """Several buckets, as --ddp-bucket-size makes them, of parameters that are padded in them."""
    from helpers import make_tiny_hugging_face_folder, tiny_config
    from qwen2_ascend.errors import UserError
    from qwen2_ascend.training import loop

    flags = f"{PLAIN} --bf16 {LAYOUTS['dp2-distributed-optimizer'][1]}"
    model = run.folder / "odd-sizes"
    if run.runtime.rank == 0:
        config = tiny_config(hidden_size=40, ffn_hidden_size=90)
        make_tiny_hugging_face_folder(model, config, dtype="bf16")
    run.runtime.barrier()
    whole, size = loop.DistributedDataParallelConfig, 12_001
    loop.DistributedDataParallelConfig = functools.partial(whole, bucket_size=size)
    try:
        writing = start(run, flags, load=model)
    finally:
        loop.DistributedDataParallelConfig = whole
    assert len(writing.optimizer.chained_optimizers[0].buffers[0].buckets) > 3
    steps(writing, 2)
    settle(writing)
    state = state_of(writing)
    kinds = [("torch", "", size), ("torch", "", None), ("torch_dist", "dp_reshardable", size)]
    kinds += [("torch_dist", "dp_reshardable", None), ("torch_dist", "fully_reshardable", size)]
    kinds, found = [kind for kind in kinds if _has(kind[1])], []
    for form, sharding_type, told in kinds:
        folder = _folder(run, "buckets", form, sharding_type, told)
        megatron_core_files.write(writing, folder, form, sharding_type, ddp_bucket_size=told)
        _give_config(run, folder, model)
    for form, sharding_type, told in kinds:
        folder = _folder(run, "buckets", form, sharding_type, told)
        try:
            resumed = state_of(start(run, flags, load=folder))
        except UserError as error:
            found.append(str(error))
            continue
        assert _changed(state, resumed) == [], (form, sharding_type, told)
        assert told == size, "a bucket size that was not the run's went unnoticed"
        found.append("")
    assert found[0] == "" and "args.ddp_bucket_size" in found[1], found
    if _has("dp_reshardable"):
        # the last is wrong already as megatron-core 0.16 writes it
        assert found[2] == "" and "elements" in found[3] and "--ckpt-format torch" in found[4]
    return str(found)


@CHECKS.add(world_size=1)
def the_flags_mean_what_they_mean_there(run: Run) -> str:
    """--finetune begins anew; --no-load-optim leaves out optimizer and schedule, and goes on."""
    from qwen2_ascend.training.optimizer import num_updates

    writing = start(run, PLAIN)
    steps(writing, 2)
    _advance()
    drawn = _draw()
    for form in ("torch", "torch_dist"):
        megatron_core_files.write(writing, _folder(run, "flags", form), form, "")
    for form in ("torch", "torch_dist"):
        folder = _folder(run, "flags", form)
        _give_config(run, folder, run.folder / "untied")
        fresh = start(run, f"{PLAIN} --finetune", load=folder)
        assert (fresh.progress.iteration, num_updates(fresh.optimizer)) == (0, 0)
        weights, _ = _started(run, f"{PLAIN} --no-load-optim", folder)
        assert weights.progress.iteration == 2 and weights.progress.consumed_samples == 16
        assert num_updates(weights.optimizer) == 0 and weights.schedule.num_steps == 0
        assert _draw() == drawn
        assert start(run, f"{PLAIN} --no-load-rng", load=folder).progress.iteration == 2
        assert _draw() != drawn
    return ""


@CHECKS.add(world_size=1)
def what_a_checkpoint_lacks_is_said(run: Run) -> str:
    """It goes on where it was, and what begins anew is in the log."""
    import torch

    writing = start(run, PLAIN)
    steps(writing, 2)
    folder = _folder(run, "lacks")
    megatron_core_files.write(writing, folder, "torch", "")
    _give_config(run, folder, run.folder / "untied")
    path = folder / "iter_0000002" / "mp_rank_00" / megatron_core_files.RANK_FILE
    state = torch.load(path, weights_only=False)
    for key in ("optimizer", "opt_param_scheduler", "rng_state"):
        del state[key]
        torch.save(state, path)
    resumed, lines = _started(run, PLAIN, folder)
    assert resumed.progress.iteration == 2 and resumed.schedule.num_steps == 16
    text = "\n".join(lines)
    assert "no optimizer state" in text and "schedule: the checkpoint has none" in text, text
    # without a sign of a run it is weights, as every converter writes them
    state["args"].consumed_train_samples = 0
    torch.save(state, path)
    assert start(run, PLAIN, load=folder).progress.iteration == 0
    return text


@CHECKS.add(world_size=1)
def what_cannot_be_resumed_is_refused(run: Run) -> str:
    """The refusal names the way out; the run never begins anew."""
    import torch

    from qwen2_ascend.errors import UserError

    writing = start(run, f"{PLAIN} --bf16")
    steps(writing, 1)
    folder = _folder(run, "refused")
    megatron_core_files.write(writing, folder, "torch", "")
    _give_config(run, folder, run.folder / "untied")
    path = folder / "iter_0000001" / "mp_rank_00" / megatron_core_files.RANK_FILE
    whole, found = path.read_bytes(), []
    for spoil, words in SPOILT:
        state = torch.load(path, weights_only=False)
        spoil(state)
        torch.save(state, path)
        try:
            start(run, f"{PLAIN} --bf16", load=folder)
        except UserError as error:
            found.append(str(error))
        else:
            raise AssertionError(f"resumed, though {words}")
        assert words in found[-1] and "--" in found[-1], (words, found[-1])
        path.write_bytes(whole)
    return "\n".join(found)


def _at(state: dict[str, Any], *path: Any) -> Any:
    return functools.reduce(operator.getitem, path, state)


def _forget(state: dict[str, Any], *path: Any) -> None:
    del _at(state, *path[:-1])[path[-1]]


def _put(state: dict[str, Any], value: Any, *path: Any) -> None:
    _at(state, *path[:-1])[path[-1]] = value


GROUPS, KIND = ("optimizer", "optimizer", "param_groups"), "param_state_sharding_type"
SPOILT = [
    (lambda state: _put(state, [state["optimizer"]] * 2, "optimizer"), "chained"),
    (lambda state: _forget(state, "iteration"), "lacks 'iteration'"),
    (lambda state: _forget(state, "optimizer", "optimizer", "state", 3), "lacks 3"),
    (lambda state: _forget(state, *GROUPS, 1), "parameters"),
    (lambda state: _at(state, *GROUPS, 0, "params").reverse(), "parameter group"),
    (lambda state: _put(state, "fsdp_dtensor", "optimizer", KIND), "fsdp_dtensor"),
    (lambda state: _forget(state, "rng_state", 0, "cuda_rng_state"), "cuda_rng_state"),
    (lambda state: _put(state, state["rng_state"][0], "rng_state"), "rng_state"),
    (lambda state: _put(state, None, "args"), "padded_vocab_size"),
]


def _started(run: Run, flags: str, load: Path) -> tuple[Any, list[str]]:
    """Starts as `start` does, and returns the lines that are logged, too."""
    from qwen2_ascend import runtime
    from qwen2_ascend.training.plan import make_plan
    from qwen2_ascend.training.pretrain import prepare
    from qwen2_ascend.training.settings import parse

    plan = make_plan(parse([*flags.split(), "--load", str(load)]))
    runtime.destroy_model_parallel()
    runtime.initialize_model_parallel(plan.layout, plan.config.num_layers)
    run.runtime.seed_all(plan.settings.runtime.seed)
    with logged_lines() as lines:
        return prepare(plan, run.runtime), lines


def _folder(run: Run, *words: object) -> Path:
    return run.folder / hashlib.sha256(repr(words).encode()).hexdigest()  # short, on all ranks


def _give_config(run: Run, folder: Path, model: Path) -> None:
    """Megatron-LM writes no config.json; its user puts the model's there."""
    import torch

    if run.runtime.rank == 0:
        shutil.copy(model / "config.json", folder / "config.json")
    torch.distributed.barrier()


def _advance() -> None:
    """Takes the generators away from where every run's seed puts them."""
    import numpy as np
    import torch
    from megatron.core import tensor_parallel

    with tensor_parallel.get_cuda_rng_tracker().fork():
        torch.rand(3)
    random.random(), np.random.rand(), torch.rand(3)


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
    """Compares both runs' losses, norms and rates, bit for bit."""
    for key in ("loss", "grad_norm", "lr"):
        pairs = [(getattr(a, key), getattr(b, key)) for a, b in zip(found, expected, strict=True)]
        assert all(a == b for a, b in pairs), (key, pairs)
    return f"losses {[result.loss for result in found]}"


if __name__ == "__main__":
    main(CHECKS)
