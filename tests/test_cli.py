"""The command line: how commands are found, and how each of them ends."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from commands import run_python
from qwen2_ascend import __version__, cli
from qwen2_ascend.errors import UserError
from qwen2_ascend.launching import launched


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        *(("cli", [name], [f"usage: qwen2-ascend {name}"]) for name in cli.COMMANDS),
        ("benchmark.command", ["train"], ["--micro-batch-size"]),
        ("training.command", [], ["--tensor-model-parallel-size"]),
        ("finetuning.command", [], ["--num-train-epochs"]),
        ("finetuning.deepspeed.command", [], ["--zero-stage"]),
        ("alignment.command", [], ["--noise-factor"]),
        ("evaluation.command", [], ["--text-file"]),
        ("inference.command", [], ["--prompt-file", "--repetition-penalty", "--chat"]),
    ],
)
def test_help_imports_nothing_heavy(module: str, words: list[str], said: list[str]) -> None:
    """Property: asking for help does not wait for torch. (A time is no test on a busy machine.)"""
    code = f"""
import sys
from qwen2_ascend.{module} import main
try:
    status = main([*{words}, "--help"])
except SystemExit as end:
    status = end.code
heavy = {{"torch", "transformers", "megatron", "deepspeed", "pyarrow"}} & sys.modules.keys()
assert not heavy, heavy
sys.exit(status)
"""
    told = run_python("-c", code).out
    assert all(words in told for words in said)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    listing = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name}" in listing
        assert command.summary in listing
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"qwen2-ascend {__version__}\n"


def test_no_command_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2
    assert "usage: qwen2-ascend COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("convrt", "no command 'convrt'; did you mean convert?"),
        ("docter", "no command 'docter'; did you mean doctor?"),
        ("--verson", "no option '--verson'; did you mean --version?"),
        ("xyzzy", f"no command 'xyzzy'; commands are {', '.join(cli.COMMANDS)}."),
    ],
)
def test_unknown_commands_are_answered_with_a_suggestion(word, message, capsys) -> None:
    assert cli.main([word]) == 2
    assert capsys.readouterr().err == f"error: qwen2-ascend has {message}\n"


def test_a_command_gets_its_words_and_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    module = type(sys)("qwen2_ascend_test_command")
    module.main = lambda argv: seen.append((argv, sys.argv))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "try", cli.Command(module.__name__, "for this test"))
    monkeypatch.setattr(sys, "argv", ["qwen2-ascend"])
    assert cli.main(["try", "--a", "b"]) == 0
    assert seen == [(["--a", "b"], ["qwen2-ascend try", "--a", "b"])]


# --- endings --------------------------------------------------------------------------------------


def raising(error: BaseException):
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (UserError(["tp is 3.", "pp is 5."]), 2, ["error: tp is 3.", "error: pp is 5."]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (
            OSError(28, "No space left on device", "/data/x.bin"),
            1,
            [
                "error: OSError: [Errno 28] No space left on device: '/data/x.bin' "
                "(set QWEN2_ASCEND_TRACEBACK=1 to see the traceback)"
            ],
        ),
        (
            RuntimeError("first line\n  second line"),
            1,
            [
                "error: RuntimeError: first line second line "
                "(set QWEN2_ASCEND_TRACEBACK=1 to see the traceback)"
            ],
        ),
        (
            MemoryError(),
            1,
            ["error: MemoryError (set QWEN2_ASCEND_TRACEBACK=1 to see the traceback)"],
        ),
    ],
)
def test_endings_are_a_status_and_lines(error, status, lines, capsys, monkeypatch) -> None:
    monkeypatch.delenv(cli.TRACEBACK_VARIABLE, raising=False)
    assert cli.run_command(raising(error)) == status
    captured = capsys.readouterr()
    assert captured.err.splitlines() == lines
    assert captured.out == ""


@pytest.mark.parametrize("run", [cli.run_command, launched])
def test_a_terminal_without_the_letters_of_a_text_ends_no_command(run, monkeypatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert run(lambda: print("a 语 b", flush=True)) == 0
    assert written.getvalue() == b"a \\u8bed b\n"


def test_a_good_end_is_0_and_a_chosen_status_passes() -> None:
    assert cli.run_command(lambda: None) == 0
    with pytest.raises(SystemExit) as caught:
        cli.run_command(raising(SystemExit(1)))
    assert caught.value.code == 1


@pytest.mark.parametrize("error", [UserError("tp is 3."), RuntimeError("broken")])
def test_traceback_is_shown_when_asked_for(error, capsys, monkeypatch) -> None:
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    cli.run_command(raising(error))
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert f"error: {'' if isinstance(error, UserError) else 'RuntimeError: '}{error}\n" in err


def test_user_errors_keep_their_faults_between_processes() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(UserError(["one", "two"])))
    assert error.faults == ("one", "two")


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`qwen2-ascend ... | head -1` is such a reader."""
    code = (
        "import sys; from qwen2_ascend.cli import run_command\n"
        "def command():\n    for i in range(100000): print('line', i)\n"
        "sys.exit(run_command(command))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert err == ""


def test_another_broken_pipe_is_a_failure(capsys) -> None:
    assert cli.run_command(raising(BrokenPipeError(32, "Broken pipe"))) == 1
    assert "BrokenPipeError" in capsys.readouterr().err


def test_the_installed_command_answers() -> None:
    script = Path(sys.executable).with_name("qwen2-ascend")
    if not script.exists():
        pytest.skip("the package is not installed beside this Python")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"qwen2-ascend {__version__}\n")
