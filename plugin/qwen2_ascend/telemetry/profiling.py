"""Which steps of a run are recorded by a profiler, and when that is started and ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class StepProfiler:
    """Records the steps after the first `begin` of a run up to the `end`-th.

    Args:
        begin: steps of the run before the first that is recorded, as in --profile-step-start.
        end: steps of the run when recording ends.
        first_iteration: steps that were made before this process; a resumed run that is past
            `begin` records what is left.
        open_profiler: from the number of steps to `warmup` on, and of those that are `active`, to
            a profiler: `runtime.profiling.open_profiler`.
    """

    def __init__(
        self, begin: int, end: int, first_iteration: int, open_profiler: Callable[..., Any]
    ) -> None:
        self._begin = max(begin, first_iteration)
        self._end = end
        self._warmup = 1 if self._begin > first_iteration else 0
        self._open = open_profiler
        self._profiler: Any = None
        self.step_done(first_iteration)

    def step_done(self, iteration: int) -> None:
        """Takes note that so many steps of the run have been made."""
        if self._profiler is not None:
            self._ask("step")
            if iteration >= self._end:
                self.close()
        elif iteration == self._begin - self._warmup and self._begin < self._end:
            self._profiler = self._open(warmup=self._warmup, active=self._end - self._begin)
            self._ask("start")

    def close(self) -> None:
        """Ends the recording, and writes what was not yet written."""
        if self._profiler is not None:
            self._ask("stop")
            self._profiler = None

    def _ask(self, what: str) -> None:
        """Calls the profiler, and no more once it has failed."""
        profiler, self._profiler = self._profiler, None
        getattr(profiler, what)()
        self._profiler = profiler
