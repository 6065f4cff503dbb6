"""Generation from the command line to the exit status: what `launch/generate_qwen2.py` runs.

Imports of torch and megatron-core wait until the settings are known to be right. The log goes to
stderr, so that stdout has the texts only.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.inference.prompts import MOST_NAMED, OutputFile, Prompt, Terminal, read_prompts
from qwen2_ascend.inference.settings import (
    GenerateSettings,
    SamplingSettings,
    ServedModelSettings,
    parse,
    validate,
)
from qwen2_ascend.launching import launched, silence_foreign_warnings
from qwen2_ascend.vocabulary import unknown_tokens

if TYPE_CHECKING:
    from qwen2_ascend.checkpoint.formats.peft_adapter import PeftAdapter
    from qwen2_ascend.checkpoint.source import Source
    from qwen2_ascend.inference.engine import Engine
    from qwen2_ascend.inference.generation_config import Defaults
    from qwen2_ascend.inference.generator import Generator, Request
    from qwen2_ascend.inference.sampling import Sampling
    from qwen2_ascend.inference.tokenizer import Tokenizer
    from qwen2_ascend.runtime import Runtime

Say = Callable[[str], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `launch/generate_qwen2.py`; gives its exit status."""
    return launched(lambda: generate(parse(arguments)))


def generate(settings: GenerateSettings) -> None:
    """Generates as `settings` say, as one rank of torchrun's or as a process alone.

    Raises:
        UserError: settings, prompts or checkpoint are not as they have to be.
    """
    source = open_model(settings.model).source
    validate(settings, source.config, int(os.environ.get("WORLD_SIZE", "1")))
    prompts = [] if settings.prompts.chat else read_prompts(settings.prompts)
    output = _output_file(settings, prompts)

    from qwen2_ascend.inference.tokenizer import Tokenizer

    tokenizer = Tokenizer(tokenizer_folder(settings.model, source))
    text = _text_settings(settings, source, tokenizer, prompts)
    requests = _requests(prompts, tokenizer, source, text)
    text.check(requests, source.config.vocab_size)
    num_done = output.num_done if output else 0

    num_rows = 1 if settings.prompts.chat else min(settings.prompts.batch_size, len(requests))
    runtime, engine, say = start_engine(settings.model, source, num_rows=num_rows)
    for line in text.describe():
        say(line)
    generator = text.generator(engine, tokenizer)
    if settings.prompts.chat:
        from qwen2_ascend.inference.chat import chat

        chat(generator, tokenizer, settings, text.max_new_tokens)
    else:
        if num_done:
            say(f"{num_done} of {len(requests)} results are there already")
        _run(generator, requests[num_done:], prompts, output, runtime, say)
    runtime.close()


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """Weights, of which headers have been read."""

    source: Source
    adapter: PeftAdapter | None
    """To merge into them."""


def open_model(model: ServedModelSettings) -> OpenedModel:
    """Opens what --load and --adapter name; of a LoRA run its base model and its adapter.

    Raises:
        UserError: nothing usable is there.
    """
    from qwen2_ascend.checkpoint.formats.peft_adapter import open_adapter
    from qwen2_ascend.checkpoint.source import open_source
    from qwen2_ascend.finetuning.saved_lora import find_saved_lora

    load, adapter = model.load, model.adapter
    if (saved := find_saved_lora(load)) is not None:
        if adapter is not None:
            raise UserError(f"--adapter {adapter}: --load {load} is a LoRA run, which has its own.")
        load, adapter = saved.base, saved.folder
        if load is None or not load.exists():
            raise UserError(
                f"{saved.folder}: its base model was {load or 'random'}, which is not there; name "
                f"it with --load, and say --adapter {saved.folder}."
            )
    source = open_source(load, None, model.config)
    opened = None if adapter is None else open_adapter(adapter, source.config)
    return OpenedModel(source=source, adapter=opened)


def tokenizer_folder(model: ServedModelSettings, source: Source) -> Path:
    """Where the tokenizer is: what the flag says, or beside config.json."""
    return model.tokenizer_name_or_path or config_folder(source)


def config_folder(source: Source) -> Path:
    """Where config.json is."""
    return next(path.parent for path in source.side_files if path.name == "config.json")


