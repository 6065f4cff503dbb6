"""What a launcher does, in stages; each imports what the ones before it do without.

    command.py     reads the flags, and answers --help
    launch.py      rank 0 opens what they name and checks all of it; --plan ends here
    start.py       the ranks meet, compare their plans and start the runtime      torch
    pretrain.py    data, model and training, by setup.py                          megatron-core

So a mistake ends the run at once, and megatron-core is imported after it has been redirected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.data.blends import check_pretraining_data
from qwen2_ascend.errors import DamagedError, Faults, raise_if
from qwen2_ascend.machine import rank
from qwen2_ascend.training.length import RunLength
from qwen2_ascend.training.plan import Found, RunPlan, make_plan
from qwen2_ascend.training.planned import planned, refuse_without_devices
from qwen2_ascend.training.settings import PretrainSettings, TrainingSettings, validate

if TYPE_CHECKING:
    from qwen2_ascend.runtime import Runtime

S = TypeVar("S", bound=TrainingSettings)


def pretrain(settings: PretrainSettings) -> None:
    """Trains as `settings` say, as one rank of torchrun's or as a process alone.

    Raises:
        UserError: settings, data or checkpoint are not as they have to be.
        NonFiniteError: the loss or the gradient norm is not finite, and that is to end the run.
    """
    launch(settings, make_plan, validate, check_data, _train)


def check_data(settings: PretrainSettings) -> None:
    """What can be said of the data before there is a process group.

    Raises:
        UserError: every fault at once.
    """
    data = settings.data
    check_pretraining_data(
        data_path=data.data_path,
        train_data_path=data.train_data_path,
        valid_data_path=data.valid_data_path,
        split=data.split,
    )


def _train(plan: RunPlan[PretrainSettings], runtime: Runtime) -> None:
    from qwen2_ascend.training.pretrain import train  # megatron-core, after the start

    train(plan, runtime)


def launch(
    settings: S,
    make: Callable[[S, Found | None], RunPlan[S]],
    check: Callable[[S, Qwen2Config, int, RunLength | None], None],
    check_data: Callable[[S], None],
    train: Callable[[RunPlan[S], Runtime], None],
) -> None:
    """Plans a run, starts it and trains; with --plan it prints figures instead, on rank 0.

    Where the checkpoint to go on from proves damaged, it goes on from the one before.

    Args:
        settings: all flags.
        make: opens what they name, as `make_plan` does.
        check: the rules between them, of a model, a number of ranks and where the run is.
        check_data: what can be said of the data before there is a process group.
        train: does the rest; it raises DamagedError on all ranks or on none.

    Raises:
        UserError: settings, data or checkpoint are not as they have to be; every fault at once,
            and those that rank 0 finds before any rank waits for another.
        DamagedError: there is no sound checkpoint.
    """
    if settings.report.plan is not None:
        _print_plan(settings, settings.report.plan, make, check)
        return
    own = checked_plan(settings, make, check, check_data)
    from qwen2_ascend.training import start  # torch, for which no mistake waits

    while True:
        try:
            return train(*start.begin(settings, make, own))
        except DamagedError as error:
            older = start.older(settings, error)
        settings = replace(settings, model=replace(settings.model, load=older))
        own = checked_plan(settings, make, check, check_data)


def checked_plan(
    settings: S,
    make: Callable[[S, Found | None], RunPlan[S]],
    check: Callable[[S, Qwen2Config, int, RunLength | None], None],
    check_data: Callable[[S], None],
) -> RunPlan[S] | None:
    """Rank 0's plan; None on the others, which wait for it.

    The arguments are those of `launch`.

    Raises:
        UserError: every fault at once.
    """
    if rank() != 0:
        return None

    def made() -> RunPlan[S]:
        plan = make(settings, None)
        length = RunLength(train_iters=0, global_batch_size=1, **plan.made())
        check(plan.settings, plan.config, plan.world_size, length)
        return plan

    faults = Faults()
    plan = faults.collect(made)
    faults.collect(partial(check_data, settings))
    raise_if(faults)
    return plan


def _print_plan(
    settings: S,
    num_devices: int,
    make: Callable[[S, Found | None], RunPlan[S]],
    check: Callable[[S, Qwen2Config, int, RunLength | None], None],
) -> None:
    """Prints what the planner says of the command on so many devices, on rank 0.

    Raises:
        UserError: the command would not start on so many devices, or cannot be planned.
    """
    refuse_without_devices(settings)
    if rank() == 0:
        plan = make(settings, None)
        check(plan.settings, plan.config, num_devices, None)
        print(planned(plan.settings, plan.config))
