"""Small files that no launcher expects, for test_odd_inputs.py: what users' disks really hold.

Each function writes one kind of file into a folder and gives, by a name, what is odd in it.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.corpora import write_indexed

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "the of"}
MESSAGES = [USER, ASSISTANT]
DEEP = 3000


def rows(folder: Path, key: str) -> dict[str, Path]:
    """Files of rows that have `key`, whoever reads them."""
    value = MESSAGES if key == "messages" else "it was"
    good = json.dumps({key: value})
    texts: dict[str, str | bytes] = {
        "nothing": "",
        "one newline": "\n",
        "only spaces": "   \n \t \n",
        "one row": good + "\n",
        "no newline at the end": good,
        "a BOM": b"\xef\xbb\xbf" + good.encode() + b"\n",
        "UTF-16": (good + "\n").encode("utf-16"),
        "Latin-1": json.dumps({key: "\u00fcber"}, ensure_ascii=False).encode("latin-1"),
        "CRLF": f"{good}\r\n{good}\r\n",
        "CR": f"{good}\r{good}\r",
        "NUL bytes": bytes(64),
        "a NUL in a string": json.dumps({key: "it\0was"}),
        "a lone surrogate": json.dumps({key: "\ud83d"}),
        "an empty string": json.dumps({key: ""}),
        "null": json.dumps({key: None}),
        "a number": json.dumps({key: 7}),
        "a list": json.dumps({key: []}),
        "an object": json.dumps({key: {}}),
        "NaN": json.dumps({key: float("nan")}),
        "a huge number": f'{{"{key}": {"1" * 5000}}}',
        "an endless exponent": f'{{"{key}": 1e999999}}',
        "duplicate keys": f'{{"{key}": "a", "{key}": 1}}',
        "no object": "[]\n",
        "a bare number": "1\n",
        "an empty object": "{}\n",
        "an empty key": '{"": ""}\n',
        "half a row": good[:8],
        "deep lists": f'{{"{key}": ' + "[" * DEEP + "]" * DEEP + "}\n",
        "deep objects": f'{{"{key}": ' + '{"a":' * DEEP + "1" + "}" * DEEP + "}\n",
        "a long line": json.dumps({key: "the of " * 40_000}),
        "an array of nulls": "[null, null]",
        "an array of a huge number": f"[{'1' * 5000}]",
        "a deep array": "[" * DEEP + "]" * DEEP,
    }
    made = {}
    for index, (name, text) in enumerate(texts.items()):
        made[name] = folder / f"{key}{index}.jsonl"
        made[name].write_bytes(text if isinstance(text, bytes) else text.encode())
    made["a folder"] = folder / f"{key}.jsonl"
    made["a folder"].mkdir()
    for name in ("jsonl.gz", "parquet"):
        made[f"not {name}"] = folder / f"{key}.{name}"
        made[f"not {name}"].write_text(good)
    return made


def chats(folder: Path) -> dict[str, Path]:
    """Files of one row, for those who read chats."""
    messages: dict[str, list[Any]] = {
        "numbers": [1, 2],
        "nulls": [None],
        "roles of nulls": [{"role": None, "content": None}],
        "no roles": [{"content": "a"}],
        "unknown roles": [{"role": "moon", "content": "a"}],
        "a role that is an object": [{"role": {}, "content": "a"}],
        "numbers for content": [USER, {"role": "assistant", "content": 1}],
        "content in parts": [USER, {"role": "assistant", "content": [{"type": "x"}]}],
        "content of nulls": [USER, {"role": "assistant", "content": [None]}],
        "no assistant": [USER],
        "an assistant alone": [ASSISTANT],
        "an empty assistant": [USER, {**ASSISTANT, "content": ""}],
        "tool calls of nulls": [USER, {**ASSISTANT, "tool_calls": [None]}],
        "tool calls that are text": [USER, {**ASSISTANT, "tool_calls": "x"}],
        "half a character in a call": [
            USER,
            {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": {"a": "\ud83d"}}]},
        ],
        "a weight that is text": [USER, {**ASSISTANT, "weight": "x"}],
        "a weight that is an object": [USER, {**ASSISTANT, "weight": {}}],
    }
    lines: dict[str, Any] = {
        **{what: {"messages": value} for what, value in messages.items()},
        "tools that are text": {"messages": MESSAGES, "tools": "x"},
        "tools that are numbers": {"messages": MESSAGES, "tools": [1]},
        "tools that are an object": {"messages": MESSAGES, "tools": {"a": 1}},
        "a system that is a number": {"messages": MESSAGES, "system": 1},
        "pairs of nulls": {"prompt": None, "chosen": None, "rejected": None},
        "pairs of objects": {"prompt": "a", "chosen": {}, "rejected": {}},
        "alpaca of numbers": {"instruction": 1, "input": 2, "output": 3},
        "alpaca with a history": {"instruction": "a", "output": "b", "history": [1]},
        "sharegpt of numbers": {"conversations": [{"from": 1, "value": 2}]},
        "sharegpt of objects": {"conversations": [{"from": {}, "value": []}]},
    }
    made = {}
    for index, (what, row) in enumerate(lines.items()):
        made[what] = folder / f"chat{index}.jsonl"
        made[what].write_text(json.dumps(row))
    return made


def indexes(folder: Path) -> dict[str, Path]:
    """Prefixes of .bin and .idx."""
    changes: dict[str, Callable[[bytearray], object]] = {
        "no sequences": lambda data: _put(data, 18, 0),
        "more sequences than bytes": lambda data: _put(data, 18, 1 << 62),
        "a negative count": lambda data: _put(data, 18, -1),
        "no documents": lambda data: _put(data, 26, 0),
        "more documents than bytes": lambda data: _put(data, 26, 1 << 62),
        "a negative length": lambda data: data.__setitem__(slice(34, 38), struct.pack("<i", -5)),
        "a length of zero": lambda data: data.__setitem__(slice(34, 38), bytes(4)),
        "an unknown dtype": lambda data: data.__setitem__(17, 99),
        "another version": lambda data: _put(data, 9, 7),
        "another magic": lambda data: data.__setitem__(0, 0),
        "a pointer outside": lambda data: _put(data, 34 + 8 * 4, 1 << 40),
        "a negative pointer": lambda data: _put(data, 34 + 8 * 4, -8),
        "only a magic": lambda data: data.__delitem__(slice(9, None)),
        "no index": lambda data: data.clear(),
    }
    made = {}
    for index, (name, change) in enumerate(changes.items()):
        made[name] = write_indexed(folder / f"corpus{index}", [20] * 8)
        path = made[name].with_suffix(".idx")
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)
    for name in ("an empty .bin", "an .idx of another", "one short document", "32-bit tokens"):
        made[name] = write_indexed(folder / name.replace(" ", "_").replace(".", ""), [20] * 8)
    made["an empty .bin"].with_suffix(".bin").write_bytes(b"")
    write_indexed(folder / "other", [30, 3])
    shutil.copyfile(folder / "other.idx", made["an .idx of another"].with_suffix(".idx"))
    write_indexed(made["one short document"], [2])
    write_indexed(made["32-bit tokens"], [20] * 8, first=1 << 30, dtype=np.int32)
    return made


def _put(data: bytearray, at: int, value: int) -> None:
    data[at : at + 8] = struct.pack("<q", value)


def models(folder: Path, good: Path) -> dict[str, Path]:
    """Hugging Face folders that differ from `good` in one file."""
    config = json.loads((good / "config.json").read_text())
    configs: dict[str, Any] = {
        "sizes as text": {name: str(v) if type(v) is int else v for name, v in config.items()},
        "negative sizes": {**config, "hidden_size": -64},
        "sizes of zero": {**config, "num_hidden_layers": 0},
        "fractions": {**config, "intermediate_size": 96.5},
        "a huge size": {**config, "vocab_size": 10**30},
        "booleans for numbers": {**config, "num_attention_heads": True},
        "no heads": {**config, "num_key_value_heads": 0},
        "null sizes": {**config, "hidden_size": None},
        "a list": [config],
        "a number": 1,
        "nothing": {},
        "no numbers": {**config, "rms_norm_eps": "NaN", "rope_theta": "inf"},
        "negative theta": {**config, "rope_theta": -1.0},
        "rope that is text": {**config, "rope_scaling": "yarn"},
        "rope without a factor": {**config, "rope_scaling": {"rope_type": "yarn"}},
        "rope of nulls": {**config, "rope_scaling": {"rope_type": None, "factor": None}},
        "eos that is text": {**config, "eos_token_id": "<|im_end|>"},
        "eos that is nested": {**config, "eos_token_id": [[1]]},
        "eos beyond the vocabulary": {**config, "eos_token_id": 10**12},
        "context of zero": {**config, "max_position_embeddings": 0},
        "a dtype that is a number": {**config, "torch_dtype": 16},
        "an activation that is null": {**config, "hidden_act": None},
        "architectures that are text": {**config, "architectures": "x", "model_type": 3},
        "layer types": {**config, "layer_types": [1]},
    }
    texts = {
        **{name: json.dumps(value).encode() for name, value in configs.items()},
        "an empty file": b"",
        "duplicate keys": b'{"hidden_size": 1, ' + (good / "config.json").read_bytes().lstrip()[1:],
        "deep": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        "a BOM": b"\xef\xbb\xbf" + (good / "config.json").read_bytes(),
        "binary": bytes(range(256)),
    }
    made = {}
    for name, data in texts.items():
        made[f"config: {name}"] = path = _model(folder, good)
        (path / "config.json").write_bytes(data)
    for name, text in _generation_configs().items():
        made[f"generation config: {name}"] = path = _model(folder, good)
        (path / "generation_config.json").write_text(text)
    return made | _weights(folder, good)


def _generation_configs() -> dict[str, str]:
    values: dict[str, Any] = {
        "a list": [],
        "texts for numbers": {"temperature": "x", "top_k": "y"},
        "numbers as text": {"temperature": "0.7", "top_k": "20", "do_sample": "true"},
        "nulls": {"temperature": None, "top_p": None, "eos_token_id": None},
        "eos that is text": {"eos_token_id": "x"},
        "eos that is negative": {"eos_token_id": -5},
        "stop strings of numbers": {"stop_strings": [1]},
        "bad words of numbers": {"bad_words_ids": 3},
        "negative lengths": {"max_length": -1, "max_new_tokens": -1},
        "a huge top_k": {"top_k": 10**30, "do_sample": True},
    }
    return {"empty": "", **{name: json.dumps(value) for name, value in values.items()}}


def _weights(folder: Path, good: Path) -> dict[str, Path]:
    whole = (good / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + size])
    name = "model.norm.weight"

    def changed(**fields: Any) -> bytes:
        raw = json.dumps({**header, name: {**header[name], **fields}}).encode()
        return struct.pack("<Q", len(raw)) + raw + whole[8 + size :]

    contents = {
        "empty": b"",
        "four bytes": bytes(4),
        "a header of zeros": bytes(64),
        "a header beyond the file": struct.pack("<Q", 1 << 62) + whole[8:],
        "a header that is a list": struct.pack("<Q", 2) + b"[]",
        "a header of nothing": struct.pack("<Q", 2) + b"{}",
        "half the file": whole[: len(whole) // 2],
        "a tensor of no elements": changed(shape=[0], data_offsets=[0, 0]),
        "a shape as text": changed(shape="64"),
        "a negative shape": changed(shape=[-64]),
        "a huge shape": changed(shape=[1 << 62, 1 << 62]),
        "an unknown dtype": changed(dtype="F13"),
        "a dtype that is a list": changed(dtype=[]),
        "offsets of nulls": changed(data_offsets=[None, None]),
        "offsets that are reversed": changed(data_offsets=[256, 0]),
        "three offsets": changed(data_offsets=[0, 1, 2]),
    }
    made = {}
    for what, data in contents.items():
        made[f"weights: {what}"] = path = _model(folder, good)
        (path / "model.safetensors").unlink()
        (path / "model.safetensors").write_bytes(data)
    indexes: dict[str, Any] = {
        "a list": [],
        "without a map": {},
        "a map that is a list": {"weight_map": []},
        "a map to numbers": {"weight_map": {name: 1}},
        "a map to nothing": {"weight_map": {name: ""}},
        "a map to a folder": {"weight_map": {name: "."}},
    }
    for what, value in indexes.items():
        made[f"weights: index, {what}"] = path = _model(folder, good)
        (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
        (path / "model.safetensors.index.json").write_text(json.dumps(value))
    return made


def tokenizers(folder: Path, good: Path) -> dict[str, Path]:
    """Folders of which only the tokenizer is odd."""
    tokenizer = json.loads((good / "tokenizer.json").read_text())
    settings = json.loads((good / "tokenizer_config.json").read_text())
    bare = {**tokenizer, "added_tokens": []}
    files: dict[str, dict[str, str | None]] = {
        "without specials": {
            "tokenizer.json": json.dumps(bare),
            "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}',
        },
        "empty": {"tokenizer.json": ""},
        "an object": {"tokenizer.json": "{}"},
        "a list": {"tokenizer.json": "[]"},
        "settings that are a list": {"tokenizer_config.json": "[]"},
        "settings that are empty": {"tokenizer_config.json": ""},
        "settings of numbers": {
            "tokenizer_config.json": json.dumps({**settings, "eos_token": 5, "pad_token": []})
        },
        "an unknown class": {
            "tokenizer_config.json": json.dumps({**settings, "tokenizer_class": "Moon"})
        },
        "a class that is a number": {
            "tokenizer_config.json": json.dumps({**settings, "tokenizer_class": 4})
        },
        "no files": {"tokenizer.json": None, "tokenizer_config.json": None},
        "a template that does not parse": {"chat_template.jinja": "{% for m in %}"},
        "a template that fails": {"chat_template.jinja": "{{ messages[7].content.x.y }}"},
        "a template that divides": {"chat_template.jinja": "{{ 1 // 0 }}"},
        "a template that raises": {"chat_template.jinja": "{{ raise_exception('no') }}"},
        "a template that says nothing": {"chat_template.jinja": ""},
        "a template that is binary": {"chat_template.jinja": "\udcff\udcfe"},
        "a template that is a number": {
            "chat_template.jinja": None,
            "tokenizer_config.json": json.dumps({**settings, "chat_template": 5}),
        },
        "templates that are nulls": {
            "chat_template.jinja": None,
            "tokenizer_config.json": json.dumps({**settings, "chat_template": [None]}),
        },
    }
    made = {}
    for name, changes in files.items():
        made[name] = path = _model(folder, good)
        for file, text in changes.items():
            (path / file).unlink(missing_ok=True)
            if text is not None:
                (path / file).write_bytes(text.encode(errors="surrogateescape"))
    return made


def adapters(folder: Path) -> dict[str, Path]:
    """PEFT folders for a model of hidden size 64."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    configs: dict[str, Any] = {
        "a list": [],
        "nothing": {},
        "a rank that is text": {**config, "r": "2"},
        "a rank of zero": {**config, "r": 0},
        "a negative rank": {**config, "r": -1},
        "a huge rank": {**config, "r": 10**30},
        "an alpha that is null": {**config, "lora_alpha": None},
        "an alpha that is no number": {**config, "lora_alpha": float("nan")},
        "targets of nulls": {**config, "target_modules": [None]},
        "targets that are null": {**config, "target_modules": None},
        "a target that is a number": {**config, "target_modules": 3},
        "a target that is no expression": {**config, "target_modules": "(("},
        "a pattern of ranks": {**config, "rank_pattern": {"q_proj": "x"}},
        "another method": {**config, "peft_type": []},
        "no tensors": config,
    }
    made = {}
    for index, (name, value) in enumerate(configs.items()):
        made[name] = path = folder / f"adapter{index}"
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(value))
        (path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    return made


def _model(folder: Path, good: Path) -> Path:
    """A copy of a model."""
    path = folder / f"model{len(list(folder.iterdir()))}"
    return Path(shutil.copytree(good, path))
