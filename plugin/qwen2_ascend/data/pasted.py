"""What the pasted flags of `preprocess` mean; pasted_flags.py is the mechanism.

MindSpeed-LLM's preprocess_data.py has no --task: there the handler's name says what the data is.
"""

from __future__ import annotations

from collections.abc import Sequence

from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.pasted_flags import Meaning, Pasted, Table, pasted_faults, pasted_notes
from qwen2_ascend.pasted_flags import split_flags as split_by_table

TASKS = {
    "GeneralPretrainHandler": "pretrain",
    "AlpacaStyleInstructionHandler": "sft",
    "SharegptStyleInstructionHandler": "sft",
    "OpenAIInstructionHandler": "sft",
    "AlpacaStylePairwiseHandler": "dpo",
    "SharegptStylePairwiseHandler": "dpo",
}
"""What the data is for, by --handler-name."""
TEXTS = "GeneralPretrainHandler"
LENGTH = "nothing that is written depends on it"
ONE_INPUT = "name the files themselves with --input, and mix them with --data-path when you train"

PREPROCESS_FLAGS: Table = {
    "--dataset-impl": Meaning("there is no other", ("mmap",)),
    "--overwrite-cache": Meaning("rows are read anew each time"),
    "--cache-dir": Meaning("no cache is written", None),
    "--streaming": Meaning("rows are never held all at once"),
    "--n-subs": Meaning("--workers share the rows; the result is the same", None),
    "--tokenizer-not-use-fast": Meaning("fast tokenizers give the same tokens"),
    "--make-vocab-size-divisible-by": Meaning(LENGTH, None),
    "--pad-vocab-size-to": Meaning(LENGTH, None),
    "--enable-thinking": Meaning("no prompt type of the Qwen2 family asks for it", None),
    "--mix-strategy": Meaning(ONE_INPUT, ("concat",)),
    "--pad-to-multiple-of": Meaning("training pads; see its --pad-to-multiple-of", ("1",)),
    # refused
    "--split-sentences": Meaning("a document is one piece; leave it out", refused=True),
    "--keep-newlines": Meaning("a document is one piece; leave it out", refused=True),
    "--hf-datasets-params": Meaning(ONE_INPUT, None, True),
    "--datasets": Meaning(ONE_INPUT, None, True),
    "--dataset-dir": Meaning(ONE_INPUT, None, True),
    "--interleave-probs": Meaning(ONE_INPUT, None, True),
    "--script-data-dir": Meaning("no code of a data set is run; " + ONE_INPUT, None, True),
    "--max-samples": Meaning("give --input a file with as many rows", None, True),
    "--merge-group-keys": Meaning(
        "give all the prefixes to --data-path when you train", None, True
    ),
    "--prompt-type-path": Meaning("give --chat-template a Jinja template", None, True),
    "--vocab-file": Meaning("give --tokenizer-name-or-path a Hugging Face folder", None, True),
    "--merge-file": Meaning("give --tokenizer-name-or-path a Hugging Face folder", None, True),
    "--placeholder-token": Meaning("there are no process reward models here", None, True),
    "--reward-tokens": Meaning("there are no process reward models here", None, True),
    "--dataset-additional-keys": Meaning("there is no R1 reinforcement here", None, True),
}


def split_flags(arguments: Sequence[str]) -> tuple[list[str], Pasted]:
    """A command line in our own words, and the flags that are no words of ours.

    --handler-name also says the task here, where no --task does.

    Raises:
        UserError: there is no such handler.
    """
    rest, pasted = split_by_table(arguments, PREPROCESS_FLAGS)
    at, handler = _handler(rest)
    if handler is None:
        return rest, pasted
    if handler.endswith("Handler") and handler not in TASKS:
        raise UserError(
            f"--handler-name {handler} is not supported; give the rows Alpaca's columns, "
            f"ShareGPT's conversations or OpenAI's messages, and one of {', '.join(TASKS)}."
        )
    if handler == TEXTS:
        del rest[at : at + (1 if "=" in rest[at] else 2)]
    has_task = any(word.split("=")[0] == "--task" for word in rest)
    if not has_task and handler in TASKS:
        rest += ["--task", TASKS[handler]]
    return rest, pasted


def say_pasted(pasted: Pasted) -> None:
    """Prints what of the pasted flags holds already.

    Raises:
        UserError: some do not hold; every one of them.
    """
    raise_if(pasted_faults(pasted, PREPROCESS_FLAGS, None, None))
    for note in pasted_notes(pasted, PREPROCESS_FLAGS):
        print(f"note: {note}", flush=True)


def _handler(words: Sequence[str]) -> tuple[int, str | None]:
    """Where --handler-name stands and what it says; None where it says nothing."""
    for at, word in enumerate(words):
        flag, has_value, value = word.partition("=")
        if flag.replace("_", "-") == "--handler-name":
            following = words[at + 1] if at + 1 < len(words) else None
            return at, value if has_value else following
    return 0, None
