"""Pretraining from the command line to the exit status: what `launch/pretrain_qwen2.py` runs.

Imports of torch and megatron-core wait until the settings are known to be right: `--help` and
refusals answer at once, and `--mindspeed` has to come before megatron-core.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen2_ascend.errors import Faults, UserError, raise_if
from qwen2_ascend.launching import launched
from qwen2_ascend.training.settings import PretrainSettings, parse, validate
from qwen2_ascend.training.setup import (
    Start,
    build_chunks,
    build_run,
    checkpoint_identity,
    find_start,
    resume_if_saved,
    run_side_files,
    start_runtime,
    train_and_report,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `launch/pretrain_qwen2.py`.

    Args:
        arguments: the flags; sys.argv's without it.

    Returns:
        The exit status, as `launched` has it.
    """
    return launched(lambda: pretrain(parse(arguments)))


def pretrain(settings: PretrainSettings) -> None:
    """Trains as `settings` say, as one rank of torchrun's or as a process alone.

    Raises:
        UserError: settings, data or checkpoint are not as they have to be.
        NonFiniteError: the loss or the gradient norm is not finite, and that is to end the run.
    """
    start = checked_start(settings)
    settings = start.settings
    runtime, say = start_runtime(settings, start.config)
    train_data, valid_data = pretraining_data(settings, start, runtime.world_size)
    chunks = build_chunks(settings, start, runtime, say)
    run = build_run(settings, runtime, chunks, train_data=train_data, valid_data=valid_data)
    identity = checkpoint_identity(settings, start)
    resume_if_saved(run, start, identity, say)
    train_and_report(run, identity, say)
    runtime.close()


def checked_start(settings: PretrainSettings) -> Start[PretrainSettings]:
    """Where the run begins, once all is checked that can be without a process group.

    Raises:
        UserError: settings, data or checkpoint are not as they have to be; every fault at once.
    """
    from qwen2_ascend.data.pretraining import check_pretraining_data

    data, faults = settings.data, Faults()
    start = faults.of(lambda: find_start(settings))
    if start is not None:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        faults.of(lambda: validate(start.settings, start.config, world_size))
    faults.of(
        lambda: check_pretraining_data(
            data_path=data.data_path,
            train_data_path=data.train_data_path,
            valid_data_path=data.valid_data_path,
            split=data.split,
        )
    )
    raise_if(faults)
    assert start is not None
    return start


def pretraining_data(
    settings: PretrainSettings, start: Start[PretrainSettings], world_size: int
) -> tuple[Any, Any]:
    """(training, validation) datasets; the latter None where its loss is not asked for.

    Raises:
        UserError: the data is not there, or is not what the model was made for.
    """
    data, seed = settings.data, settings.runtime.seed
    train_iters = settings.train_iters(world_size)
    global_batch_size = settings.global_batch_size(world_size)
    num_train, num_valid = train_iters * global_batch_size, data.eval_iters * global_batch_size
    if data.mock_data:
        from qwen2_ascend.training.mock_data import MockDataset

        sizes = (settings.batch.seq_length, start.config.vocab_size)
        valid = MockDataset(num_valid, *sizes, seed=seed + 1) if num_valid else None
        return MockDataset(num_train, *sizes, seed=seed), valid

    from qwen2_ascend.data.pretraining import build_pretraining_datasets

    datasets = build_pretraining_datasets(
        num_samples=(num_train, num_valid, 0),
        seq_length=settings.batch.seq_length,
        seed=seed,
        eod_token=_eod_token(settings, start),
        data_path=data.data_path or None,
        train_data_path=data.train_data_path or None,
        valid_data_path=data.valid_data_path or None,
        split=data.split,
        vocab_size=start.config.vocab_size,
        data_cache_path=data.data_cache_path,
        reset_position_ids=data.reset_position_ids,
        eod_mask_loss=data.eod_mask_loss,
    )
    return datasets.train, datasets.valid


def _eod_token(settings: PretrainSettings, start: Start[PretrainSettings]) -> int:
    """What ends a document. Without --eod-mask-loss and --reset-position-ids nothing asks."""
    data = settings.data
    if data.eod_token is not None:
        return data.eod_token
    config = dict(run_side_files(settings, start)).get(Path("config.json"), b"{}")
    token = json.loads(config).get("eos_token_id")
    token = token[0] if isinstance(token, list) and token else token
    if isinstance(token, int):
        return token
    if data.eod_mask_loss or data.reset_position_ids:
        raise UserError("give --eod-token: config.json has no eos_token_id.")
    return 0
