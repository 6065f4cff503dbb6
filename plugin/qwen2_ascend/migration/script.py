"""What a bash script would start: assignments are followed, commands are found, nothing is run.

A variable whose value is a block of flags is written out; one that is a single value stays a
variable, so that the new script is edited where the old one was. What is only known when the
script runs, such as `$1`, the environment or `$(...)`, stays as it is.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from qwen2_ascend.migration.arithmetic import calculate
from qwen2_ascend.migration.lexer import Word, WordPart, words

NAMED = re.compile(r"\$\{?([A-Za-z_]\w*)")
"""A variable in a source."""


class Part(NamedTuple):
    """A part of an expanded word."""

    text: str
    """Its source where it is known only when the script runs."""
    value: str | None
    """None where it is not known."""
    variable: str | None = None
    """The variable that holds it."""
    is_quoted: bool = True
    """Whether it is not split at blanks."""
    is_list: bool = False
    """Whether bash would split it, as a variable without quotes."""
    line: int = 0


@dataclass(frozen=True)
class Token:
    """A word as a program would be given it."""

    parts: tuple[Part, ...]
    line: int

    @property
    def text(self) -> str | None:
        """Its text; None where it is not known."""
        values = [part.value for part in self.parts]
        return None if None in values else "".join(value or "" for value in values)

    @property
    def literal(self) -> str | None:
        """Its text where it is made of no variable."""
        return None if any(part.variable for part in self.parts) else self.text

    @property
    def variables(self) -> tuple[str, ...]:
        """Those it is made of."""
        return tuple(part.variable for part in self.parts if part.variable)

    def quoted(self, *, as_list: bool = False) -> str:
        """The word as bash takes it.

        Args:
            as_list: may be split, where it is a variable without quotes; what is not known here
                is split as bash does.
        """
        first = self.parts[0] if len(self.parts) == 1 else None
        if first and first.is_list and (as_list or first.variable is None):
            return first.text
        if (literal := self.literal) is not None:
            return shlex.quote(literal)
        return '"' + "".join(map(_in_quotes, self.parts)) + '"'


def token(text: str, line: int = 0) -> Token:
    """A token of a plain text."""
    return Token((Part(text, text),), line)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A simple command, and where its output goes."""

    line: int
    words: tuple[Token, ...]
    environment: tuple[str, ...] = ()
    """Assignments before it, in its source."""
    rest: str = ""
    """What follows it: redirections, a pipe, an ampersand, in their source."""
    source: str = ""


class Variable(NamedTuple):
    """What a variable holds."""

    values: tuple[Token, ...]
    """One, but of an array."""
    source: str
    """The assignment."""
    is_block: bool
    """Whether it is a block of flags, not a value."""
    is_array: bool


@dataclass
class Script:
    """What was found in a script."""

    commands: list[Command] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was not followed, with its line."""
    assignments: dict[str, list[Variable]] = field(default_factory=dict)
    """Each variable's values, in order."""

    def needed(self, names: Sequence[str]) -> list[str]:
        """The assignments that words of these variables need, in the order of the script."""
        wanted, found = list(dict.fromkeys(names)), []
        for name in wanted:  # grows
            for variable in self.assignments.get(name, ()):
                found.append(variable.source)
                wanted += [one for one in NAMED.findall(variable.source) if one not in wanted]
        order = [v.source for vs in self.assignments.values() for v in vs]
        return sorted(dict.fromkeys(found), key=order.index)


_OPENERS = {"if": "fi", "for": "done", "while": "done", "until": "done", "case": "esac"}
_OPENERS |= {"select": "done", "{": "}"}
_LEADING = ("do", "then", "else", "elif", "!", "time", "nohup")
_ASSIGNMENT = re.compile(r"(?s)([A-Za-z_]\w*)(\+?=)(.*)")
_PARAMETER = re.compile(r"(?s)\$\{([A-Za-z_]\w*|[0-9@*])(\[[@*]\])?(?:(:?[-=])(.*))?\}")


def read_script(text: str) -> Script:
    """Follows a script from its first line to its last.

    Raises:
        UserError: a quote or bracket is not closed.
    """
    return _Reader().read(text)


