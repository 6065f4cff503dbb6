"""Named prompt types: every character as MindSpeed-LLM writes it.

The expected texts are written out by hand, from what its formats say of each slot.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, get_args

import pytest
from transformers import PreTrainedTokenizerFast

from qwen2_ascend.chat_template import ChatError, end_of_turn, render
from qwen2_ascend.errors import UserError
from qwen2_ascend.prompt_types import PROMPT_FORMATS, PromptType, check_tokenizer, prompt_template

ONE = [("user", "Why?"), ("assistant", "So.")]
TWO = [*ONE, ("user", " And?\n"), ("assistant", "Yes.")]
QWEN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
WHY = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>"
AND = "<|im_start|>user\n And?\n<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n"
)
EXPECTED: dict[tuple[str, str], str] = {
    ("qwen", "one"): QWEN + WHY,
    ("qwen", "two"): f"{QWEN}{WHY}\n{AND}",
    ("qwen", "system"): f"<|im_start|>system\nBe brief.<|im_end|>\n{WHY}",
    ("qwen", "empty system"): QWEN + WHY,
    ("qwen", "tool"): QWEN
    + WHY
    + "\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>",
    ("qwen_lf", "two"): "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a "
    f"helpful assistant.<|im_end|>\n{WHY}\n{AND}\n",
    ("qwen_lf", "tool"): "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a "
    f"helpful assistant.<|im_end|>\n{WHY}\n<|im_start|>user\n<tool_response>\n4\n"
    "</tool_response><|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n",
    ("qwen_math_r1", "one"): "<|im_start|>system\nPlease reason step by step, and put your final "
    "answer within \\boxed{}.<|im_end|>\n" + WHY,
    ("chatml", "two"): f"{WHY}\n{AND}",
    ("chatml", "system"): f"<|im_start|>system\nBe brief.<|im_end|>\n{WHY}",
    ("chatml_de", "one"): "<|im_start|>system\nDu bist ein freundlicher und hilfsbereiter "
    f"KI-Assistent.<|im_end|>\n{WHY}",
    ("deepseek2", "two"): "<BOS>User: Why?\n\nAssistant:So.<EOS>User:  And?\n\n\nAssistant:Yes."
    "<EOS>",
    ("deepseek2", "system"): "<BOS>Be brief.\n\nUser: Why?\n\nAssistant:So.<EOS>",
    ("deepseek3", "two"): "<BOS><｜User｜>Why?<｜Assistant｜>So.<EOS>"  # noqa: RUF001
    "<｜User｜> And?\n<｜Assistant｜>Yes.<EOS>",  # noqa: RUF001
    ("deepseek3", "system"): "<BOS>Be brief.<｜User｜>Why?<｜Assistant｜>So.<EOS>",  # noqa: RUF001
    ("default", "two"): "Human: Why?\nAssistant:So.<EOS>\nHuman:  And?\n\nAssistant:Yes.<EOS>",
    ("default", "system"): "Be brief.\nHuman: Why?\nAssistant:So.<EOS>",
    ("empty", "two"): "Why?So. And?\nYes.",
    ("empty", "system"): "Be brief.Why?So.",
    ("trl", "one"): "<BOS>Why?So.",
    ("alpaca", "two"): f"{ALPACA}### Instruction:\nWhy?\n\n### Response:\nSo.<EOS>\n\n"
    "### Instruction:\n And?\n\n\n### Response:\nYes.<EOS>",
}
CHATS = {
    "one": ONE,
    "two": TWO,
    "system": [("system", "Be brief."), *ONE],
    "empty system": [("system", ""), *ONE],
    "tool": [*ONE, ("tool", "4"), ("assistant", "Four.")],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model = models.BPE(vocab={c: i for i, c in enumerate(sorted(alphabet))}, merges=[])
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<BOS>",
        eos_token="<EOS>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize("name, chat", EXPECTED)
def test_text_is_mindspeed_llms(tokenizer: Any, name: str, chat: str) -> None:
    text = render(tokenizer, messages(CHATS[chat]), template=prompt_template(name))
    assert text == EXPECTED[name, chat]


def test_r1_task_stands_before_every_question(tokenizer: Any) -> None:
    text = render(tokenizer, messages(TWO), template=prompt_template("qwen_r1"))
    task = "final answer within \\\\boxed{}. "
    assert text.startswith(QWEN + "<|im_start|>user\nA conversation between User and Assistant. ")
    assert f"{task}Why?<|im_end|>\n" in text and f"{task} And?\n<|im_end|>\n" in text
    assert "<think> reasoning process here </think><answer> answer here </answer>Put your" in text


@pytest.mark.parametrize("name", PROMPT_FORMATS)
def test_question_ends_where_the_answer_begins(tokenizer: Any, name: str) -> None:
    """A prompt for generation is how the whole chat begins."""
    template = prompt_template(name)
    whole = render(tokenizer, messages(TWO), template=template)
    for ask in (False, True):
        asked = render(tokenizer, messages(TWO[:3]), template=template, add_generation_prompt=ask)
        assert whole.startswith(asked) and whole[len(asked) :].startswith("Yes.")


@pytest.mark.parametrize("name", ["qwen", "qwen_r1", "chatml", "qwen_lf"])
def test_answers_end_with_im_end_whatever_the_tokenizer_says(tokenizer: Any, name: str) -> None:
    end = end_of_turn(tokenizer, prompt_template(name))
    assert end == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_tokenizer_has_to_know_the_end_of_an_answer(tokenizer: Any) -> None:
    check_tokenizer("qwen", tokenizer)
    other = deepcopy(tokenizer)
    other.convert_tokens_to_ids = lambda token: None
    check_tokenizer("deepseek3", other)  # ends with whatever the tokenizer says
    with pytest.raises(UserError, match=r"--prompt-type qwen ends answers with <\|im_end\|>"):
        check_tokenizer("qwen", other)


def test_tokenizer_without_bos_and_eos() -> None:
    class Bare:
        """Has what `render` asks for, and names no token."""

        name_or_path = "bare"

        def apply_chat_template(self, chat: Any, **options: Any) -> str:
            from transformers.utils import chat_template_utils

            compile_template: Any = chat_template_utils._compile_jinja_template
            return compile_template(options["chat_template"]).render(messages=chat)

    text = render(Bare(), messages(ONE), template=prompt_template("deepseek3"))
    assert text == "<｜User｜>Why?<｜Assistant｜>So.<|endoftext|>"  # noqa: RUF001


@pytest.mark.parametrize(
    "turns",
    [
        [("user", "a"), ("user", "b")],
        [("assistant", "a")],
        [("user", "a"), ("tool", "b")],
        [*ONE, ("system", "late")],
    ],
)
def test_turns_that_do_not_alternate_are_refused(
    tokenizer: Any, turns: list[tuple[str, str]]
) -> None:
    """MindSpeed-LLM's separators go by the turn's number; such a chat has no right text there."""
    with pytest.raises(ChatError, match="--prompt-type qwen"):
        render(tokenizer, messages(turns), template=prompt_template("qwen"))


def test_names_are_what_the_flag_takes() -> None:
    assert set(get_args(PromptType)) == set(PROMPT_FORMATS)
