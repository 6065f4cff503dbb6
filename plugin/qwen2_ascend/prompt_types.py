"""MindSpeed-LLM's prompt types for the Qwen family, as Jinja chat templates (`--prompt-type`).

A prompt type says how the turns of a chat are written. MindSpeed-LLM keeps them as formats with
slots; here each is the same few facts, and `prompt_template` writes them as the Jinja text that
transformers takes everywhere a tokenizer's own template is taken: preprocessing, fine-tuning,
generation, and the folder of a fine-tuned model. The rules that all of them share:

- A system text is written once, in front. An empty one means the type's default.
- A user's turn ends with what the answer begins behind. So there is no generation prompt beside it.
- The separator stands before each user's turn but the first. So nothing follows the last answer.
- Turns of the user and of the assistant alternate, and a tool's answer stands for the user's turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qwen2_ascend.errors import UserError

PromptType = Literal[
    "alpaca",
    "chatml",
    "chatml_de",
    "deepseek2",
    "deepseek3",
    "default",
    "empty",
    "qwen",
    "qwen_lf",
    "qwen_math_r1",
    "qwen_r1",
    "trl",
]
"""The names that --prompt-type takes."""

HELPFUL = "You are a helpful assistant."
R1_TASK = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process and answer are enclosed within <think> </think> "
    "and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think>"
    "<answer> answer here </answer>Put your final answer within \\\\boxed{}. "
)
"""What qwen_r1 writes before each question; a model tuned with it expects every character."""
IM_END = "<|im_end|>"
SLOT = re.compile(r"(\{content\}|\{bos\}|\{eos\})")


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How one prompt type writes a chat; {content}, {bos} and {eos} are filled in."""

    user: str
    """A user's turn and what the answer begins behind."""
    tool: str | None = None
    """A tool's answer, likewise; as a user's turn when None."""
    assistant: str = "{content}{eos}"
    """An answer. The loss is on all of it."""
    system: str = "{content}"
    separator: str = ""
    prefix: str = ""
    default_system: str = ""
    eos: str | None = None
    """The token that ends an answer; the tokenizer's eos_token when None."""


def _chatml(*, asks: str = "{content}", default_system: str = "") -> PromptFormat:
    """Qwen's turns between <|im_start|> and <|im_end|>; `asks` is what is written of a question."""
    answer = "<|im_end|>\n<|im_start|>assistant\n"
    return PromptFormat(
        user=f"<|im_start|>user\n{asks}{answer}",
        tool=f"<|im_start|>tool\n{{content}}{answer}",
        system="<|im_start|>system\n{content}<|im_end|>\n",
        separator="\n",
        default_system=default_system,
        eos=IM_END,
    )


PROMPT_FORMATS: Mapping[str, PromptFormat] = {
    "alpaca": PromptFormat(
        user="### Instruction:\n{content}\n\n### Response:\n",
        separator="\n\n",
        default_system="Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n",
    ),
    "chatml": _chatml(),
    "chatml_de": _chatml(default_system="Du bist ein freundlicher und hilfsbereiter KI-Assistent."),
    "deepseek2": PromptFormat(
        user="User: {content}\n\nAssistant:", system="{content}\n\n", prefix="{bos}"
    ),
    "deepseek3": PromptFormat(user="<｜User｜>{content}<｜Assistant｜>", prefix="{bos}"),  # noqa: RUF001
    "default": PromptFormat(
        user="Human: {content}\nAssistant:", system="{content}\n", separator="\n"
    ),
    "empty": PromptFormat(user="{content}", assistant="{content}"),
    "qwen": _chatml(default_system=HELPFUL),
    "qwen_lf": PromptFormat(
        user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
        tool="<|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n",
        assistant="{content}<|im_end|>\n",
        system="<|im_start|>system\n{content}<|im_end|>\n",
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        eos=IM_END,
    ),
    "qwen_math_r1": _chatml(
        default_system="Please reason step by step, and put your final answer within \\boxed{}."
    ),
    "qwen_r1": _chatml(asks=R1_TASK + "{content}", default_system=HELPFUL),
    "trl": PromptFormat(user="{content}", assistant="{content}", prefix="{bos}"),
}
"""The formats by the name that --prompt-type takes."""


def prompt_template(name: str) -> str:
    """The Jinja chat template of a prompt type; `chat_template.render` takes it as `template`.

    A Python string literal is one of Jinja's too.

    Args:
        name: one of `PromptType`.
    """
    prompt = PROMPT_FORMATS[name]
    eos = "(eos_token or '<|endoftext|>')" if prompt.eos is None else repr(prompt.eos)
    said = "(message['content'] or '')"

    def write(slots: str, content: str) -> str:
        """A Jinja statement that writes a format."""
        values = {"{content}": content, "{bos}": "(bos_token or '')", "{eos}": eos}
        parts = [values.get(part) or repr(part) for part in SLOT.split(slots) if part]
        return "{{- " + " + ".join(parts) + " -}}" if parts else ""

    default = repr(prompt.default_system)
    return "\n".join(
        [
            f"{{%- set system, turns = {default}, messages -%}}",
            "{%- if messages and messages[0]['role'] == 'system' -%}",
            f"{{%- set system = messages[0]['content'] or {default} -%}}",
            "{%- set turns = messages[1:] -%}",
            "{%- endif -%}",
            write(prompt.prefix, ""),
            f"{{%- if system -%}}{write(prompt.system, 'system')}{{%- endif -%}}",
            "{%- for message in turns -%}",
            "{%- if (message['role'] == 'assistant') != (loop.index0 is odd) -%}",
            "{{- raise_exception('--prompt-type " + name + " writes turns of user and assistant "
            "that alternate; turn ' + loop.index|string + ' is of ' + message['role']) -}}",
            "{%- endif -%}",
            "{%- if loop.index0 and loop.index0 is even -%}",
            write(prompt.separator, ""),
            "{%- endif -%}",
            f"{{%- if message['role'] == 'user' -%}}{write(prompt.user, said)}",
            f"{{%- elif message['role'] == 'tool' -%}}{write(prompt.tool or prompt.user, said)}",
            f"{{%- elif message['role'] == 'assistant' -%}}{write(prompt.assistant, said)}",
            "{%- else -%}",
            "{{- raise_exception('--prompt-type " + name + " has no role ' + message['role']) -}}",
            "{%- endif -%}",
            "{%- endfor -%}",
        ]
    )


def check_tokenizer(name: str, tokenizer: Any) -> None:
    """Refuses a tokenizer that does not know the token which ends an answer.

    Its characters would be many tokens, and no model would learn to say them.

    Args:
        name: one of `PromptType`.
        tokenizer: transformers' tokenizer.

    Raises:
        UserError: it has no such token.
    """
    eos = PROMPT_FORMATS[name].eos
    if eos is None:
        return
    token = tokenizer.convert_tokens_to_ids(eos)
    if token is None or tokenizer.convert_ids_to_tokens(token) != eos:
        raise UserError(
            f"--prompt-type {name} ends answers with {eos}, which the tokenizer of "
            f"{tokenizer.name_or_path} does not have; take a prompt type of that model, or leave "
            "it out for its own chat template."
        )
