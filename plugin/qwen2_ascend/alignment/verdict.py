"""Holds a record to transformers, on rank 0 and its CPU, and says what is found."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import transformers
from torch import Tensor

from qwen2_ascend.alignment import judge as judging
from qwen2_ascend.alignment.curve import reference_curve
from qwen2_ascend.alignment.judge import Between, Curve, Judgement, StepFinding
from qwen2_ascend.alignment.memory import give_memory_back
from qwen2_ascend.alignment.record import Record
from qwen2_ascend.alignment.reference import compute, load_model, widened
from qwen2_ascend.alignment.report import describe_verdict, print_report, write_files
from qwen2_ascend.alignment.settings import AlignSettings
from qwen2_ascend.checkpoint.readers.base import Source
from qwen2_ascend.dtypes import TORCH_DTYPES

logger = logging.getLogger(__name__)


def judge_both(
    settings: AlignSettings, source: Source, record: Record, other: Record | None
) -> tuple[Judgement, Between | None]:
    """This run's judgement and, of an earlier record, its own and the differences between the two.

    Their gradients are gone.
    """
    ours, between = judge(settings, source, record), None
    if other is not None:
        logger.info(f"compared with {settings.output.compare_with}")
        between = judging.compare_records(record, judge(settings, source, other))
        between = replace(between, other=_without_gradients(between.other))
    return _without_gradients(ours), between


def _without_gradients(judgement: Judgement) -> Judgement:
    return replace(judgement, record=replace(judgement.record, gradients={}))


def judge(settings: AlignSettings, source: Source, record: Record) -> Judgement:
    """Holds a record to transformers, on this process alone.

    Args:
        settings: for the factor and the reference's weights.
        source: the weights.
        record: a record of this run or another.
    """
    factor, precision = settings.checks.noise_factor, record.precision
    wide, (narrow, scale) = judging.wide_dtype(precision), judging.noise_dtype(precision)
    logger.info(f"subject: {record.origin}")
    logger.info(
        f"reference: transformers {transformers.__version__} in {wide}; noise: it in {narrow}"
    )
    model = load_model(source, settings.model.reference_model, TORCH_DTYPES[narrow])
    with_gradients = bool(record.gradients)
    noisy = compute(model, record.tokens, with_gradients=with_gradients)
    findings = judging.judge_sublayers(record, model, factor)
    gradients = {}

    def judge_gradient(name: str, exact: Tensor) -> None:
        noise = noisy.gradients.pop(name)
        gradients[name] = judging.judge_gradient(record, name, exact, noise, factor)

    model = widened(model, TORCH_DTYPES[wide])
    give_memory_back()
    exact = compute(model, record.tokens, with_gradients=with_gradients, take=judge_gradient)
    return judging.Judgement(
        record=record,
        wide=wide,
        noise_factor=factor,
        findings=tuple(judging.with_totals(findings, record, exact, noisy)),
        gradients=tuple(gradients[name] for name in record.gradients),
        loss=exact.loss,
        loss_noise=abs(noisy.loss - exact.loss) * scale,
        logits=judging.logits_summary(record, exact),
    )


def judge_curve(
    settings: AlignSettings, source: Source, curve: Curve, tokens: Tensor
) -> list[StepFinding]:
    """Holds this run's training steps to transformers', in the wider dtype and in this run's.

    Args:
        settings: the optimizer, the reference's weights.
        source: the weights.
        curve: losses and gradient norms.
        tokens: `[steps, n, b, s + 1]`.
    """
    folder, checks, precision = settings.model.reference_model, settings.checks, settings.precision
    dtype = TORCH_DTYPES[precision]
    model = widened(load_model(source, folder, dtype), TORCH_DTYPES[judging.wide_dtype(precision)])
    give_memory_back()
    exact = reference_curve(model, model, tokens, checks)
    del model
    give_memory_back()
    narrow = load_model(source, folder, dtype)
    # what Megatron's main weights begin with is the rounded weights
    main = narrow if precision == "fp32" else load_model(source, folder, dtype).float()
    noisy = reference_curve(narrow, main, tokens, checks)
    return judging.judge_steps(curve, exact, noisy, precision, checks.noise_factor)


def report(judgement: Judgement, between: Between | None, files: Mapping[str, Path]) -> bool:
    """Says what is found, writes `files`, and gives whether all agrees.

    Raises:
        OSError: a file cannot be written.
    """
    print_report(judgement, between)
    write_files(judgement, between, files)
    for line in describe_verdict(judgement, between).splitlines():
        logger.info(line)
    return judgement.aligned and (between is None or between.other.aligned)
