"""A tokenizer with Qwen2.5's chat template, and chats, for the tests of chat data."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data.corpora import documents, save_tokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]

TEMPLATE = """
{%- if tools -%}
{{ '<|im_start|>system\\n' + (messages[0].content if messages[0].role == 'system' else DEFAULT) }}
{{- '\\n\\n# Tools\\n<tools>' }}
{%- for tool in tools -%}
{{ '\\n' + tool | tojson }}
{%- endfor -%}
{{ '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role != 'system' -%}
{{ '<|im_start|>system\\n' + DEFAULT + '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
{{ '<|im_start|>user' }}
{%- endif -%}
{{ '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- elif message.role == 'assistant' -%}
{{ '<|im_start|>assistant' }}GENERATION
{%- if message.content or not message.tool_calls -%}
{{ '\\n' + message.content }}
{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{{ '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>' }}ENDGENERATION{{ '\\n' }}
{%- elif not (tools and loop.first and message.role == 'system') -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
""".replace("DEFAULT", f"'{DEFAULT_SYSTEM}'")
"""Qwen2.5's form: a default system prompt, tools in it, answers of tools in a user turn."""

CHATML = TEMPLATE.replace("ENDGENERATION", "").replace("GENERATION", "")
MARKED = TEMPLATE.replace("ENDGENERATION", "{% endgeneration %}").replace(
    "GENERATION", "{% generation %}"
)


def save_chat_tokenizer(folder: Path, template: str = CHATML) -> Path:
    """The byte-level tokenizer of `corpora`, with a chat template and <|im_end|> at the end."""
    save_tokenizer(folder, eos_token="<|im_end|>")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "pad_token": "<|endoftext|>"}))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def said(role: str, content: str, **more: object) -> dict:
    return {"role": role, "content": content, **more}


def called(name: str, arguments: dict) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TURNS = [
    [said("user", "hi"), said("assistant", "hello there")],
    [said("system", "Be brief."), said("user", "日本 語?"), said("assistant", "naïve 😀")],
    [
        said("user", "what is it"),
        said("assistant", "that it was\n"),
        said("user", "and for"),
        said("assistant", "\n\n  as with his"),
    ],
]
"""Chats without tools: one turn, a system prompt, several turns, newlines before an answer."""

TOOL_TURNS = [
    said("user", "weather in a and b?"),
    said(
        "assistant",
        "",
        tool_calls=[called("weather", {"in": "a"}), called("weather", {"in": "b"})],
    ),
    said("tool", "rain"),
    said("tool", ""),
    said("assistant", "It rains in a."),
    said("user", "and in c?"),
    said("assistant", "I look.", tool_calls=[called("weather", {"in": "c", "語": None})]),
    said("tool", "sun"),
    said("assistant", "Sun."),
]


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    """JSONL, or what the name says: a JSON array, Parquet; packed where it ends in .gz."""
    if path.suffix == ".parquet":
        pa: Any = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
        return path
    if ".json" in path.suffixes:
        text = json.dumps(rows, indent=2, ensure_ascii=False)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def chat_rows(count: int, *, seed: int = 0, longest: int = 30) -> list[dict]:
    """Rows of OpenAI messages with one to three turns of the assistant."""
    draw = random.Random(seed)
    texts = iter(documents(count * 6, seed=seed, longest=longest))
    return [
        {
            "messages": [
                said(role, next(texts))
                for _ in range(draw.randint(1, 3))
                for role in ("user", "assistant")
            ]
        }
        for _ in range(count)
    ]
