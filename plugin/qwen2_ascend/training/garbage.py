"""ManualCollection: when Python collects its garbage, where the settings say so (--manual-gc)."""

from __future__ import annotations

import gc

from qwen2_ascend.training.settings import RuntimeSettings


class ManualCollection:
    """Collects after chosen steps only, the same on all ranks, for the length of a `with` block.

    Python collects when enough objects were made, which is at another moment on every rank; each
    such stop is waited for by all of them. Without --manual-gc this does nothing.
    """

    def __init__(self, settings: RuntimeSettings) -> None:
        self._is_on = settings.manual_gc
        self._interval = settings.manual_gc_interval
        self._around_evaluation = settings.manual_gc and not settings.no_manual_gc_eval
        self._was_enabled = False

    def __enter__(self) -> ManualCollection:
        if self._is_on:
            self._was_enabled = gc.isenabled()
            gc.disable()
            gc.collect()
        return self

    def __exit__(self, *_: object) -> None:
        if self._was_enabled:
            gc.enable()

    def after_step(self, iteration: int, *, will_evaluate: bool) -> None:
        """Collects if `iteration` is one to collect after, or if the validation loss comes next."""
        is_due = self._is_on and self._interval and not iteration % self._interval
        if is_due or (will_evaluate and self._around_evaluation):
            gc.collect()

    def after_evaluation(self) -> None:
        """Collects what the measuring of the validation loss has left: the youngest objects."""
        if self._around_evaluation:
            gc.collect(generation=0)