class _Reader:
    def __init__(self) -> None:
        self._script = Script()
        self._variables: dict[str, Variable] = {}

    def read(self, text: str) -> Script:
        waiting: list[str] = []
        opened = 0
        for statement in _statements(text, self._script.notes):
            inside = bool(waiting)
            self._follow_blocks(statement, waiting)
            if waiting and not inside:
                opened = statement[0].line
            if inside and not waiting:
                self._script.notes.append(
                    f"lines {opened}-{statement[0].line}: is not followed; what it sets is taken "
                    "from the environment"
                )
            elif waiting:  # what it sets is not known behind the block
                for match in filter(None, (_ASSIGNMENT.match(word.source) for word in statement)):
                    self._variables.pop(match[1], None)
            else:
                self._statement(statement)
        self._settle()
        return self._script

    def _settle(self) -> None:
        """Writes out what a variable was, where it is something else at the script's end."""
        last = {name: made[-1] for name, made in self._script.assignments.items()}

        def settled(part: Part) -> Part:
            made = last.get(part.variable or "")
            if made is None or part.value is None or made.values[0].text == part.value:
                return part
            return Part(part.value, part.value, line=part.line)

        self._script.commands = [
            replace(
                command,
                words=tuple(
                    replace(word, parts=tuple(map(settled, word.parts))) for word in command.words
                ),
            )
            for command in self._script.commands
        ]

    def _follow_blocks(self, statement: Sequence[Word], waiting: list[str]) -> None:
        """Keeps the ends of the blocks that are open in `waiting`."""
        for word in _leading_words(statement):
            if waiting and word == waiting[-1]:
                waiting.pop()
            elif word in _OPENERS:
                waiting.append(_OPENERS[word])
            elif word == "function()":
                waiting.append("}")

    # --- statements -------------------------------------------------------------------------------

    def _statement(self, statement: Sequence[Word]) -> None:
        given = list(statement)
        is_export = given[0].plain in ("export", "declare", "readonly", "local")
        assigned = given[1:] if is_export else given
        assigns = bool(assigned) and all(_ASSIGNMENT.match(word.source) for word in assigned)
        if assigns:
            for word in assigned:
                self._assign(word, given[0].plain or "" if is_export else "")
        if is_export or not assigns:
            self._script.commands.append(self._command(given))

    def _assign(self, word: Word, prefix: str) -> None:
        match = _ASSIGNMENT.match(word.source)
        assert match is not None
        name, is_more = match[1], match[2] == "+="
        if word.items is not None:
            values = tuple(one for item in word.items for one in self._tokens(item))
        else:
            value = word.pieces[0]._replace(text=word.pieces[0].text.partition("=")[2])
            values = (Token(self._parts((value, *word.pieces[1:])), word.line),)
        before = self._variables.get(name)
        if is_more and before is not None:
            if word.items is not None:
                values = (*before.values, *values)
            else:
                parts = before.values[0].parts + values[0].parts
                values = (replace(before.values[0], parts=parts),)
        source = f"{prefix} {word.source}".strip()
        is_array = word.items is not None or bool(is_more and before and before.is_array)
        variable = Variable(values, source, _is_block(values, is_array), is_array)
        self._variables[name] = variable
        self._script.assignments.setdefault(name, []).append(variable)

    def _command(self, given: Sequence[Word]) -> Command:
        count = next(
            (i for i, word in enumerate(given) if not _ASSIGNMENT.match(word.source)), len(given)
        )
        rest = next((i for i, word in enumerate(given) if word.operator and i >= count), len(given))
        expanded = [one for word in given[count:rest] for one in self._tokens(word)]
        while expanded and expanded[0].text in _LEADING:
            expanded.pop(0)
        return Command(
            line=given[0].line,
            words=tuple(expanded),
            environment=tuple(word.source for word in given[:count]),
            rest=_source(given[rest:]),
            source=_source(given),
        )

    # --- expansion --------------------------------------------------------------------------------

    def _tokens(self, word: Word) -> list[Token]:
        """A word's fields, as bash splits them, but that a value that is no block stays whole."""
        fields: list[list[Part]] = []
        is_open = False
        for part in self._parts(word.pieces):
            runs = [part]
            if not part.is_quoted:
                runs = [Part(run, run, line=part.line) for run in re.findall(r"\s+|\S+", part.text)]
            for run in runs:
                if not part.is_quoted and run.text.isspace():
                    is_open = False
                    continue
                if not is_open:
                    fields.append([])
                fields[-1].append(run)
                is_open = True
        return [Token(tuple(parts), parts[0].line or word.line) for parts in fields]

    def _parts(self, pieces: Sequence[WordPart]) -> tuple[Part, ...]:
        found: list[Part] = []
        for piece in pieces:
            if piece.is_expansion:
                found += self._expanded(piece)
            else:
                found.append(Part(piece.text, piece.text, None, piece.is_quoted, line=piece.line))
        return tuple(found)

    def _expanded(self, piece: WordPart) -> list[Part]:
        source = piece.text
        if source.startswith("$(("):
            value = calculate(source[3:-2], self._number)
            return [Part(source, value, line=piece.line)]
        name, operator, default = _parameter(source)
        variable = self._variables.get(name) if name else None
        if name and variable is not None:
            is_empty = all(value.text == "" for value in variable.values)
            if operator != ":-" or not is_empty:
                return self._of_variable(name, variable, piece)
        if default is not None:
            inner = [one for word in words(default) if not word.operator for one in word.pieces]
            value = Token(self._parts(inner), 0).text
            return [Part(source, value, line=piece.line)]
        return [Part(source, None, is_list=not piece.is_quoted, line=piece.line)]

    def _of_variable(self, name: str, variable: Variable, piece: WordPart) -> list[Part]:
        if not variable.is_block and len(variable.values) == 1:
            value = variable.values[0].text
            reference = f"${{{name}}}"
            return [Part(reference, value, name, is_list=not piece.is_quoted, line=piece.line)]
        parts: list[Part] = []
        for number, value in enumerate(variable.values):
            if number:
                parts.append(Part(" ", " ", None, False))
            for part in value.parts:
                whole = variable.is_array or part.variable is not None or part.value is None
                parts.append(
                    part._replace(is_quoted=whole or (piece.is_quoted and not variable.is_array))
                )
        return parts

    def _number(self, name: str) -> str | None:
        variable = self._variables.get(name)
        return variable.values[0].text if variable is not None else None


