"""Training checkpoints: what a resumed run takes from them, and what it refuses."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from distributed.harness import Checks, Run, main
from distributed.train_worker import (
    FLAGS,
    LAYOUTS,
    assert_equal,
    save,
    settle,
    start,
    state_of,
    steps,
    track,
    train_and_save,
)

if TYPE_CHECKING:
    from qwen2_ascend.training.loop import TrainingRun

CHECKS = Checks()


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.mkdir, (self.mark,)


def in_the_generators(folder: Path, payload: Payload) -> None:
    """The check saves it as if it were the state of the random number generators."""


def in_the_metadata(folder: Path, payload: Payload) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(payload))


def in_the_common_part(folder: Path, payload: Payload) -> None:
    import torch

    torch.save({"args": payload}, folder / "common.pt")


def a_pickle_is_refused(poison: Callable[[Path, Payload], None], run: Run) -> str:
    """Nothing of a torch_dist folder is executed, whatever the installed megatron-core would do."""
    from qwen2_ascend.errors import UserError
    from qwen2_ascend.training import checkpointing

    folder, payload = run.folder / poison.__name__, Payload(run.folder / f"{poison.__name__}.ran")
    training = start(run, f"{FLAGS} --save {folder}")
    steps(training, 1)
    rng_state = checkpointing.rng_state
    if poison is in_the_generators:
        checkpointing.rng_state = lambda runtime: payload  # type: ignore[assignment]
    try:
        iteration = save(training)
    finally:
        checkpointing.rng_state = rng_state
    poison(iteration, payload)
    if poison is not in_the_generators:
        # else the file would be refused for its checksum already
        (iteration / "qwen2_ascend_manifest.json").unlink()
    with pytest.raises(UserError, match="Path") as caught:
        start(run, FLAGS, load=folder)
    assert not payload.mark.exists(), "executed"
    # what is left out is not even looked at
    if poison is in_the_generators:
        assert start(run, f"{FLAGS} --no-load-rng", load=folder).progress.iteration == 1
    return str(caught.value)


for _poison in (in_the_generators, in_the_metadata, in_the_common_part):
    CHECKS.case(f"refuses-a-pickle-{_poison.__name__}", 1, a_pickle_is_refused, _poison)


def sharded_state(training: TrainingRun) -> dict[str, Any]:
    """What megatron-core's model asks for: by chunk and name, parameters and extra states."""
    from qwen2_ascend.checkpoint.load import unwrap
    from qwen2_ascend.runtime.megatron_compat import virtual_stage

    found = {}
    for index, chunk in enumerate(training.chunks):
        with virtual_stage(index if len(training.chunks) > 1 else None):
            state = unwrap(chunk).sharded_state_dict(prefix="")
        found |= {f"{index}.{name}": value for name, value in state.items()}
    return found


@CHECKS.add(world_size=2)
def megatron_core_reads_what_every_rank_has_written(run: Run) -> str:
    """Its own dist_checkpointing, all that its model asks for, and Adam's moments besides.

    The arguments say how the run was laid out.
    """
    import torch
    from megatron.core import dist_checkpointing

    for layout in ("dp2-distributed-optimizer", "tp2", "pp2-vpp2"):
        folder = run.folder / f"for-megatron-{layout}"
        training = start(run, f"{FLAGS} {LAYOUTS[layout][1]} --save {folder}")
        steps(training, 2)
        iteration = save(training)
        expected = state_of(training)
        wanted = sharded_state(training)
        found = dist_checkpointing.load(dict(wanted), str(iteration))
        for name in wanted:
            if name.endswith("._extra_state"):
                assert found[name] is None, (layout, name)
            else:
                assert torch.equal(found[name], expected[name]), (layout, name)
        assert sum(name.endswith("._extra_state") for name in wanted) >= 8, layout
        check_arguments(found["args"], training)
        moments = {
            name: dataclasses.replace(tensor, key=f"optimizer.state.exp_avg.{tensor.key}")
            for name, tensor in sharded_state(training).items()
            if isinstance(tensor, dist_checkpointing.ShardedTensor)
        }
        assert len(moments) > 5
        found = dist_checkpointing.load(dict(moments), str(iteration))
        for name in moments:
            assert torch.equal(found[name], expected[f"{name}.exp_avg"]), (layout, name)
    return ""


def check_arguments(args: Any, training: TrainingRun) -> None:
    """What only a run knows of the arguments that other tools read."""
    batch, parallel = training.settings.batch, training.settings.parallel
    assert (args.iteration, args.consumed_train_samples) == (2, 2 * training.global_batch_size)
    assert (args.seq_length, args.micro_batch_size) == (batch.seq_length, batch.micro_batch_size)
    assert args.global_batch_size == training.global_batch_size
    assert args.use_distributed_optimizer is parallel.use_distributed_optimizer
    sizes = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
    assert args.world_size == 2 == sizes[0] * sizes[1] * args.data_parallel_size
    assert args.ckpt_format == "torch_dist"
    assert (args.no_save_optim, args.no_save_rng) == (False, False)


