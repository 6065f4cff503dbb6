"""Which of our commands each of MindSpeed-LLM's programs is, and what becomes of its flags."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import PurePath
from typing import Annotated, NamedTuple, get_args, get_origin, get_type_hints

from qwen2_ascend.checkpoint.command import ConvertOptions
from qwen2_ascend.checkpoint.pasted import CONVERT_FLAGS, split_convert_flags
from qwen2_ascend.data.pasted import PREPROCESS_FLAGS
from qwen2_ascend.data.pasted import split_flags as split_preprocess_flags
from qwen2_ascend.data.settings import PreprocessSettings
from qwen2_ascend.errors import UserError
from qwen2_ascend.evaluation.pasted import EVALUATE_FLAGS
from qwen2_ascend.evaluation.settings import EvaluateSettings
from qwen2_ascend.finetuning.settings import FinetuneSettings
from qwen2_ascend.flags import flag_of
from qwen2_ascend.inference.pasted import GENERATE_FLAGS
from qwen2_ascend.inference.settings import GenerateSettings
from qwen2_ascend.migration.script import Command, Token, token
from qwen2_ascend.pasted_flags import Pasted, Table, pasted_faults, said, split_flags
from qwen2_ascend.training.megatron_flags import training_flags
from qwen2_ascend.training.settings import PretrainSettings

Split = Callable[[Sequence[str]], tuple[list[str], Pasted]]


@dataclass(frozen=True, kw_only=True)
class Program:
    """One of our commands."""

    command: str
    """What torchrun starts, or what is typed."""
    kind: type
    """Its settings."""
    table: Table
    """What pasted flags mean to it."""
    split: Split
    """Parts our words from pasted flags."""
    trains: bool = False
    keeps: tuple[str, ...] = ()
    """Pasted flags that say more than their words do, and stay."""

    @property
    def is_launcher(self) -> bool:
        """Whether torchrun starts it."""
        return self.command.endswith(".py")


class Change(NamedTuple):
    """What became of one flag."""

    flag: str
    line: int
    says: str
    is_lost: bool = False
    """Whether it meant something that is not done here."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One of the script's commands, as ours."""

    command: Command
    program: Program
    theirs: str
    """The program's file name."""
    launcher: tuple[Token, ...]
    """torchrun and its flags."""
    words: tuple[Token, ...]
    """Our flags and their values."""
    flags: Mapping[str, str | None]
    """Their flags with the texts of their values, as far as they are known."""
    changes: tuple[Change, ...]


MOE_FLAGS = ("--num-experts", "--moe-", "--n-shared-experts", "--shared-expert", "--first-k-dense")


def find_program(name: str, flags: Sequence[str | None]) -> Program | None:
    """Our command for one of their programs; None where it is not known.

    Args:
        name: the program's file name.
        flags: its words; what trains on chats was pretrain_gpt.py too, once.
    """
    tunes = "--is-instruction-dataset" in flags or "--stage" in flags
    return _FINETUNE if name == "pretrain_gpt.py" and tunes else PROGRAMS.get(name)


def migrate_command(command: Command) -> Job | None:
    """A command as ours; None where it starts no program of MindSpeed-LLM's.

    Raises:
        UserError: it is of a model with experts.
    """
    at = next((i for i, word in enumerate(command.words) if _file_name(word)), None)
    if at is None:
        return None
    theirs = _file_name(command.words[at])
    words = [one for word in command.words[at + 1 :] for one in _at_equals(word)]
    program = find_program(theirs, [word.text for word in words])
    if program is None:
        return None
    experts = [w.text for w in words if w.text and w.text.startswith(MOE_FLAGS)]
    if experts:
        raise UserError(
            f"line {command.line}: {', '.join(dict.fromkeys(experts))}: the job is of a model with "
            "experts; this project is for the dense models Qwen2 and Qwen2.5."
        )
    ours, changes = _translated(program, words)
    launcher = command.words[:at] if program.is_launcher else ()
    return Job(
        command=command,
        program=program,
        theirs=theirs,
        launcher=_torchrun(launcher),
        words=tuple(ours),
        flags=dict(_pairs(words)),
        changes=tuple(changes),
    )


