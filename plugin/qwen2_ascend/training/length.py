"""RunLength: how many steps and samples a run has, counted from those it has made already."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RunLength:
    """The length of a run whose next step takes `global_batch_size` samples.

    A resumed run may take other batches than before, so a number of steps says how many samples
    were consumed only together with where the run is.
    """

    train_iters: int
    """Optimizer steps of the whole run."""
    global_batch_size: int
    """Samples in each step to come."""
    iteration: int = 0
    """Steps made already."""
    consumed_samples: int = 0
    """Samples taken in them."""

    def samples_at(self, iteration: int) -> int:
        """Samples that have been consumed after so many steps.

        The steps made already are taken to have been of one size.
        """
        if iteration >= self.iteration:
            return self.consumed_samples + (iteration - self.iteration) * self.global_batch_size
        return self.consumed_samples * iteration // self.iteration

    @property
    def num_samples(self) -> int:
        """Samples that the whole run takes."""
        return self.samples_at(self.train_iters)
