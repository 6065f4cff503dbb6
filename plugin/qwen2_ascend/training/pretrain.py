"""Pretraining after the start: data, model and training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from qwen2_ascend.data.pretraining import PretrainingDatasetBuilder, is_repeated
from qwen2_ascend.errors import UserError
from qwen2_ascend.runtime import Runtime
from qwen2_ascend.training.loop import TrainingRun
from qwen2_ascend.training.mock_data import MockDataset
from qwen2_ascend.training.plan import RunPlan
from qwen2_ascend.training.settings import PretrainSettings
from qwen2_ascend.training.setup import (
    build_chunks,
    build_run,
    resume_if_saved,
    run_side_files,
    train_and_report,
)

logger = logging.getLogger(__name__)


def train(plan: RunPlan[PretrainSettings], runtime: Runtime) -> None:
    """Trains to the end or until told to stop, and parts the ranks.

    Raises:
        UserError: data or checkpoint are not as they have to be.
    """
    train_and_report(prepare(plan, runtime), plan)
    runtime.close()


def prepare(plan: RunPlan[PretrainSettings], runtime: Runtime) -> TrainingRun:
    """Data, model and, when one is resumed, the state of the run.

    Raises:
        UserError: data or checkpoint are not as they have to be.
    """
    train_data, valid_data = pretraining_data(plan)
    if plan.settings.data.keep_documents_apart:
        token = _eod_token(plan)
        ends = "where the data says so" + ("" if token is None else f" and after token {token}")
        logger.info(
            f"a document sees only itself, its positions count from its start; it ends {ends}"
        )
    chunks = build_chunks(plan, runtime)
    run = build_run(
        plan.settings,
        runtime,
        chunks,
        train_data=train_data,
        valid_data=valid_data,
        length=plan.length,
    )
    resume_if_saved(run, plan)
    if runtime.rank == 0 and not plan.settings.data.mock_data:
        log_another_order(plan, train_data)
    return run


def log_another_order(plan: RunPlan[PretrainSettings], train_data: Any) -> None:
    """Says where a resumed run may read its data in another order than it began with."""
    schedule = plan.saved_state.get("opt_param_scheduler") or {}
    was, now = schedule.get("wd_incr_steps"), plan.length.num_samples
    if was in (None, now) or not is_repeated(train_data, max(was, now) / now):
        return
    logger.info(
        f"data: the run that is resumed was to take {was:,} samples, and now takes {now:,}; the "
        "order of data that is read more than once depends on that, so some samples may come "
        "again and others not at all; --train-iters and --global-batch-size as they were keep it"
    )


def pretraining_data(plan: RunPlan[PretrainSettings]) -> tuple[Any, Any]:
    """(training, validation) datasets; the latter None where its loss is not asked for.

    Raises:
        UserError: the data is not there, or is not what the model was made for.
    """
    settings, length = plan.settings, plan.length
    data, seed = settings.data, settings.runtime.seed
    num_valid = (data.eval_iters or 0) * length.global_batch_size
    num_train = length.num_samples
    if data.mock_data:
        sizes = (settings.batch.seq_length, plan.config.vocab_size)
        valid = MockDataset(num_valid, *sizes, seed=seed + 1) if num_valid else None
        return MockDataset(num_train, *sizes, seed=seed), valid

    datasets = PretrainingDatasetBuilder(
        num_samples=(num_train, num_valid, 0),
        seq_length=settings.batch.seq_length,
        seed=seed,
        eod_token=_eod_token(plan),
        data_path=data.data_path or None,
        train_data_path=data.train_data_path or None,
        valid_data_path=data.valid_data_path or None,
        split=data.split,
        vocab_size=plan.config.vocab_size,
        data_cache_path=data.data_cache_path,
        keep_documents_apart=data.keep_documents_apart,
        eod_mask_loss=data.eod_mask_loss,
        each_node_builds=data.no_shared_storage,
    ).build()
    return datasets.train, datasets.valid


def _eod_token(plan: RunPlan[PretrainSettings]) -> int | None:
    """What ends a document; None where nothing says it, and no loss is to be left out there."""
    data = plan.settings.data
    if data.eod_token is not None:
        return data.eod_token
    config = dict(run_side_files(plan)).get(Path("config.json"), b"{}")
    token = json.loads(config).get("eos_token_id")
    token = token[0] if isinstance(token, list) and token else token
    if isinstance(token, int):
        return token
    if data.eod_mask_loss:
        raise UserError("give --eod-token: config.json has no eos_token_id.")
    return None
