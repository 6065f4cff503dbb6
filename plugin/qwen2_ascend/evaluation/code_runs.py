"""Programs that a model wrote, run against their tests: each in a process and a folder of its own.

Limits of time, memory and file size hold a program that is wrong. They do not hold one that means
harm: it runs as the user who started the evaluation. So nothing runs unless HF_ALLOW_CODE_EVAL=1 is
in the environment, as with lm-eval and `evaluate`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import warnings

SECONDS = 10
MEMORY_BYTES = 4 * 2**30
FILE_BYTES = 16 * 2**20
PERMISSION = "HF_ALLOW_CODE_EVAL"
RUNNER = f"""
import resource, sys
limits = {{"CPU": {SECONDS}, "AS": {MEMORY_BYTES}, "FSIZE": {FILE_BYTES}, "CORE": 0}}
for name, limit in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
source, sign, out = sys.stdin.read(), sys.argv.pop(), sys.stdout
sys.stdout = sys.stderr
exec(compile(source, "program", "exec"), {{"__name__": "__main__"}})
out.write(sign)
"""
"""Writes a sign when the program has come to its end, which an early exit does not."""


def may_run() -> bool:
    """Whether the user has said that generated code may run."""
    return os.environ.get(PERMISSION) == "1"


def is_python(program: str) -> bool:
    """Whether a text can be a program at all; it does not run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(program, "program", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
            return False
    return True


def passes(program: str) -> bool:
    """Whether a program, with its tests, comes to its end within the limits."""
    assert may_run(), f"{PERMISSION}=1 is not in the environment"
    sign = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, "-I", "-c", RUNNER, sign],
            cwd=folder,
            env={"PATH": os.defpath},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process,
    ):
        try:
            out, _ = process.communicate(program.encode("utf-8", "replace"), timeout=SECONDS)
        except subprocess.TimeoutExpired:
            out = b""
        finally:
            _end(process)
    return out.decode("utf-8", "replace") == sign and process.returncode == 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a program and what it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
