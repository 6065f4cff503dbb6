"""Bash as launch scripts are written in it: the words are those that bash itself makes."""

from __future__ import annotations

import subprocess
import textwrap

import pytest

from qwen2_ascend.errors import UserError
from qwen2_ascend.migration.script import Script, read_script


def read(text: str) -> Script:
    return read_script(textwrap.dedent(text))


def words(text: str) -> list[str | None]:
    """The words of the last command."""
    return [word.text for word in read(text).commands[-1].words]


def by_bash(text: str) -> list[str]:
    """What bash gives to the last command; `show` prints its words."""
    show = 'show() { for word in "$@"; do printf \'%s\\n\' "$word"; done; }\n'
    run = subprocess.run(
        ["bash", "-c", show + textwrap.dedent(text)], capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()


SAME_AS_BASH = {
    "quotes": """ show a "b c" 'd $e' f"g"'h' "i\\"j" k\\ l "" """,
    "a block of flags": """
        TP=2
        ARGS="
            --tp ${TP} \\
            --list 1,2 \\
            --bare
        "
        show $ARGS --end""",
    "blocks in blocks": """
        MODEL="--layers 4 --hidden 8"
        ALL="$MODEL --more"
        show $ALL""",
    "what a variable was when it was read": """
        A=1
        ARGS="--a $A"
        A=2
        show $ARGS""",
    "an array": """
        ARGS=(
            --a "x y"   # a comment
            --b 'z'
        )
        show "${ARGS[@]}" """,
    "an array that grows": """
        ARGS=(--a 1)
        ARGS+=(--b "2 3")
        show "${ARGS[@]}" """,
    "a text that grows": """
        ARGS="--a 1"
        ARGS+=" --b 2"
        show $ARGS""",
    "defaults": """
        B=""
        C=4
        show ${A:-1} ${B:-"2 3"} ${B-x}y ${C:-5} "${D:=6}" """,
    "arithmetic": """
        A=8 ; B=2
        W=$(($A*$B))
        show $W $((A / 3)) $(( (A + 1) % 4 - 2 * B )) $((-7/2))""",
    "hashes that are no comments": """ show a#b "#c" '#d' """,
    "carried over lines": "show a\\\nb \\\n   c",
    "semicolons": "A=1; B=2; show $A$B",
    "a path of variables": """
        ROOT=/data
        show ${ROOT}/model/$ROOT.bin "$ROOT"/x""",
    "after a heredoc": "cat > /dev/null <<END\nshow no $X \"quote\nEND\nshow yes",
    "an environment before it": "A=1 B='2 3' show x",
}  # fmt: skip


@pytest.mark.parametrize("name", SAME_AS_BASH)
def test_words_are_those_of_bash(name: str) -> None:
    found = words(SAME_AS_BASH[name])
    assert found[found.index("show") + 1 :] == by_bash(SAME_AS_BASH[name])


def test_a_comment_ends_a_continuation() -> None:
    """Bash takes what follows for a command of its own."""
    script = read("""
        show --a 1 \\
            # --b 2 \\
            --c 3 2>/dev/null || true""")
    first, second = script.commands[:2]
    assert [word.text for word in first.words] == ["show", "--a", "1"]
    assert second.words[0].text == "--c" and second.line == 4


def test_what_the_script_does_not_set_is_not_known() -> None:
    assert words("ROOT=/data\nshow ${ROOT}/$USERLESS.bin $ROOT/x") == ["show", None, "/data/x"]


def test_value_with_blanks_stays_one_word() -> None:
    """Bash would split it: a path that nobody has filled in yet."""
    script = read("""
        CKPT="your model path"
        run --load $CKPT --data $CKPT
    """)
    load = script.commands[-1].words[2]
    assert (load.text, load.quoted(), load.quoted(as_list=True)) == (
        "your model path",
        '"${CKPT}"',
        "${CKPT}",
    )


@pytest.mark.parametrize(
    ("text", "shell"),
    [
        ("run $1", "$1"),
        ('run "${RANK}"', '"${RANK}"'),
        ("run ${RANK}", "${RANK}"),
        ("run $(dirname $0)/x", '"$(dirname $0)/x"'),
        ("run `hostname`", "`hostname`"),
        ("run a'$b'\"$c\"", '"a\\$b$c"'),
        ("A=x; run $A/y", '"${A}/y"'),
    ],
)
def test_what_is_known_later_stays_as_it_is(text: str, shell: str) -> None:
    assert read(text).commands[-1].words[1].quoted() == shell


def test_default_of_a_parameter_is_known_and_stays_in_its_assignment() -> None:
    script = read("TP=${1:-4}\nrun --tp $TP")
    word = script.commands[-1].words[2]
    assert (word.text, word.quoted()) == ("4", '"${TP}"')
    assert script.needed(["TP"]) == ["TP=${1:-4}"]


def test_variable_that_changes_is_written_out() -> None:
    """All assignments stand in front of the new command, so only the last value holds there."""
    script = read("""
        A=1
        ARGS="--a $A"
        run $ARGS
        A=2
        run --b $A
    """)
    assert [word.quoted() for word in script.commands[0].words] == ["run", "--a", "1"]
    assert script.commands[1].words[2].quoted() == '"${A}"'


def test_assignments_that_are_needed_come_with_what_they_need() -> None:
    script = read("""
        A=2
        UNUSED=3
        export B=4
        C=$(($A*$B))
        run $C
    """)
    assert script.needed(["C"]) == ["A=2", "export B=4", "C=$(($A*$B))"]


def test_pipes_and_redirections_follow_the_command() -> None:
    command = read("run a \\\n  2>&1 | tee logs/x_$A.log &").commands[-1]
    assert [word.text for word in command.words] == ["run", "a"]
    assert command.rest == "2>&1 | tee logs/x_$A.log &"
    assert read("run a > out.log 2> err.log").commands[-1].rest == "> out.log 2> err.log"
    assert read("run a |\n  tee x").commands[-1].rest == "| tee x"


def test_blocks_are_not_followed_and_said() -> None:
    """What a branch sets is not known: it is not known which branch is taken."""
    script = read("""
        A=1
        for ((i = 0; i < 4; i++)); do
            if [ $i == 2 ]; then
                A=2
            fi
        done
        case $A in
            1) B=1 ;;
        esac
        f() {
            C=1
        }
        run $A $B $C
    """)
    assert [word.text for word in script.commands[-1].words] == ["run", None, None, None]
    assert [note.split(":")[0] for note in script.notes] == [
        "lines 3-7",
        "lines 8-10",
        "lines 11-13",
    ]


def test_comment_between_quotes_is_left_out_and_said() -> None:
    script = read("""
        ARGS="
            --a 1 \\
            # --b 2 \\
            --c 3 # not at the line's start
        "
        run $ARGS
    """)
    assert [word.text for word in script.commands[-1].words][:5] == ["run", "--a", "1", "--c", "3"]
    assert script.notes[0].startswith("line 4: the comment between quotes is left out")


def test_words_know_their_lines() -> None:
    script = read("""
        ARGS="
            --a 1 \\
            --b 2
        "
        run \\
            --c \\
            $ARGS
    """)
    lines = {word.text: word.line for word in script.commands[-1].words}
    assert lines == {"run": 6, "--c": 7, "--a": 3, "1": 3, "--b": 4, "2": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nB='x\n", "line 2: the quote ' is not closed"),
        ('a\n\nB="x\n', 'line 3: the quote " is not closed'),
        ("a\nB=(x\n", "line 2: the bracket of an array is not closed"),
        ("a ${B\n", "line 1: the bracket { of an expansion is not closed"),
        ("a\nB=(x; y)\n", "line 2: ';' inside an array"),
    ],
)
def test_what_is_not_closed_is_said_with_its_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace("{", r"\{")):
        read_script(text)


def test_nothing_is_run(tmp_path) -> None:
    touched = tmp_path / "touched"
    read_script(f"A=$(touch {touched})\nB=`touch {touched}`\n: ${{C:=$(touch {touched})}}\nrun $A")
    assert not touched.exists()


@pytest.mark.parametrize("text", ["$((2 ** 999999999))", "$((__import__('os')))", "$((1 << 9999))"])
def test_arithmetic_is_of_whole_numbers_only(text: str) -> None:
    assert words(f"run {text}") == ["run", None]


def test_long_script_is_read_in_time() -> None:
    text = 'ARGS="\n' + "    --flag value \\\n" * 20_000 + '"\nrun $ARGS\n' + "echo x\n" * 20_000
    script = read_script(text)
    assert len(script.commands) == 20_001 and len(script.commands[0].words) == 40_001
