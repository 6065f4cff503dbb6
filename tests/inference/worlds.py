"""A tiny model with a tokenizer and a chat template, and command lines run on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from data.corpora import save_tokenizer
from helpers import make_tiny_hugging_face_folder, tiny_config

HERE = Path(__file__).parent
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTEXT = 256


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def model_with_tokenizer(folder: Path, **changes: Any) -> Path:
    """A random model of a vocabulary that the tokenizer fits in."""
    config = tiny_config(**{"vocab_size": 400, "max_position_embeddings": CONTEXT, **changes})
    make_tiny_hugging_face_folder(folder, config, seed=8)
    save_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    generation = {"eos_token_id": [0], "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder


def run_commands(folder: Path, commands: dict[str, dict[str, Any]]) -> dict[str, Ended]:
    """Runs command lines one after the other in a process of their own."""
    (folder / "commands.json").write_text(json.dumps(list(commands.values())), encoding="utf-8")
    tests = HERE.parent
    paths = [str(tests), str(tests.parent / "plugin"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    subprocess.run(
        [
            sys.executable,
            str(HERE / "run_commands.py"),
            str(folder / "commands.json"),
            str(folder / "results.json"),
        ],
        check=True,
        timeout=500,
        env=environment,
    )
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return dict(zip(commands, (Ended(**result) for result in results), strict=True))
