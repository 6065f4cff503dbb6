"""Runs the tests that need no torch, with each Python that the project's metadata names.

`make test-pythons`. An interpreter is looked for on PATH and under pyenv; one that is not found is
named, and no error. The one that runs this script is left out: the other tests run with it. Each
gets an environment without torch and megatron-core, `.venv-python-3.12`, where a test that needs
them fails.

At import this script needs the standard library alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WITHOUT = ("megatron-core", "torch")
TESTERS = ("hypothesis", "pyarrow", "pytest", "pytest-timeout")
TESTS = (
    "board/test_pure.py",
    "checkpoint/formats/test_optimizer_layout.py",
    "checkpoint/formats/test_safetensors.py",
    "checkpoint/test_iteration.py",
    "checkpoint/test_slices.py",
    "data/test_chat_formats.py",
    "data/test_inputs.py",
    "finetuning/test_settings.py",
    "inference/test_prompts.py",
    "inference/test_text.py",
    "migration/test_script.py",
    "model/test_context_plan.py",
    "pasted/test_migrate.py",
    "planning/test_measured.py",
    "runtime/test_absent_triton.py",
    "runtime/test_environment.py",
    "runtime/test_ledger.py",
    "runtime/test_mindspeed.py",
    "runtime/test_power.py",
    "test_cli.py",
    "test_doctor.py",
    "test_errors.py",
    "test_files.py",
    "test_flags.py",
    "test_markdown.py",
    "test_parallel.py",
    "test_progress.py",
    "training/test_settings.py",
)


def named() -> list[str]:
    """What pyproject.toml says is supported: ["3.10", ...]."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)


def requirements() -> list[str]:
    """What the project needs besides torch, and what its tests need."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    needed = re.findall(r'"([^"]+)"', block[1])
    return [n for n in needed if re.split("[<>=]", n)[0] not in WITHOUT] + list(TESTERS)


def find(version: str) -> str | None:
    """An interpreter of this version that answers; pyenv's shims may be there and not."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    places = [shutil.which(f"python{version}")]
    places += map(str, pyenv.glob(f"versions/{version}.*/bin/python{version}"))
    for place in filter(None, places):
        if subprocess.run([place, "-c", ""], capture_output=True).returncode == 0:
            return place
    return None


def environment(version: str, interpreter: str, pip_arguments: list[str]) -> Path:
    """The Python of the environment, which is made where it is not there or not of these packages.

    The newest of each package: constraints.txt has the versions of Python 3.11.
    """
    folder = ROOT / f".venv-python-{version}"
    python, made = folder / "bin" / "python", folder / ".made"
    wanted = "\n".join(requirements())
    if not made.is_file() or made.read_text(encoding="utf-8") != wanted:
        subprocess.run([interpreter, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*install, *pip_arguments, *requirements()], check=True)
        made.write_text(wanted, encoding="utf-8")
    return python


def main(pip_arguments: list[str]) -> int:
    """The number of Pythons that a test failed with."""
    failed = []
    for version in named():
        if version == f"{sys.version_info.major}.{sys.version_info.minor}":
            continue
        interpreter = find(version)
        if interpreter is None:
            print(f"Python {version}: not found, not tested", flush=True)
            continue
        python = environment(version, interpreter, pip_arguments)
        print(f"Python {version} ({interpreter})", flush=True)
        tests = [str(ROOT / "tests" / name) for name in TESTS]
        done = subprocess.run(
            [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT / "plugin")},
        )
        failed += [version] if done.returncode else []
    if failed:
        print(f"failed with Python {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
