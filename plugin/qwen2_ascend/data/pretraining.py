"""Pretraining data: megatron-core's GPTDataset over blends of indexed datasets.

Nothing is sampled here; megatron-core's builder does that, the same as in Megatron-LM, so a run
moved from there sees the same samples in the same order. What is added are the checks that keep
it from hanging or from reading something else than it was told to.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch._C._distributed_c10d import HashStore

from qwen2_ascend.data import indexed
from qwen2_ascend.data.blends import SPLITS, Blend, check_split, parse_blend
from qwen2_ascend.data.documents import DocumentRows
from qwen2_ascend.data.helpers_cpp import ensure_helpers_cpp
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.runtime.megatron_compat import each_node_builds_data
from qwen2_ascend.vocabulary import unknown_tokens


class PretrainingDatasets(NamedTuple):
    """Map-style datasets of dicts (`sampler.BATCH_KEYS`, each `[s]`); None where none is wanted."""

    train: Any
    valid: Any
    test: Any


class EodTokenizer:
    """All that GPTDataset wants of a tokenizer, for data that is tokenized already.

    `unique_identifiers` becomes part of the name of the cached sample indices; it carries the
    fingerprints of the data, which megatron-core itself leaves out.
    """

    def __init__(self, eod: int, vocab_size: int | None, data: dict[str, str]) -> None:
        self.eod = eod
        self.vocab_size = vocab_size
        self.unique_identifiers = OrderedDict(eod=eod, data=data)


@dataclass(frozen=True, kw_only=True)
class PretrainingDatasetBuilder:
    """Builds the training, validation and test datasets, by `build`. Every rank calls it.

    Rank 0 writes the sample indices, the others wait and read them. Without torch.distributed it
    works in the one process there is.
    """

    num_samples: tuple[int, int, int]
    """Samples wanted of train, valid and test; a split of which none is wanted is not built. Epochs
    are repeated as needed."""
    seq_length: int
    """Tokens in a sample."""
    seed: int
    """The seed of the shuffling."""
    eod_token: int | None
    """Id of the token that ends a document; None where there is none."""
    data_path: Sequence[str] | None = None
    """One prefix, several, or weights and prefixes in turn (`0.3 A 0.7 B`), divided by `split`."""
    train_data_path: Sequence[str] | None = None
    """The same, for training alone; instead of `data_path`."""
    valid_data_path: Sequence[str] | None = None
    """The same, for validation."""
    test_data_path: Sequence[str] | None = None
    """The same, for testing."""
    split: str = "969,30,1"
    """Shares of train, valid and test in `data_path`, by documents."""
    vocab_size: int | None = None
    """Rows of the model's embedding; the data's largest token is checked against it where the
    preparation noted that, else a sample of the tokens, and later every batch."""
    data_cache_path: str | Path | None = None
    """Where the sample indices go, on storage that all nodes share; beside the data when None."""
    keep_documents_apart: bool = False
    """A document sees itself alone, and its positions count from its start; see
    `documents.DocumentRows`."""
    eod_mask_loss: bool = False
    """Leave the loss at `eod_token` out."""
    each_node_builds: bool = False
    """The first rank of each node writes the sample indices, which are on storage of the node's
    own."""

    def build(self) -> PretrainingDatasets:
        """All three.

        Raises:
            UserError: data that is missing, damaged or too little, or settings that contradict.
        """
        datasets = self._built(self._megatron_settings())
        for dataset in filter(None, datasets):
            dataset.vocab_size = self.vocab_size  # for `build_data_iterator`
        raise_if(
            f"{name}: a blend without weights lasts one epoch, {len(dataset)} samples, and "
            f"{wanted} are wanted; put a weight before each prefix (0.3 A 0.7 B) to repeat them."
            for name, dataset, wanted in zip(SPLITS, datasets, self.num_samples, strict=True)
            if dataset is not None and len(dataset) < wanted
        )
        if not self.keep_documents_apart:
            return datasets
        rows = (data and DocumentRows(data, self.eod_token) for data in datasets)
        return PretrainingDatasets(*rows)

    def _megatron_settings(self) -> dict[str, Any]:
        """GPTDatasetConfig's fields, once the data has been checked."""
        blends = self._blends()
        shares = split_matrix(self.split) if self.data_path else [(0.0, 1.0)] * len(SPLITS)
        prints = self._check_data(blends, shares)
        source: dict[str, Any] = dict(blend_per_split=blends)
        if self.data_path:
            source = dict(blend=next(filter(None, blends)), split=self.split)
        return dict(
            random_seed=self.seed,
            sequence_length=self.seq_length,
            path_to_cache=None if self.data_cache_path is None else str(self.data_cache_path),
            tokenizer=EodTokenizer(self.eod_token or 0, self.vocab_size, prints),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=self.eod_mask_loss,
            create_attention_mask=False,
            **source,
        )

    def _blends(self) -> list[Blend | None]:
        """What each split reads; None where no sample of it is wanted."""
        per_split = (self.train_data_path, self.valid_data_path, self.test_data_path)
        if bool(self.data_path) == any(per_split):
            raise UserError(
                "give --data-path (divided by --split), or --train-data-path, --valid-data-path "
                f"and --test-data-path; {'both were' if self.data_path else 'none was'} given."
            )
        words = (self.data_path,) * len(SPLITS) if self.data_path else per_split
        raise_if(
            f"--{name}-data-path is missing, and {count} {name} samples are wanted."
            for name, given, count in zip(SPLITS, words, self.num_samples, strict=True)
            if count and not given
        )
        return [
            parse_blend(given) if given and count else None
            for given, count in zip(words, self.num_samples, strict=True)
        ]

    def _check_data(
        self, blends: Sequence[Blend | None], shares: Sequence[tuple[float, float]]
    ) -> dict[str, str]:
        """Fingerprints of all datasets by prefix, once each has what is wanted of it.

        Args:
            blends: one for each split, None where no sample is wanted.
            shares: (start, stop) of the documents that go to each split.
        """
        faults: list[str] = []
        prints: dict[str, str] = {}
        for prefix in dict.fromkeys(p for blend in blends if blend for p in blend.prefixes):
            try:
                dataset = indexed.open_indexed(prefix)
            except UserError as error:
                faults += error.faults
                continue
            prints[prefix] = indexed.fingerprint(prefix)
            faults += self._token_faults(prefix, dataset)
            for name, blend, (start, stop) in zip(SPLITS, blends, shares, strict=True):
                if not blend or prefix not in blend.prefixes:
                    continue
                n = len(dataset)
                tokens = dataset.sequence_lengths[round(start * n) : round(stop * n)].sum()
                # megatron-core repeats epochs until there are enough tokens, of none without end
                if not tokens:
                    of = f"split={self.split}" if self.data_path else "the file"
                    faults.append(
                        f"{prefix}: {of} leaves nothing of its {n} documents for {name}; give "
                        f"{name} a larger share, more documents, or ask for no sample of it."
                    )
        raise_if(faults)
        return prints

    def _token_faults(self, prefix: str, dataset: Any) -> list[str]:
        faults = []
        documents = indexed.sample_documents(dataset)
        largest = indexed.largest_token(prefix)
        if largest is None:
            largest = max((int(tokens.max(initial=0)) for tokens in documents), default=0)
        size = self.vocab_size
        if size is not None and (unknown := unknown_tokens([largest], size)):
            faults.append(f"{prefix} {unknown}")
        eod = self.eod_token if self.eod_mask_loss else None
        if eod is not None and not any(d.size and d[-1] == eod for d in documents):
            faults.append(
                f"{prefix}: no document ends with the end-of-document token {eod}, which "
                "--eod-mask-loss looks for; preprocess with --append-eod, or name the token that "
                "was appended with --eod-token."
            )
        return faults

    def _built(self, settings: dict[str, Any]) -> PretrainingDatasets:
        ensure_helpers_cpp()
        config: Any = GPTDatasetConfig(**settings)
        if config.split_matrix is not None:
            for i, count in enumerate(self.num_samples):
                if not count:
                    config.split_matrix[i] = None
        by_node = each_node_builds_data() if self.each_node_builds else contextlib.nullcontext()
        sizes = list(self.num_samples)
        with _process_group(), _cache_errors(config.path_to_cache), by_node:
            builder = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config)
            return PretrainingDatasets(*builder.build())


