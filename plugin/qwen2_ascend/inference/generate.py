"""Generation from its settings to the texts; `opening` starts the engine, with megatron-core."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import xxhash

from qwen2_ascend.checkpoint.readers.base import Source
from qwen2_ascend.checkpoint.sample import sample_of
from qwen2_ascend.errors import UserError, at_most, raise_if
from qwen2_ascend.inference.chat import Manner, chat
from qwen2_ascend.inference.demonstration import Demonstration
from qwen2_ascend.inference.generator import Generator, Request
from qwen2_ascend.inference.opening import (
    OpenedModel,
    config_folder,
    open_model,
    open_tokenizer,
    start_engine,
)
from qwen2_ascend.inference.pasted import GENERATE_FLAGS
from qwen2_ascend.inference.prompts import (
    MODEL,
    RESULTS,
    OutputFile,
    Prompt,
    Terminal,
    read_prompts,
)
from qwen2_ascend.inference.settings import GenerateSettings, validate
from qwen2_ascend.inference.text_settings import TextSettings, text_settings
from qwen2_ascend.inference.tokenizer import Tokenizer
from qwen2_ascend.machine import world_size
from qwen2_ascend.runtime import Runtime
from qwen2_ascend.vocabulary import unknown_tokens

logger = logging.getLogger(__name__)


def generate(settings: GenerateSettings) -> None:
    """Generates as `settings` say, as one rank of torchrun's or as a process alone.

    Raises:
        UserError: settings, prompts or checkpoint are not as they have to be.
    """
    opened = open_model(settings.model)
    validate(settings, opened.source.config, world_size())
    if settings.tasks():
        _demonstrate(settings, opened)
    elif settings.prompts.chat:
        _chat(settings, opened)
    else:
        _continue(settings, opened)


def _demonstrate(settings: GenerateSettings, opened: OpenedModel) -> None:
    """What MindSpeed-LLM's inference.py does."""
    source = opened.source
    tokenizer = open_tokenizer(settings.model, source)
    vocab_size = source.config.vocab_size
    demonstration = Demonstration(settings, config_folder(source), tokenizer, vocab_size)
    runtime, engine = start_engine(settings.model, opened, num_rows=1)
    _log(settings, source, demonstration.describe())
    demonstration.run(engine)
    runtime.close()


def _chat(settings: GenerateSettings, opened: OpenedModel) -> None:
    source = opened.source
    tokenizer = open_tokenizer(settings.model, source)
    text = text_settings(settings.sampling, config_folder(source), tokenizer, is_chat=True)
    text.check([], source.config.vocab_size)
    runtime, engine = start_engine(settings.model, opened, num_rows=1)
    _log(settings, source, text.describe())
    manner = Manner(
        tokenizer=tokenizer,
        system_prompt=settings.prompts.system_prompt,
        history_turns=settings.demonstration.history_turns,
    )
    chat(text.generator(engine, tokenizer), manner, text.max_new_tokens)
    runtime.close()


def _continue(settings: GenerateSettings, opened: OpenedModel) -> None:
    """Continues the prompts."""
    prompts = read_prompts(settings.prompts, settings.model.prompt_type)
    output = OutputFile(settings.prompts, prompts) if settings.prompts.output_file else None
    source = opened.source
    tokenizer = open_tokenizer(settings.model, source)
    is_chat = any(prompt.is_chat for prompt in prompts)
    text = text_settings(settings.sampling, config_folder(source), tokenizer, is_chat=is_chat)
    requests = _requests(prompts, tokenizer, source, text)
    text.check(requests, source.config.vocab_size)
    num_done = output.num_done if output else 0
    if output is not None:
        output.require_made_by(_made_by(settings, opened, text, requests))
        if output.is_complete and world_size() == 1:  # several ranks have to meet first
            logger.info(f"all {num_done} results are there already")
            output.open()
            output.close()
            return

    num_rows = min(settings.prompts.batch_size, len(requests))
    runtime, engine = start_engine(settings.model, opened, num_rows=num_rows)
    _log(settings, source, text.describe())
    if num_done:
        logger.info(f"{num_done} of {len(requests)} results are there already")
    generator = text.generator(engine, tokenizer)
    _run(generator, requests[num_done:], prompts, output, runtime)
    runtime.close()


