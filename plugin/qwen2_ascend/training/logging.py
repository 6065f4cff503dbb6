"""What a run says about itself: lines, a progress bar, metrics.jsonl, TensorBoard, a picture.

Rank 0 alone speaks. TFLOP/s counts the model's own arithmetic, as planning/flops.py says.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qwen2_ascend.figures import new_figure, png, report_faults, with_grid
from qwen2_ascend.files import write_file
from qwen2_ascend.log import log_above
from qwen2_ascend.progress import progress_bar
from qwen2_ascend.telemetry.energy import Energy, format_energy
from qwen2_ascend.telemetry.reporting import attempt
from qwen2_ascend.training.planned import Expected, against_the_plan

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
PICTURE_FILE = "loss.png"


class Step(NamedTuple):
    """One step, as the log wants it."""

    iteration: int
    consumed_samples: int
    loss: float
    grad_norm: float
    lr: float
    num_tokens: int
    """Tokens that have a loss."""
    seconds: float
    updated: bool
    loss_scale: float
    peak_memory_bytes: int | None
    """None where the figure would not be the device's."""
    metrics: Mapping[str, float] = {}
    """What the objective reports besides its loss, by the names in the log."""
    energy: Energy | None = None
    """The energy of the steps since the last that had one."""


class Reporter:
    """Collects steps and reports each interval.

    Args:
        train_iters: steps of the whole run.
        first_iteration: steps made before this run.
        log_interval: steps between two lines.
        tokens_per_step: tokens in a global batch.
        flops_per_step: of a global batch's arithmetic, or None for no TFLOP/s.
        world_size: devices, for TFLOP/s per device.
        report_dir: where metrics.jsonl and the picture go, or None.
        tensorboard_dir: where TensorBoard events go, or None.
        planned: what the planner predicts, which a line sets beside the first steps; or None.
        silent: log and write nothing (every rank but 0).
    """

    def __init__(
        self,
        *,
        train_iters: int,
        first_iteration: int,
        log_interval: int,
        tokens_per_step: int,
        flops_per_step: float | None,
        world_size: int,
        report_dir: Path | None = None,
        tensorboard_dir: Path | None = None,
        planned: Expected | None = None,
        silent: bool = False,
    ) -> None:
        self.train_iters = train_iters
        self.log_interval = log_interval
        self.tokens_per_step = tokens_per_step
        self.flops_per_step = flops_per_step
        self.world_size = world_size
        self.silent = silent
        self.report_dir = None if silent else report_dir
        self._bar: Any = None
        self._steps: list[Step] = []
        self._first = _FirstSteps(planned)
        self._tensorboard = None
        if silent:
            return
        self._bar = attempt("progress bar", progress_bar, train_iters, "step", first_iteration)
        log_above(self._bar)
        if tensorboard_dir:
            self._tensorboard = attempt(
                f"TensorBoard in {tensorboard_dir}",
                _tensorboard_writer,
                tensorboard_dir,
                first_iteration,
            )
        if self.report_dir:
            attempt(METRICS_FILE, _forget_after, self.report_dir / METRICS_FILE, first_iteration)

    def interrupt(self, line: str) -> None:
        """Reports the steps since the last line, then logs a line of another kind."""
        if not self.silent:
            self.flush()
            logger.info(line)

    def step(self, step: Step) -> None:
        """Takes a step; reports when it ends an interval or the run."""
        if self.silent:
            return
        self._steps.append(step)
        self._first.take(step)
        if self._bar is not None:
            attempt("progress bar", self._advance, step)
        if step.iteration % self.log_interval == 0 or step.iteration >= self.train_iters:
            self.flush()

    def flush(self) -> None:
        """Reports the steps since the last line."""
        if not self._steps:
            return
        metrics, names = self._metrics(), self._steps[-1].metrics
        self._steps.clear()
        logger.info(format_line(metrics, self.train_iters, names))
        self._write(metrics)
        if self._first.is_complete:
            self._log_what_was_planned()

    def validation(self, iteration: int, loss: float) -> None:
        """Reports a validation loss."""
        if self.silent:
            return
        perplexity = math.exp(min(loss, 20.0))
        logger.info(
            f"iteration {iteration}/{self.train_iters} | validation loss {loss:.4f} | "
            f"perplexity {perplexity:.4g}"
        )
        self._write({"iteration": iteration, "validation_loss": loss}, "validation")

    def close(self) -> None:
        """Reports what is left and draws the picture."""
        if self.silent:
            return
        self.flush()
        self._log_what_was_planned()
        log_above(None)
        if self._bar is not None:
            attempt("progress bar", self._bar.close)
            self._bar = None
        if self._tensorboard is not None:
            attempt("TensorBoard", self._tensorboard.close)
        if self.report_dir:
            files = (self.report_dir / METRICS_FILE, self.report_dir / PICTURE_FILE)
            attempt(f"{files[1]} is not drawn", draw_loss, *files)

    def _log_what_was_planned(self) -> None:
        if (line := self._first.line()) is not None:
            logger.info(line)

    def _metrics(self) -> dict[str, Any]:
        steps, last = self._steps, self._steps[-1]
        seconds = sum(step.seconds for step in steps) / len(steps)
        weights = [step.num_tokens for step in steps if math.isfinite(step.loss)]
        losses = [step.loss * step.num_tokens for step in steps if math.isfinite(step.loss)]
        loss = sum(losses) / sum(weights) if sum(weights) else last.loss
        return {
            "iteration": last.iteration,
            "consumed_samples": last.consumed_samples,
            "loss": loss,
            "grad_norm": last.grad_norm,
            "lr": last.lr,
            "tokens_per_second": self.tokens_per_step / seconds,
            "step_seconds": seconds,
            **self._figures_of_the_device(seconds),
            "loss_scale": last.loss_scale,
            "skipped": sum(not step.updated for step in steps),
            **{
                name: sum(step.metrics[name] for step in steps) / len(steps)
                for name in last.metrics
            },
        }

    def _figures_of_the_device(self, seconds: float) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        if self.flops_per_step is not None:
            rate = self.flops_per_step / seconds / self.world_size
            figures["tflops_per_device"] = rate / 1e12
        if (memory := self._steps[-1].peak_memory_bytes) is not None:
            figures["peak_memory_bytes"] = memory
        if (energy := self._steps[-1].energy) is not None:
            figures |= energy._asdict()
        return figures

    def _write(self, metrics: dict[str, Any], group: str = "train") -> None:
        if self.report_dir:
            file = self.report_dir / METRICS_FILE
            attempt(f"{file} is not complete", _append, file, metrics)
        if self._tensorboard is not None:
            attempt("TensorBoard", self._add_scalars, metrics, group)

    def _add_scalars(self, metrics: dict[str, Any], group: str) -> None:
        assert self._tensorboard is not None
        for name, value in metrics.items():
            if name != "iteration":
                label = f"{group}/{name.removeprefix(f'{group}_')}"
                self._tensorboard.add_scalar(label, value, metrics["iteration"])

    def _advance(self, step: Step) -> None:
        self._bar.update(1)
        self._bar.set_postfix_str(f"loss {step.loss:.4f}", refresh=False)


