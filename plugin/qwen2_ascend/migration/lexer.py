"""The words of a bash script, with the line of each. Nothing is expanded and nothing is run.

This is the part of bash that launch scripts are written in: quotes, line continuations, comments,
arrays, pipes and redirections. There is no library for it that could be used: the one that parses
bash is under the GPL, the standard library's shlex knows neither lines nor what was quoted, and a
compiled grammar would be one more package to install on a cluster for a page of text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from qwen2_ascend.errors import UserError


class WordPart(NamedTuple):
    """A part of a word."""

    text: str
    """Its characters; of an expansion the source, as `${TP}`."""
    is_quoted: bool
    line: int
    is_expansion: bool = False


@dataclass(frozen=True, kw_only=True)
class Word:
    """One word of a command, or an operator such as `|`."""

    line: int
    pieces: tuple[WordPart, ...]
    source: str
    """The text in the script."""
    operator: str | None = None
    items: tuple[Word, ...] | None = None
    """The words of an array, `NAME=(...)`; then `pieces` are what stands before the bracket."""

    @property
    def plain(self) -> str | None:
        """Its text where nothing in it is quoted or expanded."""
        if self.operator or self.items is not None:
            return None
        if any(piece.is_quoted or piece.is_expansion for piece in self.pieces):
            return None
        return "".join(piece.text for piece in self.pieces)


_OPERATORS = ("&&", "||", ";;", "|&", "&>>", "&>", "<<<", "<<-", "<<", ">>", ">&", "<&")
_SINGLE = "|&;<>()\n"
_NAME = re.compile(r"\$(?:[A-Za-z_]\w*|[0-9@*#?$!-])")
_QUOTED = re.compile(r'[^"\\$`#\n]+')
_ARRAY = re.compile(r"[A-Za-z_]\w*\+?=$")
_CLOSERS = {"${": ("{", "}"), "$(": ("(", ")")}


def words(text: str, notes: list[str] | None = None) -> Iterator[Word]:
    """The words and operators of a script, in order; a newline that ends a command is an operator.

    Args:
        text: the script.
        notes: takes what was read otherwise than bash reads it, with its line.

    Raises:
        UserError: a quote or bracket is not closed; says in which line it opens.
    """
    yield from _Lexer(text, [] if notes is None else notes).words()


@dataclass
class _Lexer:
    text: str
    notes: list[str]
    at: int = 0
    heredocs: list[str] = field(default_factory=list)
    """Words that end the documents that begin behind this line."""

    _counted: tuple[int, int] = (0, 1)
    """A place and its line, so that no line is counted twice."""

    @property
    def line(self) -> int:
        at, line = self._counted
        if at > self.at:
            at, line = 0, 1
        self._counted = (self.at, line + self.text.count("\n", at, self.at))
        return self._counted[1]

    def words(self) -> Iterator[Word]:
        while self._skip_blanks():
            word = self._word()
            yield word
            if word.operator in ("<<", "<<-"):
                self._skip_blanks()
                end = self._word()
                self.heredocs.append("".join(piece.text for piece in end.pieces))
            elif word.operator == "\n":
                self._skip_heredocs()

    def _skip_blanks(self, also: str = "") -> bool:
        """Goes to the next word; False at the end of the text."""
        while self.at < len(self.text):
            if self.text.startswith("\\\n", self.at):
                self.at += 2
            elif self.text[self.at] in " \t\r" + also:
                self.at += 1
            elif self.text[self.at] == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            else:
                return True
        return False

    def _skip_heredocs(self) -> None:
        for end in self.heredocs:
            while self.at < len(self.text):
                stop = self.text.find("\n", self.at)
                stop = len(self.text) if stop < 0 else stop
                line, self.at = self.text[self.at : stop], min(stop + 1, len(self.text))
                if line.strip("\t") == end:
                    break
        self.heredocs.clear()

    def _word(self) -> Word:
        start, line = self.at, self.line
        if operator := self._operator():
            return Word(line=line, pieces=(), source=operator, operator=operator)
        pieces: list[WordPart] = []
        items = None
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == "(" and _ARRAY.search(self.text[start : self.at]):
                items = self._array()
                break
            if char in " \t\r" or char in _SINGLE:
                break
            pieces += self._pieces(char)
        source = self.text[start : self.at]
        return Word(line=line, pieces=tuple(pieces), source=source, items=items)

    def _operator(self) -> str | None:
        found = next((op for op in _OPERATORS if self.text.startswith(op, self.at)), None)
        if found is None and self.text[self.at] in _SINGLE:
            found = self.text[self.at]
        if found is None and (match := re.match(r"\d(?=[<>])", self.text[self.at :])):
            found = match[0]  # the 2 of 2>&1
        self.at += len(found or "")
        return found

    def _array(self) -> tuple[Word, ...]:
        opened, items = self.line, []
        self.at += 1
        while self._skip_blanks("\n"):
            if self.text[self.at] == ")":
                self.at += 1
                return tuple(items)
            word = self._word()
            if word.operator:
                raise UserError(f"line {word.line}: {word.operator!r} inside an array.")
            items.append(word)
        raise UserError(f"line {opened}: the bracket of an array is not closed.")

    def _pieces(self, char: str) -> list[WordPart]:
        """What begins at a character that is no blank."""
        line = self.line
        if char == "'":
            return [WordPart(self._until("'"), True, line)]
        if char == '"':
            return self._double_quoted()
        if char in "$`":
            return [self._expansion(is_quoted=False)]
        if char == "\\":
            self.at += 2
            escaped = self.text[self.at - 1 : self.at]
            return [] if escaped == "\n" else [WordPart(escaped, True, line)]
        match = re.compile(r"[^\s'\"$`\\|&;<>()]+").match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        return [WordPart(match[0], False, line)]

    def _until(self, quote: str) -> str:
        opened = self.line
        end = self.text.find(quote, self.at + 1)
        if end < 0:
            raise UserError(f"line {opened}: the quote {quote} is not closed.")
        inside, self.at = self.text[self.at + 1 : end], end + 1
        return inside

    def _double_quoted(self) -> list[WordPart]:
        opened = self.line
        self.at += 1
        pieces = [WordPart("", True, opened)]  # "" is a word too
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == '"':
                self.at += 1
                return pieces
            if char in "$`":
                pieces.append(self._expansion(is_quoted=True))
                continue
            if char == "#" and re.search(r"\n[ \t]*\Z", self.text[: self.at][-80:]):
                self._skip_quoted_comment()
                continue
            line = self.line
            if char == "\\" and self.text[self.at + 1 : self.at + 2] in ("\\", '"', "$", "`", "\n"):
                pieces.append(WordPart(self.text[self.at + 1].replace("\n", ""), True, line))
                self.at += 2
                continue
            match = _QUOTED.match(self.text, self.at)
            run = match[0] if match else char
            pieces.append(WordPart(run, True, line))
            self.at += len(run)
        raise UserError(f'line {opened}: the quote " is not closed.')

    def _skip_quoted_comment(self) -> None:
        """Bash has no comments between quotes, but whoever writes one there means it as one."""
        self.notes.append(
            f"line {self.line}: the comment between quotes is left out; bash gives its words to "
            "the program"
        )
        match = re.compile(r'[^\n"]*').match(self.text, self.at)
        assert match is not None
        self.at = match.end()

    def _expansion(self, *, is_quoted: bool) -> WordPart:
        """`$NAME`, `${...}`, `$(...)`, `$((...))` or backquotes; a lonely $ is itself."""
        start, line = self.at, self.line
        if self.text[start] == "`":
            self._until("`")
            return WordPart(self.text[start : self.at], is_quoted, line, True)
        if (opener := self.text[start : start + 2]) in _CLOSERS:
            self.at = self._closing(start + 2, *_CLOSERS[opener])
            return WordPart(self.text[start : self.at], is_quoted, line, True)
        if match := _NAME.match(self.text, start):
            self.at = match.end()
            return WordPart(match[0], is_quoted, line, True)
        self.at += 1
        return WordPart("$", True, line)

    def _closing(self, at: int, opens: str, closes: str) -> int:
        opened, depth = self.line, 1
        while at < len(self.text):
            depth += (self.text[at] == opens) - (self.text[at] == closes)
            at += 1
            if depth == 0:
                return at
        raise UserError(f"line {opened}: the bracket {opens} of an expansion is not closed.")