def own_flags(kind: type) -> dict[str, bool]:
    """The flags of a settings class, and whether each takes several values."""
    found: dict[str, bool] = {}
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint, metadata = hints[field.name], ()
        if get_origin(hint) is Annotated:
            hint, *metadata = get_args(hint)
        if is_dataclass(hint) and isinstance(hint, type):
            found |= own_flags(hint)
            continue
        names = [flag_of(field.name)]
        for one in metadata:
            names += getattr(one, "aliases", None) or ()
        several = any(get_origin(one) is tuple for one in (hint, *get_args(hint)))
        found |= dict.fromkeys(names, several)
    return found


# --- flags ----------------------------------------------------------------------------------------


def _translated(program: Program, words: Sequence[Token]) -> tuple[list[Token], list[Change]]:
    """Our words for theirs, and what changed.

    Words that are not known before the script runs go through as marks.
    """
    marks = [f"\0{i}" for i in range(len(words))]
    by_mark = dict(zip(marks, words, strict=True))
    given = [mark if word.literal is None else word.literal for mark, word in by_mark.items()]
    rest, pasted = program.split(given)
    lines = {word.text: word.line for word in reversed(words) if word.text}
    changes = list(_changes(program, pasted, by_mark, lines))
    changes += _by_handler(program, given, rest, pasted)
    ours: list[Token] = []
    known, is_known = own_flags(program.kind), True
    for text in rest:
        if text.startswith("--"):
            is_known = _is_own(text, known)
            if not is_known:
                says = "has no counterpart here"
                changes.append(Change(text, lines.get(text, 0), says, is_lost=True))
        if is_known:
            ours.append(by_mark.get(text) or token(text))
    ours += _kept(program, pasted, by_mark)
    if (config := _config(program, ours, words)) is not None:
        ours += [token("--config"), config]
        says = "added: the tokenizer's folder has config.json; shards there have none"
        changes.append(Change("--config", 0, says))
    return ours, changes


def _by_handler(
    program: Program, given: Sequence[str], rest: Sequence[str], pasted: Pasted
) -> Iterator[Change]:
    """Flags that the command's own reading adds and takes away."""
    made = {word for flag, _ in pasted for word in program.table[flag].becomes}
    for flag in (word for word in rest if word.startswith("--")):
        if flag not in given and flag not in made:
            yield Change(flag, 0, "added: there the handler's name says it")
    named = {flag for flag, _ in pasted} | set(rest)
    for flag in dict.fromkeys(word for word in given if word.startswith("--")):
        if flag not in named and flag.replace("_", "-") not in program.table:
            yield Change(flag, 0, "left out: it says what holds without it")


def _changes(
    program: Program, pasted: Pasted, by_mark: Mapping[str, Token], lines: Mapping[str, int]
) -> Iterator[Change]:
    for flag, value in pasted:
        if _stays(program, flag):
            continue
        meaning = program.table[flag]
        texts = [by_mark[w].text if w in by_mark else w for w in (value or "").split(" ")]
        known = None if value is None else " ".join(text or "?" for text in texts)
        line = lines.get(flag, 0)
        faults = []
        if None not in texts:
            faults = pasted_faults(((flag, known),), program.table, None, None)
        if faults:
            fault = faults[0].removeprefix(said(flag, known)).lstrip(": ")
            yield Change(said(flag, known), line, fault.rstrip("."), is_lost=True)
        elif meaning.becomes:
            yield Change(said(flag, known), line, " ".join(meaning.becomes).format(known))
        else:
            yield Change(said(flag, known), line, f"left out: {meaning.says}")


def _stays(program: Program, flag: str) -> bool:
    """Whether a pasted flag goes into our command: that checks it against the model's config."""
    meaning = program.table[flag]
    return flag in program.keeps or (meaning.check is not None and not meaning.refused)


def _kept(program: Program, pasted: Pasted, by_mark: Mapping[str, Token]) -> Iterator[Token]:
    for flag, value in pasted:
        if _stays(program, flag):
            yield token(flag)
            yield from (by_mark.get(word) or token(word) for word in (value or "").split())


