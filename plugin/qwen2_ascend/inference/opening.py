"""Opens an engine with its weights from the flags that name a model."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2_ascend import runtime as runtimes
from qwen2_ascend.checkpoint.lora_source import GivenLora, open_lora
from qwen2_ascend.checkpoint.source import lacks_config, open_source
from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning.saved_lora import find_saved_lora
from qwen2_ascend.inference.tokenizer import Tokenizer
from qwen2_ascend.launching import silence_foreign_warnings

if TYPE_CHECKING:
    from qwen2_ascend.checkpoint.adapter import Adapter
    from qwen2_ascend.checkpoint.readers.base import Source
    from qwen2_ascend.inference.engine import Engine
    from qwen2_ascend.inference.settings import ServedModelSettings
    from qwen2_ascend.runtime import Runtime

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """Weights, of which headers have been read."""

    source: Source
    adapter: Adapter | None
    """The adapter to merge into them."""


def open_model(model: ServedModelSettings) -> OpenedModel:
    """Opens what --load and --adapter name; of a LoRA run its base model and its adapter.

    Raises:
        UserError: nothing usable is there.
    """
    load, adapter = _weights_and_adapter(model)
    source = open_source(load, None, _config(model, load))
    given = GivenLora(rank=model.lora_r, alpha=model.lora_alpha, targets=model.lora_target_modules)
    if adapter is None and given.flags:
        raise UserError(f"{', '.join(given.flags)}: there is no adapter; name it with --lora-load.")
    opened = None if adapter is None else open_lora(adapter, source.config, given)
    return OpenedModel(source=source, adapter=opened)


def _weights_and_adapter(model: ServedModelSettings) -> tuple[Path, Path | None]:
    """The folder of the weights, and that of the adapter."""
    if (saved := find_saved_lora(model.load)) is None:
        return model.load, model.adapter
    if model.adapter is not None:
        raise UserError(
            f"--adapter {model.adapter}: --load {model.load} is a LoRA run, which has its own."
        )
    if saved.base is None or not saved.base.exists():
        raise UserError(
            f"{saved.folder}: its base model was {saved.base or 'random'}, which is not there; "
            f"name it with --load, and say --adapter {saved.folder}."
        )
    return saved.base, saved.folder


def _config(model: ServedModelSettings, load: Path) -> str | Path | None:
    """Where config.json is, if not beside the weights.

    MindSpeed-LLM's shards have none, and its command lines name the model's Hugging Face folder as
    that of the tokenizer.
    """
    tokenizer = model.tokenizer_name_or_path
    if model.config is not None or tokenizer is None or not lacks_config(load):
        return model.config
    return tokenizer if (tokenizer / "config.json").is_file() else None


def open_tokenizer(model: ServedModelSettings, source: Source) -> Tokenizer:
    """The tokenizer: of the folder that the flag names, or beside config.json.

    Raises:
        UserError: there is none.
    """
    return Tokenizer(model.tokenizer_name_or_path or config_folder(source), model.prompt_type)


def config_folder(source: Source) -> Path:
    """Where config.json is."""
    return next(path.parent for path in source.side_files if path.name == "config.json")


def start_engine(
    model: ServedModelSettings, opened: OpenedModel, *, num_rows: int
) -> tuple[Runtime, Engine]:
    """The device, the process groups and the loaded model.

    Raises:
        UserError: the device cannot be used or the weights do not fit.
    """
    silence_foreign_warnings()
    source, adapter = opened.source, opened.adapter
    runtime = runtimes.start(
        None if model.device == "auto" else model.device,
        mindspeed=model.mindspeed,
        timeout_seconds=60 * model.distributed_timeout_minutes,
    )
    layout, dtype = model.layout(), model.dtype(source.config)
    backend = model.backend
    if backend == "auto":
        backend = "npu" if runtime.name == "npu" else "torch"
    logger.info(f"{runtime.describe()}, TP{layout.tp} PP{layout.pp}, {dtype}, {backend} operators")
    runtimes.initialize_model_parallel(layout, source.config.num_layers)

    from qwen2_ascend.inference.engine import load_engine  # with megatron-core

    start = time.monotonic()
    engine = load_engine(
        source,
        layout,
        dtype=dtype,
        backend=backend,
        num_rows=max(num_rows, 1),
        adapter=adapter,
    )
    merged = f" with the adapter in {adapter.folder}" if adapter else ""
    logger.info(f"weights: {source.describe()}{merged}, loaded in {time.monotonic() - start:.1f} s")
    return runtime, engine
