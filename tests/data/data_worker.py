"""Checks of pretraining data that need several ranks; run by test_data_on_ranks.py."""

from __future__ import annotations

from distributed.harness import Checks, Run, main

CHECKS = Checks()


def _build(run: Run, prefix: str = "A", cache: str = "cache", **settings):
    from qwen2_ascend.data.pretraining import PretrainingDatasetBuilder

    words = ["0.4", str(run.folder / prefix), "0.6", str(run.folder / "B")]
    given = {"data_path": words, "num_samples": (64, 8, 0), "split": "80,20", **settings}
    return PretrainingDatasetBuilder(
        seq_length=16, seed=7, eod_token=0, data_cache_path=run.folder / cache, **given
    ).build()


def _write(run: Run) -> None:
    import torch.distributed as dist

    from data.corpora import write_indexed

    if run.runtime.rank == 0:
        write_indexed(run.folder / "A", [10, 20, 30] * 20)
        write_indexed(run.folder / "B", [15, 25] * 20, first=1001)
    dist.barrier()


def _digest(datasets) -> str:
    import hashlib

    digest = hashlib.sha256()
    for dataset in datasets[:2]:
        for i in range(len(dataset)):
            digest.update(dataset[i]["tokens"].numpy().tobytes())
    return digest.hexdigest()


@CHECKS.add(world_size=2)
def rank_0_builds_the_cache_and_all_ranks_read_the_same(run: Run) -> str:
    import numpy
    import torch.distributed as dist

    _write(run)
    saved, save = [], numpy.save
    numpy.save = lambda path, *args, **kwargs: (saved.append(path), save(path, *args, **kwargs))
    try:
        mine = _digest(_build(run))
    finally:
        numpy.save = save
    assert bool(saved) == (run.runtime.rank == 0), saved
    everyones: list[str] = [""] * 2
    dist.all_gather_object(everyones, mine)
    assert len(set(everyones)) == 1
    return f"rank {run.runtime.rank} wrote {len(saved)} files"


@CHECKS.add(world_size=2)
def a_users_mistake_is_raised_on_every_rank_and_nobody_waits(run: Run) -> None:
    import pytest

    from qwen2_ascend.errors import UserError

    _write(run)
    with pytest.raises(UserError, match=r"missing\.bin: no such file"):
        _build(run, prefix="missing")


@CHECKS.add(world_size=2)
def a_cache_that_is_not_shared_is_named(run: Run) -> None:
    """Rank 1 looks for the cache elsewhere, as on a node with a disk of its own."""
    from qwen2_ascend.errors import UserError

    _write(run)
    try:
        # one dataset of one split: rank 1 fails at it, and rank 0 would wait for it at the next
        one = {"data_path": [str(run.folder / "A")], "num_samples": (16, 0, 0)}
        _build(run, cache=f"cache-of-{run.runtime.rank}", **one)
    except UserError as error:
        assert run.runtime.rank == 1
        assert "must be on storage that all nodes share" in str(error)
    else:
        assert run.runtime.rank == 0


@CHECKS.add(world_size=2)
def each_node_writes_the_index_of_its_own_disk(run: Run) -> str:
    """Two nodes of one rank each, with a cache of their own; both read the same samples."""
    import os

    import torch.distributed as dist

    _write(run)
    rank, cache = run.runtime.rank, f"disk-of-{run.runtime.rank}"
    os.environ["LOCAL_RANK"] = "0"
    try:
        built = _build(run, cache=cache, each_node_builds=True)
    finally:
        os.environ["LOCAL_RANK"] = str(rank)
    assert dist.get_rank() == rank
    digests: list[str] = [""] * 2
    dist.all_gather_object(digests, _digest(built))
    assert digests[0] == digests[1]
    written = sorted(path.name for path in (run.folder / cache).iterdir())
    assert len(written) >= 8, written
    return f"{len(written)} files"


@CHECKS.add(world_size=2)
def a_folder_of_checkpoints_must_be_shared(run: Run) -> str:
    import pytest

    from qwen2_ascend.errors import UserError
    from qwen2_ascend.training.setup import require_shared

    require_shared(run.folder / "save")
    (run.folder / f"{run.runtime.rank}").mkdir()
    with pytest.raises(UserError, match="is not seen here") as caught:
        require_shared(run.folder / f"{run.runtime.rank}" / "save")
    assert "rank 1" in str(caught.value)
    return str(caught.value)


if __name__ == "__main__":
    main(CHECKS)