class _FirstSteps:
    """The first steps of a start but the very first, which compiles operators."""

    NUMBER = 4

    def __init__(self, planned: Expected | None) -> None:
        self._planned = planned
        self._seen: list[Step] = []

    @property
    def is_complete(self) -> bool:
        return len(self._seen) > self.NUMBER

    def take(self, step: Step) -> None:
        if self._planned is not None and not self.is_complete:
            self._seen.append(step)

    def line(self) -> str | None:
        """What they took beside what was planned, once; None where there is no such step."""
        steps, planned = self._seen[1:], self._planned
        if planned is None or not steps:
            return None
        self._planned = None
        seconds = statistics.median(step.seconds for step in steps)
        numbers = range(steps[0].iteration, steps[-1].iteration + 1)
        return against_the_plan(planned, numbers, seconds, steps[-1].peak_memory_bytes)


def format_line(metrics: dict[str, Any], train_iters: int, also: Iterable[str] = ()) -> str:
    """One interval in one line; `also` names metrics of the objective."""
    words = [
        f"iteration {metrics['iteration']}/{train_iters}",
        f"loss {metrics['loss']:.4f}",
        *(f"{name.replace('_', ' ')} {metrics[name]:.4f}" for name in also),
        f"grad norm {metrics['grad_norm']:.3f}",
        f"lr {metrics['lr']:.3e}",
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
    ]
    if "tflops_per_device" in metrics:
        words.append(f"{metrics['tflops_per_device']:.3g} TFLOP/s/device")
    words.append(f"{metrics['step_seconds']:.3f} s/step")
    if "peak_memory_bytes" in metrics:
        words.append(f"peak {metrics['peak_memory_bytes'] / 2**30:.2f} GiB")
    if "joules_per_token" in metrics:
        words.append(format_energy(Energy(*(metrics[name] for name in Energy._fields))))
    if metrics["loss_scale"] != 1.0:
        words.append(f"loss scale {metrics['loss_scale']:g}")
    if metrics["skipped"]:
        words.append(f"{metrics['skipped']} skipped")
    return " | ".join(words)


