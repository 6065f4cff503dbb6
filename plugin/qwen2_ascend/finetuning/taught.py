"""What a run has taught a model besides its weights: where an answer ends, and how chats look.

A base model that is tuned on chats learns to say `<|im_end|>`, and its generation_config.json still
knows its own end of text alone. So the folder of --save-hf says both.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from qwen2_ascend.chat_template import end_of_turn
from qwen2_ascend.data.chat.rendering import given_template
from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning.settings import FinetuneSettings
from qwen2_ascend.pretrained import open_tokenizer, read_json_object
from qwen2_ascend.training.plan import RunPlan

logger = logging.getLogger(__name__)

TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def taught_files(plan: RunPlan[FinetuneSettings]) -> dict[str, bytes]:
    """Files of the exported folder that differ from the base model's, by name.

    Raises:
        UserError: --chat-template cannot be read.
    """
    folder = tokenizer_folder(plan)
    if folder is None or plan.source is None:
        return {}
    template = given_template(plan.settings.chat)
    files = {} if template is None else {"chat_template.jinja": template.encode()}
    try:
        token = end_of_turn(open_tokenizer(folder), template)
    except UserError:
        return files  # the chats were prepared somewhere else
    generation = _generation_config(plan)
    known = generation.get("eos_token_id")
    eos = known if isinstance(known, list) else [] if known is None else [known]
    if token is None or token in eos:
        return files
    logger.info(
        f"generation_config.json: answers end with token {token} too, as the chats have taught"
    )
    generation["eos_token_id"] = [token, *eos]
    files["generation_config.json"] = (json.dumps(generation, indent=2) + "\n").encode()
    return files


def tokenizer_folder(plan: RunPlan[FinetuneSettings]) -> str | None:
    """Where the tokenizer is: named, beside the weights, or beside the config."""
    if name := plan.settings.tuning.tokenizer_name_or_path:
        return name
    if plan.source is not None:
        folders = {path.parent for path in plan.source.side_files if "token" in path.name}
        if folders:
            return str(sorted(folders)[0])
    config = plan.settings.model.config
    return config if config and Path(config).is_dir() else None


def _generation_config(plan: RunPlan[FinetuneSettings]) -> dict[str, Any]:
    """The base model's; of a model without one what its config.json says of tokens."""
    assert plan.source is not None
    side_files = {path.name: path for path in plan.source.side_files}
    if path := side_files.get("generation_config.json"):
        return read_json_object(path)
    config = read_json_object(side_files["config.json"])
    return {key: config[key] for key in TOKEN_KEYS if config.get(key) is not None}
