"""Checks of chat data that need a model or several ranks; run by test_chat_on_ranks.py."""

from __future__ import annotations

from typing import Any

from distributed.harness import Checks, Run, main

CHECKS = Checks()
SEQ_LENGTH = 96
NUM_CHATS = 12


def _stored(run: Run) -> str:
    """Chats of 5 to 60 tokens of a vocabulary of 256, the loss on some of them."""
    import numpy as np

    from data.corpora import write_documents

    draw = np.random.default_rng(2)
    chats = [draw.integers(1, 256, draw.integers(5, 61)) for _ in range(NUM_CHATS)]
    labels = [np.where(ids % 3 == 0, -100, ids) for ids in chats]
    for ids, row in zip(chats, labels, strict=True):
        row[1] = ids[1]  # each chat has a loss
    for key, rows in (("input_ids", chats), ("labels", labels)):
        write_documents(run.folder / f"chats_packed_{key}_document", rows, np.int32)
    return str(run.folder / "chats")


def _batches(run: Run, prefix: str, **more: Any) -> list[dict[str, Any]]:
    from qwen2_ascend.data.chat.build import ChatDatasetBuilder
    from qwen2_ascend.data.sampler import build_data_iterator

    micro_batch_size = more.pop("micro_batch_size")
    builder = ChatDatasetBuilder(seq_length=SEQ_LENGTH, seed=5, data_path=[prefix], **more)
    data = builder.build().train
    data = data.with_num_samples(-(-len(data) // micro_batch_size) * micro_batch_size)
    return list(build_data_iterator(data, 0, micro_batch_size, 0, 1))


def _losses(model: Any, batch: dict[str, Any], *, apart: bool = True) -> Any:
    from qwen2_ascend.model.packed import PackedBatch

    more = {}
    if "ends" in batch and apart:
        more["packed_seq_params"] = PackedBatch(batch["ends"], batch["position_ids"])
    return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], **more)


def _by_chat(batch: dict[str, Any], losses: Any) -> dict[tuple[int, ...], list[float]]:
    """The losses of every chat of a batch, under its first tokens."""
    from itertools import pairwise

    s = batch["tokens"].shape[1]
    ends = batch.get("ends") or range(s, batch["tokens"].numel() + 1, s)
    tokens, mask, losses = (x.flatten() for x in (batch["tokens"], batch["loss_mask"], losses))
    found = {}
    for start, end in pairwise((0, *ends)):
        here = mask[start:end].bool()
        if here.any():
            found[tuple(tokens[start : start + 4].tolist())] = losses[start:end][here].tolist()
    return found


def _largest_difference(first: dict, second: dict) -> float:
    assert first.keys() == second.keys() and len(first) == NUM_CHATS
    return max(abs(a - b) for key in first for a, b in zip(first[key], second[key], strict=True))


def _model(run: Run) -> Any:
    """A small model in fp32 with biases and norms that are not their defaults."""
    import torch

    from helpers import tiny_config
    from qwen2_ascend import runtime
    from qwen2_ascend.model.build import build_model
    from qwen2_ascend.parallel import ParallelLayout

    config = tiny_config()
    runtime.destroy_model_parallel()
    runtime.initialize_model_parallel(ParallelLayout(), config.num_layers)
    run.runtime.seed_all(5)
    (chunk,) = build_model(config, ParallelLayout(), dtype="fp32")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in chunk.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            scale = 0.3 if weight.dim() == 1 else 0.3 * weight.shape[-1] ** -0.5
            weight.copy_(noise * scale + ("norm" in name))
    return chunk


