"""Chats as MindSpeed-LLM's own code writes them, token by token and label by label.

MINDSPEED_LLM_PATH names a checkout, or several with the path separator between them; without it
these tests are skipped. Of a checkout two files are imported, its templates and their formatters.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from data.chats import save_chat_tokenizer
from data.corpora import documents, save_tokenizer
from qwen2_ascend.data.chat.formats import Chat
from qwen2_ascend.data.chat.rendering import ChatRenderer
from qwen2_ascend.prompt_types import PROMPT_FORMATS

ROOM = "mindspeed_llm/tasks/preprocess"
SLOTS = "configs/finetune/templates.json"
NAMED = [Path(path) for path in os.environ.get("MINDSPEED_LLM_PATH", "").split(os.pathsep) if path]
CHECKOUTS = [path for path in NAMED if (path / SLOTS).is_file()]

pytestmark = pytest.mark.skipif(
    not CHECKOUTS, reason="MINDSPEED_LLM_PATH names no checkout of MindSpeed-LLM"
)


class Theirs(NamedTuple):
    """A checkout's templates."""

    module: Any
    slots: Path


@pytest.fixture(scope="module", params=CHECKOUTS or [None], ids=str)
def theirs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Theirs]:
    """Their module as a package of its own: its real one imports all of training."""
    package = tmp_path_factory.mktemp("checkout") / "mindspeed_llm_prompts"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("templates.py", "formatter.py"):
        shutil.copy(request.param / ROOM / name, package)
    sys.path.insert(0, str(package.parent))
    try:
        module = importlib.import_module("mindspeed_llm_prompts.templates")
        yield Theirs(module, request.param / SLOTS)
    finally:
        sys.path.remove(str(package.parent))
        for name in [name for name in sys.modules if name.startswith("mindspeed_llm_prompts")]:
            del sys.modules[name]


def chats(count: int) -> list[tuple[str, list[dict[str, str]]]]:
    """System texts, some of them empty, and turns."""
    draw, texts = random.Random(3), documents(400, seed=5, longest=12)
    return [
        (
            draw.choice(["", draw.choice(texts)]),
            [
                {"role": role, "content": draw.choice(texts)}
                for _ in range(draw.randint(1, 3))
                for role in ("user", "assistant")
            ],
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("is_base", [True, False])
@pytest.mark.parametrize("name", PROMPT_FORMATS)
def test_tokens_and_labels_are_theirs(
    name: str, is_base: bool, theirs: Theirs, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    slots = theirs.slots.read_text(encoding="utf-8")
    if name not in {one["name"] for one in json.loads(slots)}:
        pytest.skip(f"this checkout has no {name}")
    if name == "qwen_lf":
        pytest.skip(f"{name} cuts pairs by a module that imports all of training")
    (save_tokenizer if is_base else save_chat_tokenizer)(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    try:
        theirs.module.fix_model_tokenizer(tokenizer, name, str(theirs.slots), None)
    except TypeError as error:
        pytest.skip(f"{name} needs an older transformers: {error}")
    template = theirs.module.get_model_template(name, str(theirs.slots), None)
    ours = ChatRenderer(AutoTokenizer.from_pretrained(tmp_path), prompt_type=name)
    for system, turns in chats(40):
        ids: list[int] = []
        labels: list[int] = []
        for asked, answered in template.encode_multiturn(tokenizer, turns, system, "", 100_000):
            ids += asked + answered
            labels += [-100] * len(asked) + answered
        messages = [{"role": "system", "content": system}] * bool(system) + turns
        said = tuple(i for i, m in enumerate(messages) if m["role"] == "assistant")
        (found,) = ours([Chat(messages, None, said)])
        assert not isinstance(found, ValueError), found
        assert found.ids.tolist() == ids
        trained = zip(found.ids.tolist(), found.trained.tolist(), strict=True)
        assert [i if is_trained else -100 for i, is_trained in trained] == labels