def start_engine(
    model: ServedModelSettings, source: Source, *, num_rows: int
) -> tuple[Runtime, Engine, Say]:
    """The device, the process groups and the loaded model; and what prints the log.

    Raises:
        UserError: the device cannot be used or the weights do not fit.
    """
    from qwen2_ascend import runtime as runtimes

    silence_foreign_warnings()
    runtime = runtimes.start(
        None if model.device == "auto" else model.device,
        mindspeed=model.mindspeed,
        timeout_seconds=60 * model.distributed_timeout_minutes,
    )
    say = _say if runtime.rank == 0 else _say_nothing
    layout, dtype = model.layout(), model.dtype(source.config)
    backend = model.backend
    if backend == "auto":
        backend = "npu" if runtime.name == "npu" else "torch"
    say(f"{runtime.describe()}, TP{layout.tp} PP{layout.pp}, {dtype}, {backend} operators")
    runtimes.initialize_model_parallel(layout, source.config.num_layers)

    from qwen2_ascend.inference.engine import load_engine

    start = time.monotonic()
    adapter = open_model(model).adapter
    engine = load_engine(
        source,
        layout,
        dtype=dtype,
        backend=backend,
        num_rows=max(num_rows, 1),
        adapter=adapter,
        say=say,
    )
    merged = f" with the adapter in {adapter.folder}" if adapter else ""
    say(f"weights: {source.describe()}{merged}, loaded in {time.monotonic() - start:.1f} s")
    return runtime, engine, say


@dataclass(frozen=True, kw_only=True)
class _TextSettings:
    """What flags, generation_config.json and tokenizer together say about the texts."""

    settings: SamplingSettings
    defaults: Defaults
    sampling: Sampling
    eos_tokens: tuple[int, ...]
    said: str

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a text."""
        return (*self.settings.stop, *self.defaults.stop)

    def max_new_tokens(self, num_prompt_tokens: int) -> int:
        """Tokens to add at most to such a prompt."""
        return self.defaults.max_new_tokens(self.settings, num_prompt_tokens)

    def check(self, requests: Sequence[Request], vocab_size: int) -> None:
        """Tries the options that change logits.

        Raises:
            UserError: one has a value that cannot be used.
        """
        from qwen2_ascend.inference.sampling import Place

        prompt = requests[0].tokens if requests else [0]
        place = Place(prompt=prompt, max_new_tokens=1, eos_tokens=self.eos_tokens)
        self.defaults.check(self.sampling, place, vocab_size)

    def describe(self) -> Iterator[str]:
        """Lines for the log."""
        eos = ", ".join(map(str, self.eos_tokens)) or "none"
        words = self.sampling.describe()
        if self.sampling.do_sample:
            words += f", seed {self.settings.seed}"
        said = f" ({self.said})" if self.said else ""
        yield f"{words}{said}, {self.defaults.describe_length(self.settings)}, eos {eos}"
        if self.defaults.stop:
            yield f"texts end before the stop_strings of the model, {list(self.defaults.stop)}"
        if unused := self.defaults.unused():
            yield unused

    def generator(self, engine: Engine, tokenizer: Tokenizer) -> Generator:
        from qwen2_ascend.inference.generator import Generator

        return Generator(
            engine,
            decode=tokenizer.decode,
            eos_tokens=self.eos_tokens,
            sampling=self.sampling,
            stop=self.stop,
            special_tokens=tokenizer.special_tokens(),
            seed=self.settings.seed,
        )


def _text_settings(
    settings: GenerateSettings, source: Source, tokenizer: Tokenizer, prompts: Sequence[Prompt]
) -> _TextSettings:
    from qwen2_ascend.inference.generation_config import Defaults

    defaults = Defaults(config_folder(source))
    sampling, said = defaults.sampling(settings.sampling)
    eos = dict.fromkeys(defaults.eos_tokens)
    is_chat = settings.prompts.chat or any(prompt.is_chat for prompt in prompts)
    # of a model fine-tuned from a base one config.json may still name another
    if is_chat and (end_of_turn := tokenizer.end_of_turn()) is not None:
        eos[end_of_turn] = None
    return _TextSettings(
        settings=settings.sampling,
        defaults=defaults,
        sampling=sampling,
        eos_tokens=tuple(eos),
        said=said,
    )


def _output_file(settings: GenerateSettings, prompts: Sequence[Prompt]) -> OutputFile | None:
    wanted = settings.prompts
    if wanted.output_file is None:
        return None
    return OutputFile(wanted.output_file, prompts, overwrite=wanted.overwrite, resume=wanted.resume)


def _requests(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, source: Source, text: _TextSettings
) -> list[Request]:
    """The tokenized prompts.

    Raises:
        UserError: prompts that the chat template refuses or that leave no room; many at once.
    """
    from qwen2_ascend.inference.generator import Request

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
    if len(faults) > MOST_NAMED:
        faults[MOST_NAMED:] = [f"... and {len(faults) - MOST_NAMED} more prompts."]
    raise_if(faults)
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
    say: Say,
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
            result = {
                "response": done.text,
                "finish_reason": done.finish_reason,
                "num_prompt_tokens": lengths[done.index],
                "num_new_tokens": len(done.tokens),
            }
            output.add(done.index, result)
    if is_first and output is not None:
        output.close()
    seconds = time.monotonic() - start
    rate = num_tokens / seconds if seconds else 0.0
    say(f"{num_tokens} tokens in {seconds:.1f} s, {rate:.1f} tokens/s")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say_nothing(line: str) -> None:
    pass
