"""An alignment from its settings to the verdict.

The model runs first, at its layout and on its device, and is recorded; then the other ranks are
done, and rank 0 holds the record to transformers on the CPU. megatron-core is imported once the
runtime has started, and transformers for the verdict.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwen2_ascend import runtime as runtimes
from qwen2_ascend.alignment.memory import give_memory_back
from qwen2_ascend.alignment.record import Record, load_record, save_record
from qwen2_ascend.alignment.settings import AlignSettings, validate
from qwen2_ascend.checkpoint.readers.base import Source
from qwen2_ascend.checkpoint.source import open_source
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.inference.opening import config_folder
from qwen2_ascend.inference.tokenizer import Tokenizer
from qwen2_ascend.launching import silence_foreign_warnings
from qwen2_ascend.machine import num_cores, world_size
from qwen2_ascend.training.start import start_device

if TYPE_CHECKING:
    from qwen2_ascend.alignment.judge import Curve
    from qwen2_ascend.runtime import Runtime

logger = logging.getLogger(__name__)


def align(settings: AlignSettings) -> bool:
    """Whether the model agrees with transformers; on other ranks than 0 always True.

    Raises:
        UserError: settings, checkpoint or dumps are not as they have to be.
    """
    source = open_source(settings.model.load, None, settings.model.config)
    validate(settings, source.config, world_size())

    silence_foreign_warnings()
    output = settings.output
    other = None
    if output.compare_with is not None:
        other = _loaded(output.compare_with, source.config, settings)
    curve = tokens = None
    if output.from_dump is not None:
        record = _loaded(output.from_dump, source.config, settings)
        if other is not None and record.tokens.tolist() != other.tokens.tolist():
            raise UserError(
                "--from-dump and --compare-with hold runs on different tokens; make one of them "
                "again."
            )
    else:
        # before the process groups, which a refused text would leave behind
        tokens = make_tokens(settings, source, other)
        record, curve = _run(settings, source, tokens)
        if record is None:
            return True
        if output.dump is not None:
            save_record(record, output.dump)
            logger.info(f"dump: {output.dump}")
        if output.dump_only:
            return True
        give_memory_back()  # the model is done with
        if world_size() > 1:  # torchrun gave each process one thread; the others are done
            torch.set_num_threads(num_cores())

    from qwen2_ascend.alignment.verdict import judge_both, judge_curve, report  # transformers

    judgement, between = judge_both(settings, source, record, other)
    del record, other  # with their gradients: the curve needs the room
    if curve is not None and tokens is not None:
        steps = judge_curve(settings, source, curve, tokens)
        judgement = replace(judgement, steps=tuple(steps))
    return report(judgement, between, output.files())


def _run(
    settings: AlignSettings, source: Source, tokens: Tensor
) -> tuple[Record | None, Curve | None]:
    """What `run_subject` gives; the process groups are there while it runs."""
    runtime = start(settings, source)

    from qwen2_ascend.alignment.subject import run_subject  # with megatron-core

    found = run_subject(settings, source, runtime, tokens)
    runtime.close()
    return found


def start(settings: AlignSettings, source: Source) -> Runtime:
    """The device and the process groups of the layout.

    Raises:
        UserError: the device or the number of processes does not do.
    """
    training = settings.training()
    runtime = start_device(training)
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
    tokens = settings.tokens
    text = tokens.prompt
    if tokens.prompt_file is not None:
        text = tokens.prompt_file.read_text(encoding="utf-8")
    if text is None:
        return None

    folder = tokens.tokenizer_name_or_path or config_folder(source)
    return torch.tensor(Tokenizer(folder).encode(text))


def _loaded(folder: Path, config: Qwen2Config, settings: AlignSettings) -> Record:
    """What a run has dumped, as far as it is to be judged."""
    record = load_record(folder)
    if settings.checks.no_gradients:
        record = replace(record, gradients={})
    theirs, ours = record.config.to_hugging_face(), config.to_hugging_face()
    raise_if(
        f"{folder}: {k}={theirs.get(k)}, and the model of --load has {ours[k]}."
        for k in ours
        if k != "torch_dtype" and ours[k] != theirs.get(k)
    )
    return record