def is_repeated(dataset: Any, share: float) -> bool:
    """Whether some part of a blend is read more than once by `share` of the samples of `dataset`.

    megatron-core shuffles the epochs of a part together, all of them or all but the last. So the
    order of a part that is repeated depends on how many samples are wanted; that of one which lasts
    does not.

    Args:
        dataset: a GPTDataset, a BlendedDataset of them, or DocumentRows around either.
        share: above 1 for a dataset of more samples than these.
    """
    dataset = getattr(dataset, "data", dataset)
    parts = getattr(dataset, "datasets", [dataset])
    return any(
        # a sample's last label is one token more
        share * part.num_samples * part.config.sequence_length + 1
        > part.dataset.sequence_lengths[part.indices].sum(dtype=np.int64)
        for part in parts
        if part.num_samples is not None
    )


def split_matrix(split: str) -> list[tuple[float, float]]:
    """(start, stop) of train, valid and test as shares of all documents, as Megatron cuts them.

    Raises:
        UserError: not up to three shares, or none above zero.
    """
    check_split(split)
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    return [share or (0.0, 0.0) for share in matrix]


@contextlib.contextmanager
def _process_group() -> Iterator[None]:
    """A group of one where there is none: BlendedDataset asks for its rank without asking first."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _cache_errors(data_cache_path: str | None) -> Iterator[None]:
    """Turns megatron-core's failures to write or find its index cache into a UserError."""
    where = data_cache_path or "the folder of the data"
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            f"sample indices that rank 0 wrote to {where} are not seen here ({error}); "
            "--data-cache-path must be on storage that all nodes share; where there is none, "
            "--no-shared-storage lets each node write its own."
        ) from error
    except Exception as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"sample indices cannot be written to {where}: {cause}; "
            "give --data-cache-path a folder that can be written."
        ) from error
