"""What `launch/align_qwen2.py` runs, from the command line to the verdict.

The model runs first, at its layout and on its device, and is recorded; then the other ranks are
done, and rank 0 holds the record to transformers on the CPU. Imports of torch wait until the
settings are known to be right.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2_ascend import runtime as runtimes
from qwen2_ascend.alignment.settings import AlignSettings, parse, validate
from qwen2_ascend.checkpoint.source import open_source
from qwen2_ascend.cli import EXIT_FAILURE
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.inference.opening import config_folder
from qwen2_ascend.inference.tokenizer import Tokenizer
from qwen2_ascend.launching import launched, silence_foreign_warnings
from qwen2_ascend.machine import num_cores, world_size
from qwen2_ascend.training.settings import megatron_arguments

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2_ascend.alignment.judge import Between, Curve, Judgement, StepFinding
    from qwen2_ascend.alignment.record import Record
    from qwen2_ascend.alignment.subject import Plant
    from qwen2_ascend.checkpoint.readers.base import Source
    from qwen2_ascend.runtime import Runtime

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `launch/align_qwen2.py`.

    Args:
        arguments: the flags; sys.argv's without it.

    Returns:
        0 where both sides agree, 1 where they differ; else as `launched` has it.
    """
    verdicts = []
    status = launched(lambda: verdicts.append(align(parse(arguments))))
    return status or (EXIT_FAILURE if False in verdicts else 0)


def align(settings: AlignSettings) -> bool:
    """Whether the model agrees with transformers; on other ranks than 0 always True.

    Raises:
        UserError: settings, checkpoint or dumps are not as they have to be.
    """
    source = open_source(settings.model.load, None, settings.model.config)
    validate(settings, source.config, world_size())

    silence_foreign_warnings()
    output = settings.output
    other = None if output.compare_with is None else _loaded(output.compare_with, source.config)
    if output.from_dump is not None:
        record, curve, tokens = _loaded(output.from_dump, source.config), None, None
        if other is not None and record.tokens.tolist() != other.tokens.tolist():
            raise UserError(
                "--from-dump and --compare-with hold runs on different tokens; make one of them "
                "again."
            )
    else:
        runtime = start(settings, source)
        tokens = make_tokens(settings, source, other)
        record, curve = run_subject(settings, source, runtime, tokens)
        runtime.close()
        if record is None:
            return True
        if output.dump is not None:
            from qwen2_ascend.alignment.record import save_record

            save_record(record, output.dump)
            logger.info(f"dump: {output.dump}")
        if output.dump_only:
            return True
        _give_memory_back()  # the model is done with
        if runtime.world_size > 1:  # torchrun gave each process one thread; the others are done
            import torch

            torch.set_num_threads(num_cores())
    from qwen2_ascend.alignment.report import describe_verdict, print_report, write_files

    judgement, between = judge_both(settings, source, record, other)
    del record, other  # with their gradients: the curve needs the room
    if curve is not None and tokens is not None:
        steps = judge_curve(settings, source, curve, tokens)
        judgement = replace(judgement, steps=tuple(steps))
    print_report(judgement, between)
    write_files(judgement, between, output.files())
    for line in describe_verdict(judgement, between).splitlines():
        logger.info(line)
    return judgement.aligned and (between is None or between.other.aligned)


def start(settings: AlignSettings, source: Source) -> Runtime:
    """The device and the process groups of the layout.

    Raises:
        UserError: the device or the number of processes does not do.
    """
    training = settings.training()
    runtime = runtimes.start(
        None if settings.machine.device == "auto" else settings.machine.device,
        mindspeed=training.runtime.wants_mindspeed(),
        timeout_seconds=60 * settings.parallel.distributed_timeout_minutes,
        deterministic=settings.machine.deterministic,
        megatron_arguments=megatron_arguments(training),
    )
    raise_if(settings.fusion.faults(runtime.name))
    if settings.precision == "fp64" and runtime.name == "npu":
        raise UserError("--precision fp64: an NPU's operators have no fp64; use --device cpu.")
    for note in runtime.notes:
        logger.info(note)
    runtimes.initialize_model_parallel(training.layout(), source.config.num_layers)
    runtime.seed_all(settings.tokens.seed)
    return runtime


def make_tokens(settings: AlignSettings, source: Source, other: Record | None) -> Tensor:
    """`[steps, n, b, s + 1]`: the recorded step's, and those of --train-iters after it.

    Raises:
        UserError: the text has no tokens, or tokens that the model does not have.
    """
    import torch

    vocabulary = source.config.vocab_size
    shape = (max(settings.checks.train_iters, 1), *settings.token_shape)
    text = _text_tokens(settings, source)
    if text is not None:
        if len(text) == 0 or int(text.max()) >= vocabulary:
            raise UserError(
                f"the text has {len(text)} token(s), the largest of them "
                f"{int(text.max()) if len(text) else '-'}, for a vocabulary of {vocabulary}; "
                "give the model's own tokenizer with --tokenizer-name-or-path, and a text."
            )
        size = torch.Size(shape).numel()
        tokens = text.repeat(-(-size // len(text)))[:size].view(shape)
    else:
        generator = torch.Generator().manual_seed(settings.tokens.seed)
        tokens = torch.randint(vocabulary, shape, generator=generator)
    if other is not None:
        if other.tokens.shape != tokens.shape[1:]:
            n, b, s = other.tokens.shape
            raise UserError(
                f"{settings.output.compare_with}: holds {n} micro-batch(es) of {b} sequence(s) of "
                f"{s - 1} tokens; say --seq-length {s - 1} --micro-batch-size {b} "
                f"--global-batch-size {n * b}."
            )
        tokens[0] = other.tokens
    return tokens


def _text_tokens(settings: AlignSettings, source: Source) -> Tensor | None:
    import torch

    tokens = settings.tokens
    text = tokens.prompt
    if tokens.prompt_file is not None:
        text = tokens.prompt_file.read_text(encoding="utf-8")
    if text is None:
        return None

    folder = tokens.tokenizer_name_or_path or config_folder(source)
    return torch.tensor(Tokenizer(folder).encode(text))


def run_subject(
    settings: AlignSettings,
    source: Source,
    runtime: Runtime,
    tokens: Tensor,
    plant: Plant | None = None,
) -> tuple[Record | None, Curve | None]:
    """The record (on rank 0) and, where asked for, the losses of training steps.

    Args:
        settings: what `validate` has checked.
        source: the weights.
        runtime: the started one, with the groups of the layout.
        tokens: `[steps, n, b, s + 1]`.
        plant: changes the loaded chunks, as tests do.
    """
    from qwen2_ascend.alignment import subject

    curve = None
    if settings.checks.train_iters:
        curve = subject.train(settings, source, runtime, tokens.flatten(0, 2), plant)
        _give_memory_back()  # weights, gradients and optimizer
    return subject.record(settings, source, runtime, tokens[0], plant), curve


def judge_both(
    settings: AlignSettings, source: Source, record: Record, other: Record | None
) -> tuple[Judgement, Between | None]:
    """This run's judgement and, of an earlier record, its own and the differences between the two.

    Their gradients are gone.
    """
    from qwen2_ascend.alignment.judge import compare_records

    ours, between = judge(settings, source, record), None
    if other is not None:
        logger.info(f"compared with {settings.output.compare_with}")
        between = compare_records(record, judge(settings, source, other))
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
    import transformers

    from qwen2_ascend.alignment import judge as judging
    from qwen2_ascend.alignment.reference import compute, load_model, widened
    from qwen2_ascend.dtypes import TORCH_DTYPES

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
    _give_memory_back()
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
    from qwen2_ascend.alignment import judge as judging
    from qwen2_ascend.alignment.curve import reference_curve
    from qwen2_ascend.alignment.reference import load_model, widened
    from qwen2_ascend.dtypes import TORCH_DTYPES

    folder, checks, precision = settings.model.reference_model, settings.checks, settings.precision
    dtype = TORCH_DTYPES[precision]
    model = widened(load_model(source, folder, dtype), TORCH_DTYPES[judging.wide_dtype(precision)])
    _give_memory_back()
    exact = reference_curve(model, model, tokens, checks)
    del model
    _give_memory_back()
    narrow = load_model(source, folder, dtype)
    # what Megatron's main weights begin with is the rounded weights
    main = narrow if precision == "fp32" else load_model(source, folder, dtype).float()
    noisy = reference_curve(narrow, main, tokens, checks)
    return judging.judge_steps(curve, exact, noisy, precision, checks.noise_factor)


def _loaded(folder: Path, config: Qwen2Config) -> Record:
    from qwen2_ascend.alignment.record import load_record

    record = load_record(folder)
    theirs, ours = record.config.to_hugging_face(), config.to_hugging_face()
    raise_if(
        f"{folder}: {k}={theirs.get(k)}, and the model of --load has {ours[k]}."
        for k in ours
        if k != "torch_dtype" and ours[k] != theirs.get(k)
    )
    return record


def _give_memory_back() -> None:
    """What Python's cycles and the C library's allocator still hold of what is done with.

    A wrapped model's parts hold each other, and glibc keeps freed blocks below 32 MB, which most of
    a small model's weights are.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc's
        trim(0)
