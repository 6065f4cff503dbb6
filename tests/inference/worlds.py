"""A tiny model with a tokenizer and a chat template, and what transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.corpora import save_tokenizer
from helpers import generated, make_tiny_hugging_face_folder, tiny_config

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


class Theirs:
    """transformers' tokenizer and model of a folder."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, Qwen2ForCausalLM

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = Qwen2ForCausalLM.from_pretrained(folder).float().eval()

    def text(
        self, prompt: str, num_tokens: int, stops: tuple[int, ...] = (0,), **options: Any
    ) -> str:
        """What it puts behind a prompt: greedily, or as `options` say."""
        ids = self.tokenizer(prompt).input_ids
        found = generated(self.model, ids, num_tokens, list(stops), **options)
        return self.tokenizer.decode(found, skip_special_tokens=True)