@CHECKS.add(world_size=4)
def every_rank_writes_its_share(run: Run) -> str:
    """Four data-parallel ranks, with and without the distributed optimizer."""
    import json

    for name, flags in (("plain", ""), ("distributed", "--use-distributed-optimizer")):
        folder = run.folder / f"shares-{name}"
        training = start(run, f"{FLAGS} --micro-batch-size 1 {flags} --save {folder}")
        steps(training, 1)
        iteration = save(training)
        if run.runtime.rank == 0:
            sizes = json.loads((iteration / "qwen2_ascend_manifest.json").read_bytes())["sizes"]
            assert sorted(sizes) == [f"__{rank}_0.distcp" for rank in range(4)]
            assert max(sizes.values()) < 1.1 * sum(sizes.values()) / 4, (name, sizes)
    return ""


@CHECKS.add(world_size=1)
def no_flipped_bit_is_taken(run: Run) -> str:
    """Whatever file it is in: refused in words, or what was saved comes back all the same."""
    import random
    import shutil

    from qwen2_ascend.errors import UserError

    refused = 0
    for form in ("torch_dist", "torch"):
        folder = run.folder / f"flips-{form}"
        training = start(run, f"{FLAGS} --ckpt-format {form} --save {folder}")
        steps(training, 1)
        iteration = save(training)
        expected = state_of(training)
        files = [path for path in folder.rglob("*") if path.is_file()]
        generator = random.Random(form)
        for number in range(40):
            path = files[number % len(files)]
            whole = path.read_bytes()
            spoilt = bytearray(whole)
            spoilt[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
            path.write_bytes(bytes(spoilt))
            try:
                again = start(run, f"{FLAGS} --ckpt-format {form}", load=folder)
            except UserError:
                refused += 1
            else:
                assert again.progress.iteration == 1, path
                assert_equal(expected, state_of(again))
            path.write_bytes(whole)
        shutil.rmtree(folder)
        assert iteration.name == "iter_0000001"
    assert refused > 60, refused
    return f"{refused} of 80 refused"


@CHECKS.add(world_size=2)
def a_disk_that_fails_on_one_rank_is_said_by_all(run: Run) -> str:
    """The run ends, or goes on without the checkpoint, as --on-save-failure says."""
    from qwen2_ascend.training import saving
    from qwen2_ascend.training.checkpointer import SaveError

    whole = saving.pwrite

    def full(fd: int, data: object, offset: int) -> None:
        raise OSError(28, "No space left on device")

    for policy in ("stop", "continue"):
        folder = run.folder / f"failing-{policy}"
        flags = f"{FLAGS} --use-distributed-optimizer --save {folder} --on-save-failure {policy}"
        training = start(run, flags)
        steps(training, 1)
        saving.pwrite = full if run.runtime.rank == 1 else whole
        try:
            save(training)
        except SaveError as error:
            assert policy == "stop" and "iteration 1" in str(error), error
        else:
            assert policy == "continue"
        finally:
            saving.pwrite = whole
        run.runtime.barrier()
        assert not list(folder.glob("*iter_*")), list(folder.iterdir())
        steps(training, 1)
        assert save(training).is_dir()
    return ""


@CHECKS.add(world_size=2)
def an_async_save_holds_the_step_it_was_asked_at(run: Run) -> str:
    """However slow the copy is: the next update waits for it, in every kind of optimizer."""
    import time

    from qwen2_ascend.training.saving import HostCopies

    class SlowCopies(HostCopies):
        def take(self, part: Any) -> Any:
            time.sleep(0.2 * (1 + run.runtime.rank))
            return super().take(part)

    kinds = {
        "fp32": "--use-distributed-optimizer --overlap-param-gather --overlap-grad-reduce",
        "bf16": "--bf16 --tensor-model-parallel-size 2 --ckpt-format torch",
    }
    logs = []
    for kind, flags in kinds.items():
        folder = run.folder / f"async-{kind}"
        training = start(run, f"{FLAGS} {flags} --async-save --save {folder} --save-interval 1")
        states = []

        def keep(*_: Any, of: TrainingRun = training, to: list[Any] = states) -> None:
            settle(of)
            to.append(state_of(of))

        train_and_save(training, keep, logs.append, SlowCopies())
        for iteration in (1, 2, len(states)):
            track(run, folder, iteration)
            resumed = start(run, f"{FLAGS} {flags}", load=folder)
            assert_equal(states[iteration - 1], state_of(resumed))
    return str(logs)


if __name__ == "__main__":
    main(CHECKS)