def draw_loss(metrics: Path, picture: Path) -> None:
    """Draws the losses and the learning rate that `metrics` holds; logs that, or why not."""
    if not metrics.is_file():
        return
    rows = [row for _, row in _rows(metrics)]
    training = [(row["iteration"], row["loss"], row["lr"]) for row in rows if row.get("loss")]
    validation = [
        (row["iteration"], row["validation_loss"]) for row in rows if row.get("validation_loss")
    ]
    if not training:
        return
    for fault in report_faults(picture.name, "matplotlib"):
        logger.info(f"not drawn: {fault}")
        return
    figure = new_figure(8, 5)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    iterations, losses, lrs = zip(*training, strict=True)
    marker = "o" if len(training) < 30 else None
    above.plot(iterations, losses, label="training", linewidth=1.5, marker=marker, markersize=3)
    if validation:
        above.plot(*zip(*validation, strict=True), label="validation", marker="o", markersize=4)
        above.legend(frameon=False)
    above.set_ylabel("loss (nats per token)")
    below.plot(iterations, lrs, color="tab:gray", linewidth=1.5)
    below.set_ylabel("learning rate")
    below.set_xlabel("iteration")
    below.set_ylim(bottom=0)
    with_grid(above, below)
    picture.write_bytes(png(figure))
    logger.info(f"loss curve: {picture}")


def _append(file: Path, metrics: Mapping[str, Any]) -> None:
    # JSON has no NaN: what is not finite is null
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
    line = json.dumps(plain, allow_nan=False) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as lines:
        if lines.tell() and not _ends_a_line(lines):
            lines.write(b"\n")  # a line that a full disk cut short
        lines.write(line.encode())


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _rows(metrics: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines and what they say; not those that were cut short by a kill or a full disk."""
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("iteration"), int):
                yield line, row


def _forget_after(metrics: Path, iteration: int) -> None:
    """Drops what an earlier run wrote beyond the checkpoint that this one goes on from."""
    if not metrics.is_file():
        return
    kept = [line for line, row in _rows(metrics) if row["iteration"] <= iteration]
    write_file(metrics, "".join(f"{line}\n" for line in kept).encode())


def _tensorboard_writer(folder: Path, first_iteration: int) -> Any:
    """What writes events, after which a reader drops those of an earlier run beyond the checkpoint
    that this one goes on from; None without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("--tensorboard-dir: tensorboard is not installed (pip: qwen2-ascend[report]).")
        return None
    return SummaryWriter(str(folder), purge_step=first_iteration + 1)
