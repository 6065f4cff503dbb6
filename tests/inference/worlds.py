"""A tiny model with a tokenizer and a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.corpora import save_tokenizer
from helpers import make_tiny_hugging_face_folder, tiny_config

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTEXT = 256


def model_with_tokenizer(folder: Path, **changes: Any) -> Path:
    """A random model of a vocabulary that the tokenizer fits in."""
    config = tiny_config(**{"vocab_size": 400, "max_position_embeddings": CONTEXT, **changes})
    make_tiny_hugging_face_folder(folder, config, seed=8)
    save_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    generation = {"eos_token_id": [0], "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder
