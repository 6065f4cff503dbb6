"""What watches a training run: its energy, and a profiler."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from qwen2_ascend.errors import UserError
from qwen2_ascend.runtime.profiling import open_profiler, profiler_fault
from qwen2_ascend.telemetry.energy import Energy
from qwen2_ascend.telemetry.profiling import StepProfiler
from qwen2_ascend.telemetry.reporting import attempt
from qwen2_ascend.telemetry.training_energy import EnergyLog

if TYPE_CHECKING:
    from qwen2_ascend.training.loop import TrainingRun

logger = logging.getLogger(__name__)


class Instruments:
    """Every rank has them, and calls the same methods in step.

    Args:
        run: begins at its progress.
        tokens_per_step: tokens that all ranks together read.

    Raises:
        UserError: steps are to be profiled on a device without a profiler.
    """

    def __init__(self, run: TrainingRun, tokens_per_step: int) -> None:
        self._run = run
        self._tokens = tokens_per_step
        is_to_train = run.progress.iteration < run.train_iters
        is_wanted = is_to_train and not run.settings.report.no_log_energy
        self._energy = EnergyLog.open(run.runtime) if is_wanted else None
        if self._energy is not None:
            self._energy.begin()
        self._profiler = _profiler(run)

    def step(self, seconds: float) -> Energy | None:
        """Takes a step that took `seconds` until now; figures where the log wants them."""
        end, run = time.monotonic(), self._run
        iteration, energy = run.progress.iteration, None
        if self._energy is not None:
            is_last = iteration >= run.train_iters
            is_due = is_last or iteration % run.settings.report.log_interval == 0
            energy = self._energy.step(
                end - seconds, end, self._tokens, is_due=is_due, is_last=is_last
            )
        if self._profiler is not None:
            attempt("profiling", self._profiler.step_done, iteration)
        return energy

    def finish(self) -> None:
        """Says what the run used, when it has ended as it should."""
        if self._energy is not None:
            self._energy.finish()

    def close(self) -> None:
        """Ends what is still watching, however the run ended."""
        if self._energy is not None:
            self._energy.close()
        if self._profiler is not None:
            attempt("profiling", self._profiler.close)


def _profiler(run: TrainingRun) -> StepProfiler | None:
    """None where this rank records nothing."""
    settings, first = run.settings.profile, run.progress.iteration
    window, folder = settings.window(), settings.folder(run.settings.checkpoint.save)
    if window is None or folder is None:
        return None
    begin, end = window
    if first >= end:
        logger.info(
            f"nothing is profiled: {first} steps have been made, and recording ends at {end}"
        )
        return None
    if fault := profiler_fault(run.runtime.name):
        raise UserError(fault)
    ranks = ", ".join(map(str, settings.profile_ranks))
    logger.info(f"profiling iterations {max(begin, first) + 1}-{end} on rank(s) {ranks}: {folder}")
    runtime = run.runtime
    if runtime.rank not in settings.profile_ranks:
        return None

    opened = partial(
        open_profiler,
        runtime.name,
        folder,
        f"rank{runtime.rank}",
        record_shapes=settings.profile_record_shapes,
        profile_memory=settings.profile_with_memory,
        with_stack=settings.profile_with_stack,
        level=settings.profile_level,
    )
    return attempt("profiling", StepProfiler, begin, end, first, opened)