def _config(program: Program, ours: Sequence[Token], words: Sequence[Token]) -> Token | None:
    """The tokenizer's folder, which is the original model's, where no other config is named."""
    has_one = {"--config", "--hf-cfg-dir"} & {word.text for word in ours}
    at = next((i for i, w in enumerate(words) if w.text == "--tokenizer-name-or-path"), None)
    if not program.is_launcher or has_one or at is None or at + 1 == len(words):
        return None
    return words[at + 1]


def _pairs(words: Sequence[Token]) -> Iterator[tuple[str, str | None]]:
    """Flags and the texts of the values behind them; None where there is none, or it is unknown."""
    for number, word in enumerate(words):
        if word.text and word.text.startswith("--"):
            values = []
            for following in words[number + 1 :]:
                if following.text and following.text.startswith("--"):
                    break
                values.append(following.text)
            known = None not in values and values
            yield word.text.replace("_", "-"), " ".join(map(str, values)) if known else None


def _is_own(flag: str, known: Mapping[str, bool]) -> bool:
    """Whether a flag, or what it says no to, is one of ours."""
    plain = flag.replace("_", "-")
    return plain in known or (plain.startswith("--no-") and f"--{plain[5:]}" in known)


def _at_equals(word: Token) -> list[Token]:
    """`--flag=value` as two words."""
    first = word.parts[0] if word.parts else None
    if first is None or first.variable or not first.text.startswith("--") or "=" not in first.text:
        return [word]
    flag, _, value = first.text.partition("=")
    parts = (*([first._replace(text=value, value=value)] if value else []), *word.parts[1:])
    return [token(flag, word.line), *([Token(parts, word.line)] if parts else [])]


# --- programs -------------------------------------------------------------------------------------


def _file_name(word: Token) -> str:
    """The name of a Python file that a word is."""
    name = PurePath(word.text or "").name
    return name if name.endswith(".py") else ""


def _torchrun(launcher: Sequence[Token]) -> tuple[Token, ...]:
    """torchrun and its flags, whatever the script starts it by; else one process."""
    texts = [word.text for word in launcher]
    if "torchrun" in [PurePath(text or "").name for text in texts[:1]]:
        return tuple(launcher)
    for module in ("torch.distributed.launch", "torch.distributed.run"):
        if module in texts:
            behind = launcher[texts.index(module) + 1 :]
            dropped = ("--use_env", "--use-env")
            return (token("torchrun"), *(w for w in behind if w.text not in dropped))
    return (token("torchrun"), token("--nproc-per-node"), token("1")) if launcher else ()


def _launcher(name: str, kind: type, table: Table, *, trains: bool = False) -> Program:
    return Program(
        command=f"launch/{name}.py",
        kind=kind,
        table=table,
        split=partial(split_flags, table=table),
        trains=trains,
    )


_FINETUNE = _launcher(
    "finetune_qwen2", FinetuneSettings, training_flags(FinetuneSettings), trains=True
)
_CONVERT = Program(
    command="qwen2-ascend convert",
    kind=ConvertOptions,
    table=CONVERT_FLAGS,
    split=split_convert_flags,
    # by it is known which of the converters is meant, and so where a merge goes
    keeps=("--model-type",),
)
PROGRAMS = {
    "pretrain_gpt.py": _launcher(
        "pretrain_qwen2", PretrainSettings, training_flags(PretrainSettings), trains=True
    ),
    "posttrain_gpt.py": _FINETUNE,
    "inference.py": _launcher("generate_qwen2", GenerateSettings, GENERATE_FLAGS),
    "evaluation.py": _launcher("evaluate_qwen2", EvaluateSettings, EVALUATE_FLAGS),
    "convert_ckpt.py": _CONVERT,
    "convert_ckpt_v2.py": _CONVERT,
    "preprocess_data.py": Program(
        command="qwen2-ascend preprocess",
        kind=PreprocessSettings,
        table=PREPROCESS_FLAGS,
        split=split_preprocess_flags,
    ),
}
"""Our command for each of MindSpeed-LLM's programs."""