def _made_by(
    settings: GenerateSettings,
    opened: OpenedModel,
    text: TextSettings,
    requests: Sequence[Request],
) -> dict[str, Any]:
    """What texts depend on besides the prompts, in plain values by the words for a message."""
    source, adapter, sampling = opened.source, opened.adapter, text.sampling
    said: dict[str, Any] = {MODEL: str(settings.model.load)}
    said["weights"] = sample_of(source.held)
    config = repr(replace(source.config, dtype="fp32"))  # that of the file says nothing
    said["config"] = xxhash.xxh3_64_hexdigest(config.encode())
    if adapter is not None:
        said["adapter"], said["LoRA"] = sample_of(adapter.held), adapter.lora.describe(None)
    said["dtype"] = settings.model.dtype(source.config)
    said["sampling"] = f"{'drawn' if sampling.do_sample else 'greedy'} {dict(sampling.options)}"
    if sampling.do_sample:
        said["seed"] = settings.sampling.seed
    said["length"] = text.defaults.describe_length(settings.sampling)
    said["stop"] = [*text.stop, *text.eos_tokens]
    # by the tokenizer and its chat template
    said["tokens of the first prompt"] = xxhash.xxh3_64_hexdigest(repr(requests[0].tokens).encode())
    return said


def _log(settings: GenerateSettings, source: Source, more: Iterable[str]) -> None:
    notes = settings.model.notes(settings.pasted, GENERATE_FLAGS, source.config)
    for line in (*notes, *more):
        logger.info(line)


def _requests(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, source: Source, text: TextSettings
) -> list[Request]:
    """The tokenized prompts.

    Raises:
        UserError: prompts that the chat template refuses or that leave no room; many at once.
    """
    context = source.config.max_position_embeddings
    requests, faults = [], []
    for index, prompt in enumerate(prompts):
        try:
            tokens = _encode(prompt, tokenizer)
        except UserError as error:
            faults += [f"{prompt.where}: {fault}" for fault in error.faults]
            continue
        if not tokens:
            faults.append(f"{prompt.where}: has no tokens to continue.")
        elif len(tokens) >= context:
            faults.append(
                f"{prompt.where}: has {len(tokens)} tokens, and the model's context "
                f"(max_position_embeddings) is {context}; shorten it, or raise that in the "
                "config, with YaRN rope scaling."
            )
        elif text.max_new_tokens(len(tokens)) < 1:
            faults.append(
                f"{prompt.where}: has {len(tokens)} tokens, and generation_config.json says "
                "max_length; say how many to add with --max-new-tokens."
            )
        if unknown := unknown_tokens(tokens, source.config.vocab_size):
            faults.append(f"{prompt.where}: {unknown}")
        room = min(text.max_new_tokens(len(tokens)), context - len(tokens))
        requests.append(Request(index=index, tokens=tokens, max_new_tokens=room))
    raise_if(at_most(faults))
    return requests


def _encode(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    if prompt.is_chat:
        tools = prompt.row.get("tools")
        return tokenizer.encode_chat(
            prompt.row["messages"], prompt.row.get("functions") if tools is None else tools
        )
    return tokenizer.encode(prompt.row["prompt"])


def _run(
    generator: Generator,
    requests: Sequence[Request],
    prompts: Sequence[Prompt],
    output: OutputFile | None,
    runtime: Runtime,
) -> None:
    """Continues the prompts; rank 0 shows or writes the texts."""
    terminal = None
    is_first = runtime.rank == 0
    if is_first and output is not None:
        output.open()
    elif is_first:
        terminal = Terminal(len(prompts))
    start, num_tokens = time.monotonic(), 0
    lengths = {request.index: len(request.tokens) for request in requests}
    for done in generator.run(requests, terminal.text if terminal else None):
        num_tokens += len(done.tokens)
        if terminal is not None:
            terminal.end(done.index)
        elif is_first and output is not None:
            new = (done.text, done.finish_reason, lengths[done.index], len(done.tokens))
            output.add(done.index, dict(zip(RESULTS, new, strict=True)))
    if is_first and output is not None:
        output.close()
    seconds = time.monotonic() - start
    rate = num_tokens / seconds if seconds else 0.0
    logger.info(f"{num_tokens} tokens in {seconds:.1f} s, {rate:.1f} tokens/s")
