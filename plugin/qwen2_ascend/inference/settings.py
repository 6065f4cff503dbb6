"""GenerateSettings: every flag of `launch/generate_qwen2.py`, and the rules between them.

The names are those of transformers' generate and Megatron's layout. The attribute docstrings are
the text of `--help`. Nothing here imports torch, so `--help` answers at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import tyro

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.flags import LAYOUT_SIZES, Flag, flag_of, layer_list, number_faults
from qwen2_ascend.inference.pasted import GENERATE_FLAGS
from qwen2_ascend.launching import parse_pasted
from qwen2_ascend.parallel import ParallelLayout, padded_vocab_size
from qwen2_ascend.pasted_flags import Pasted, Table, pasted_faults, pasted_notes
from qwen2_ascend.prompt_types import PromptType

Repeated = tyro.conf.UseAppendAction


@dataclass(frozen=True, kw_only=True)
class ServedModelSettings:
    """Which model, and how it is cut over the processes."""

    load: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """A Hugging Face folder, converted shards, or a training checkpoint; of a LoRA run too."""
    adapter: Annotated[Path | None, tyro.conf.arg(aliases=["--lora-load"], metavar="DIR")] = None
    """A PEFT adapter, or the folder that a LoRA run has saved, here or in MindSpeed-LLM, to merge
    into the weights while they are loaded."""
    lora_r: int | None = None
    """The adapter's rank; another one is refused."""
    lora_alpha: float | None = None
    """The adapter's alpha, likewise; MindSpeed-LLM's checkpoints may not say it."""
    lora_target_modules: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """The modules that the adapter is for, likewise."""
    config: Annotated[str | None, tyro.conf.arg(aliases=["--hf-cfg-dir"], metavar="DIR")] = None
    """Hugging Face folder with config.json and tokenizer, where --load has none."""
    tokenizer_name_or_path: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of the tokenizer; by default where config.json is."""
    prompt_type: PromptType | None = None
    """Write chats as MindSpeed-LLM's prompt type of that name, not as the tokenizer's chat template
    does."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are dealt to."""
    num_layer_list: Annotated[str | None, tyro.conf.arg(metavar="N,N,...")] = None
    """Layers of each pipeline stage when they are not equal, as in 6,8,8,6."""
    bf16: Flag = False
    """Compute in bf16; with none of the three, in the dtype that config.json says."""
    fp16: Flag = False
    """Compute in fp16."""
    fp32: Flag = False
    """Compute in fp32."""
    device: Literal["auto", "npu", "cuda", "cpu"] = "auto"
    """auto takes npu, else cuda, else cpu, and says which."""
    backend: Literal["auto", "npu", "torch"] = "auto"
    """Operators of the layers: torch_npu's fused ones, which auto takes on an NPU, or torch's."""
    mindspeed: Flag = False
    """Activate MindSpeed before megatron-core is imported."""
    distributed_timeout_minutes: float = 30.0
    """Minutes after which a collective that waits for a silent rank fails; a chat that waits longer
    for its user ends too."""

    @property
    def given_dtype(self) -> str | None:
        """What the flags say to compute in."""
        return next((name for name in ("bf16", "fp16", "fp32") if getattr(self, name)), None)

    def dtype(self, config: Qwen2Config) -> str:
        """What to compute in."""
        return self.given_dtype or config.dtype

    def notes(self, pasted: Pasted, table: Table, config: Qwen2Config) -> list[str]:
        """What of a pasted command line holds already, and what it leaves open, for the log."""
        notes, dtype = pasted_notes(pasted, table), self.dtype(config)
        if pasted and self.given_dtype is None and dtype != "fp32":
            notes.append(
                f"{dtype}, because config.json says it; MindSpeed-LLM computes in fp32 where "
                "neither --bf16 nor --fp16 is given; for that say --fp32"
            )
        return notes

    def layout(self) -> ParallelLayout:
        """How the model is cut.

        Raises:
            UserError: --num-layer-list is wrong.
        """
        return ParallelLayout(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            num_layer_list=layer_list(self.num_layer_list),
        )

    def faults(self, config: Qwen2Config, world_size: int) -> list[str]:
        """What is wrong with these, one sentence each."""
        faults = []
        if [self.bf16, self.fp16, self.fp32].count(True) > 1:
            faults.append("--bf16, --fp16 and --fp32: give one of them.")
        faults += number_faults(self, above_zero=("distributed_timeout_minutes",))
        if wrong := number_faults(self, at_least_one=LAYOUT_SIZES[:2]):
            return faults + wrong
        try:
            layout = self.layout()
            layout.check(config, padded_vocab_size(config, layout.tp, divisible_by=1))
        except UserError as error:
            return faults + list(error.faults)
        needed = layout.tp * layout.pp
        if world_size != needed:
            faults.append(
                f"{world_size} process(es) for tensor_model_parallel_size={layout.tp} times "
                f"pipeline_model_parallel_size={layout.pp}; start {needed}: "
                f"torchrun --nproc-per-node {needed}."
            )
        return faults


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """What is continued, and where the text goes."""

    prompt: Annotated[Repeated[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")] = ()
    """A text to continue; may be given several times."""
    prompt_file: Annotated[Path | None, tyro.conf.arg(metavar="JSONL")] = None
    """A file with {"prompt": ...} or {"messages": [...]} on each line."""
    output_file: Annotated[Path | None, tyro.conf.arg(metavar="JSONL")] = None
    """Write each line of --prompt-file there with its "response", in the same order; written as
    FILE.part until it is complete."""
    overwrite: Flag = False
    """Replace --output-file, and forget a .part of it."""
    resume: Flag = False
    """Go on with the .part that a stopped run has left."""
    chat: Flag = False
    """Talk: each line of the standard input is a message; /reset begins anew, /exit ends."""
    apply_chat_template: Flag = False
    """Give each prompt to the model as a user's message."""
    system_prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """The system's message; needs --chat, --apply-chat-template or "messages"."""
    batch_size: int = 8
    """Sequences that are worked on at once."""

    @property
    def num_sources(self) -> int:
        """Places that prompts are asked for from."""
        return (bool(self.prompt), self.prompt_file is not None, self.chat).count(True)


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How tokens are chosen. What is not given is taken from generation_config.json."""

    max_new_tokens: int | None = None
    """Tokens to add at most; 512, or up to the end of the context, where nobody says."""
    greedy: Annotated[Flag, tyro.conf.arg(aliases=["--no-do-sample"])] = False
    """Take the likeliest token."""
    do_sample: Flag = False
    """Draw tokens; --temperature, --top-k and --top-p imply it."""
    temperature: float | None = None
    """Logits are divided by it."""
    top_k: int | None = None
    """Draw from so many likeliest tokens; 0 from all."""
    top_p: float | None = None
    """Draw from the likeliest tokens whose probabilities sum to this."""
    repetition_penalty: float | None = None
    """A value above 1 makes tokens less likely that the text has already."""
    stop: Annotated[Repeated[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")] = ()
    """A string that ends the text, and is left out of it; may be given several times. Special
    tokens count as the text that the tokenizer has for them."""
    seed: int = 1234
    """Seed of the draws, which depend on the prompt's number and the position alone. What is drawn
    from does not quite: with another --batch-size bf16 and fp16 round otherwise, and a text may
    part from what it was where two tokens are as likely as a rounding apart."""


Task = Literal["greedy", "do_sample", "beam_search", "beam_search_with_sampling", "chat"]
ALL_TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True, kw_only=True)
class DemonstrationSettings:
    """What MindSpeed-LLM's inference.py does: it answers one question, and then it chats."""

    task: tuple[Task, ...] = ()
    """Answer "how are you?" greedily, by sampling, by a search with two beams or by that with
    sampling; or chat. A command line of MindSpeed-LLM's without --task and without a prompt does
    all of it."""
    hf_chat_template: Flag = False
    """With --task: write turns as the tokenizer's chat template does. Without this and without
    --prompt-type the texts stand one after the other as they are."""
    history_turns: int | None = None
    """Questions, with their answers, that the model still sees in a chat; by default 3 with --task
    chat, and all with --chat."""


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """Generate text with Qwen2 / Qwen2.5, one process per device.

    torchrun --nproc-per-node 2 launch/generate_qwen2.py --load Qwen2.5-7B-Instruct
    --tensor-model-parallel-size 2 --chat

    One process needs no torchrun: python launch/generate_qwen2.py --load DIR --prompt "def f(x):"
    """

    model: ServedModelSettings
    prompts: PromptSettings = field(default_factory=PromptSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    demonstration: DemonstrationSettings = field(default_factory=DemonstrationSettings)
    pasted: tyro.conf.Fixed[tyro.conf.Suppress[Pasted]] = ()
    """Flags of others' scripts beside these."""

    def tasks(self) -> tuple[Task, ...]:
        """Those of inference.py that are to be done; none where there are prompts of one's own."""
        if self.demonstration.task or not self.pasted or self.prompts.num_sources:
            return self.demonstration.task
        return ALL_TASKS


def parse(arguments: Sequence[str] | None = None) -> GenerateSettings:
    """The command line; on a fault it prints and exits with 2, printing on rank 0 only."""
    return parse_pasted(GenerateSettings, "generate_qwen2.py", arguments, GENERATE_FLAGS)


def validate(settings: GenerateSettings, config: Qwen2Config, world_size: int) -> None:
    """Checks all that can be checked without a tokenizer and before any process group exists.

    Raises:
        UserError: all faults at once.
    """
    faults = settings.model.faults(config, world_size)
    faults += sampling_faults(settings.sampling)
    faults += _prompt_faults(settings)
    faults += pasted_faults(settings.pasted, GENERATE_FLAGS, settings, config)
    raise_if(dict.fromkeys(faults))


class Number(NamedTuple):
    """What an option of generation may be, as a flag or in generation_config.json."""

    kind: type
    allows: Callable[[Any], bool]
    rule: str


def _is_positive(value: float) -> bool:
    return 0 < value < math.inf


NUMBERS = {
    "max_new_tokens": Number(int, lambda v: v >= 1, "must be at least 1"),
    "max_length": Number(int, lambda v: v >= 1, "must be at least 1"),
    "temperature": Number(
        float,
        _is_positive,
        "must be above zero and finite; for the likeliest token say --greedy",
    ),
    "repetition_penalty": Number(float, _is_positive, "must be above zero and finite; 1 is none"),
    "top_k": Number(int, lambda v: v >= 0, "must not be below zero; 0 draws from all"),
    "top_p": Number(float, lambda v: 0 < v <= 1, "must be above 0 and at most 1"),
    "min_p": Number(float, lambda v: 0 <= v <= 1, "must be from 0 to 1"),
    "typical_p": Number(float, lambda v: 0 < v <= 1, "must be above 0 and at most 1"),
    "epsilon_cutoff": Number(float, lambda v: 0 <= v < 1, "must be from 0 to below 1"),
    "eta_cutoff": Number(float, lambda v: 0 <= v < 1, "must be from 0 to below 1"),
    "encoder_repetition_penalty": Number(float, _is_positive, "must be above zero and finite"),
    "no_repeat_ngram_size": Number(int, lambda v: v >= 0, "must not be below zero"),
    "encoder_no_repeat_ngram_size": Number(int, lambda v: v >= 0, "must not be below zero"),
    "min_length": Number(int, lambda v: v >= 0, "must not be below zero"),
    "min_new_tokens": Number(int, lambda v: v >= 0, "must not be below zero"),
}


def sampling_faults(sampling: SamplingSettings) -> list[str]:
    """Values that no sampling can have, and flags that exclude each other."""
    faults = [
        f"{flag_of(name)} {value} {number.rule}."
        for name, number in NUMBERS.items()
        if (value := getattr(sampling, name, None)) is not None and not number.allows(value)
    ]
    if not 0 <= sampling.seed < 2**63:
        faults.append(f"--seed {sampling.seed} must be from 0 to below 2^63.")
    if "" in sampling.stop:
        faults.append("--stop '' would end every text at once; leave it out.")
    drawing = ("do_sample", "temperature", "top_k", "top_p")
    given = [name for name in drawing if getattr(sampling, name) not in (None, False)]
    if sampling.greedy and given:
        flags = ", ".join(map(flag_of, given))
        faults.append(f"--greedy draws nothing, so {flags} would have no effect; leave one out.")
    return faults


def _prompt_faults(settings: GenerateSettings) -> list[str]:
    prompts, tasks = settings.prompts, settings.tasks()
    faults = _task_faults(settings) if tasks else []
    if not tasks and prompts.num_sources != 1:
        faults.append("give one of --prompt, --prompt-file and --chat.")
    faults += number_faults(prompts, at_least_one=("batch_size",))
    if "" in prompts.prompt:
        faults.append("--prompt '' has nothing to continue.")
    output = prompts.output_file
    if output is None and (prompts.overwrite or prompts.resume):
        faults.append("--overwrite and --resume need --output-file.")
    if prompts.overwrite and prompts.resume:
        faults.append("--overwrite and --resume: give one of them.")
    if output is not None and prompts.chat:
        faults.append("--output-file is for prompts, not for --chat.")
    faults += _turn_faults(settings)
    templated = prompts.chat or prompts.apply_chat_template or prompts.prompt_file is not None
    if prompts.system_prompt is not None and not templated and not tasks:
        faults.append("--system-prompt needs --chat, --apply-chat-template or a --prompt-file.")
    if settings.model.prompt_type is not None and not templated and not tasks:
        faults.append("--prompt-type needs --chat, --apply-chat-template or a --prompt-file.")
    return faults


def _turn_faults(settings: GenerateSettings) -> list[str]:
    """Flags about turns that have no effect, or contradict each other."""
    prompts, wanted, faults = settings.prompts, settings.demonstration, []
    faults += number_faults(wanted, not_negative=("history_turns",))
    in_turns = prompts.chat or bool(settings.tasks())
    if wanted.history_turns is not None and not in_turns:
        faults.append("--history-turns needs --chat or --task chat; a prompt has no history.")
    if wanted.hf_chat_template and not (in_turns or prompts.apply_chat_template):
        faults.append(
            "--hf-chat-template needs --task; for prompts of your own say --apply-chat-template."
        )
    if wanted.hf_chat_template and settings.model.prompt_type is not None:
        faults.append("--hf-chat-template and --prompt-type: give one of them.")
    return faults


def _task_faults(settings: GenerateSettings) -> list[str]:
    """What does not go together with --task."""
    prompts, wanted, faults = settings.prompts, settings.demonstration, []
    if prompts.num_sources or prompts.apply_chat_template or prompts.output_file is not None:
        faults.append(
            "--task asks a question of its own; leave it out with --prompt, --prompt-file, --chat, "
            "--apply-chat-template and --output-file."
        )
    is_plain = not wanted.hf_chat_template and settings.model.prompt_type is None
    if prompts.system_prompt is not None and is_plain:
        faults.append("--system-prompt with --task needs --prompt-type or --hf-chat-template.")
    sampling = settings.sampling
    if sampling.greedy or sampling.do_sample:
        faults.append("--greedy and --do-sample: --task says it; leave them out.")
    return faults