@CHECKS.add(world_size=1)
def packed_and_single_chats_have_the_same_losses_and_gradients(run: Run) -> str:
    """Each token has the same, with several packs in a batch, and with padded single chats too."""
    import torch

    model, prefix = _model(run), _stored(run)
    kinds: dict[str, dict[str, Any]] = {
        "alone": dict(variable_seq_lengths=True, micro_batch_size=1),
        "padded": dict(micro_batch_size=4),
        "variable": dict(variable_seq_lengths=True, pad_to_multiple_of=8, micro_batch_size=3),
        "packed": dict(pack=True, micro_batch_size=2),
    }
    losses, gradients = {}, {}
    for kind, settings in kinds.items():
        model.zero_grad()
        losses[kind], total, seen = {}, 0.0, set()
        for batch in _batches(run, prefix, **settings):
            new = [i for i, n in enumerate(batch["index"].tolist()) if n not in seen]
            seen |= set(batch["index"].tolist())
            per_token = _losses(model, batch)
            losses[kind] |= _by_chat(batch, per_token.detach())
            total = total + (per_token * batch["loss_mask"])[new].sum()
        total.backward()
        gradients[kind] = torch.cat([p.grad.flatten() for p in model.parameters()])
    differences = {k: _largest_difference(losses["alone"], losses[k]) for k in kinds}
    assert max(differences.values()) < 1e-5, differences
    size = gradients["alone"].abs().max()
    off = {k: float((g - gradients["alone"]).abs().max() / size) for k, g in gradients.items()}
    assert max(off.values()) < 1e-5, off
    mixed: dict[tuple[int, ...], list[float]] = {}
    for batch in _batches(run, prefix, pack=True, micro_batch_size=2):
        mixed |= _by_chat(batch, _losses(model, batch, apart=False))
    together = _largest_difference(losses["alone"], mixed)
    assert together > 0.01, "without the ends chats should see one another"
    return (
        f"losses off by {max(differences.values()):.1e}, gradients by {max(off.values()):.1e} of "
        f"the largest; losses by {together:.1e} if the chats see one another"
    )


@CHECKS.add(world_size=2)
def a_file_of_chats_is_prepared_by_rank_0_and_read_by_all(run: Run) -> str:
    import torch.distributed as dist

    from data.chats import chat_rows, save_chat_tokenizer, write_rows
    from qwen2_ascend.data.chat import prepare
    from qwen2_ascend.data.chat.build import ChatDatasetBuilder

    if run.runtime.rank == 0:
        save_chat_tokenizer(run.folder / "tokenizer")
        write_rows(run.folder / "a.jsonl", chat_rows(20))
    dist.barrier()
    calls, real = [], prepare.preprocess_chats
    prepare.preprocess_chats = lambda settings: (calls.append(settings), real(settings))
    try:
        builder = ChatDatasetBuilder(
            seq_length=256,
            seed=1,
            data_path=[str(run.folder / "a.jsonl")],
            tokenizer=str(run.folder / "tokenizer"),
            pack=True,
            workers=1,
        )
        data = builder.build().train
    finally:
        prepare.preprocess_chats = real
    assert len(calls) == (run.runtime.rank == 0)
    mine = [(data[i]["tokens"].tolist(), data[i]["ends"]) for i in range(len(data))]
    everyones: list[Any] = [None] * 2
    dist.all_gather_object(everyones, mine)
    assert everyones[0] == everyones[1]
    return f"{len(mine)} packs"


@CHECKS.add(world_size=2)
def a_bad_row_is_raised_on_every_rank_and_nobody_waits(run: Run) -> None:
    import pytest
    import torch.distributed as dist

    from data.chats import save_chat_tokenizer, write_rows
    from qwen2_ascend.data.chat.build import ChatDatasetBuilder
    from qwen2_ascend.errors import UserError

    if run.runtime.rank == 0:
        save_chat_tokenizer(run.folder / "tokenizer")
        write_rows(run.folder / "a.jsonl", [{"messages": [{"role": "user", "content": "q"}]}])
    dist.barrier()
    path = run.folder / "a.jsonl"
    builder = ChatDatasetBuilder(
        seq_length=64,
        seed=1,
        data_path=[str(path)],
        tokenizer=str(run.folder / "tokenizer"),
        workers=1,
    )
    with pytest.raises(UserError) as caught:
        builder.build()
    assert f"{path}:1: the assistant says nothing to train on." in caught.value.faults


if __name__ == "__main__":
    main(CHECKS)