def _statements(text: str, notes: list[str]) -> Iterator[list[Word]]:
    """Commands with their pipes and redirections, cut at newlines, `;`, `&&`, `||` and `&`."""
    statement: list[Word] = []
    for word in words(text, notes):
        ends = word.operator in ("\n", ";", ";;", "&&", "||")
        if not ends:
            statement.append(word)
        elif word.operator == "\n" and statement and statement[-1].operator in ("|", "|&"):
            continue
        elif statement:
            yield statement
            statement = []
    if statement:
        yield statement


def _leading_words(statement: Sequence[Word]) -> Iterator[str]:
    """The keywords that a statement begins with, and `function()` where it defines one."""
    for number, word in enumerate(statement):
        text = word.plain
        if word.operator in ("(", ")") and number:
            continue
        if text is None:
            return
        following = [one.operator for one in statement[number + 1 : number + 3]]
        if following == ["(", ")"] or text == "function":
            yield "function()"
            return
        yield text
        if text not in _LEADING and text not in _OPENERS:
            return
        if text in ("for", "case", "select"):
            return


def _parameter(source: str) -> tuple[str | None, str | None, str | None]:
    """The name, the operator and the default of an expansion; None where it is another one."""
    if match := _PARAMETER.fullmatch(source):
        return match[1], match[3], match[4]
    if re.fullmatch(r"\$\w+", source):
        return source[1:], None, None
    return None, None, None


def _is_block(values: Sequence[Token], is_array: bool) -> bool:
    """Whether a value is flags that have to be seen, not one flag's value."""
    if is_array:
        return True
    texts = [part.value for value in values for part in value.parts]
    said = "".join("x" if text is None else text for text in texts)
    return any(word.startswith("-") and not _is_number(word) for word in said.split())


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _source(given: Sequence[Word]) -> str:
    """Words as they stand in the script; operators with blanks where bash needs none too."""
    text = ""
    for number, word in enumerate(given):
        before = given[number - 1] if number else None
        sticks = before is not None and (
            (before.operator or "").isdigit() or before.operator in (">&", "<&")
        )
        text += ("" if sticks or not text else " ") + word.source
    return text


def _in_quotes(part: Part) -> str:
    """A part of a word as it stands between double quotes."""
    if part.variable or part.value is None:
        return part.text
    return re.sub(r'([\\"$`])', r"\\\1", part.text)
