"""Opens a checkpoint, whatever its kind, as a list of held tensors; refuses what does not fit.

Everything is checked here against the mapping table, from headers alone, before any byte moves:
missing and extra tensors, shapes, dtypes, all named at once.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from qwen2_ascend.checkpoint.formats import (
    hugging_face,
    megatron,
    megatron_optimizer,
    torch_dist,
)
from qwen2_ascend.checkpoint.formats.stored import NUMPY_DTYPES, StoredTensor
from qwen2_ascend.checkpoint.plan import Held, volume
from qwen2_ascend.checkpoint.progress import size_text
from qwen2_ascend.checkpoint.rules import (
    EMBEDDING,
    OUTPUT,
    Piece,
    Rule,
    Shard,
    hugging_face_pieces,
    megatron_pieces,
    qwen2_rules,
)
from qwen2_ascend.checkpoint.slices import Run, owners, parts_of
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError, printable, raise_if
from qwen2_ascend.parallel import ParallelLayout

WEIGHT_DTYPES = ("bf16", "fp16", "fp32")
_MOST_NAMED = 20
_EMBEDDING, _PREFIX = "model.embed_tokens.weight", "model."
_UNEVEN = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "noop_layers",
)
"""Megatron-LM's and MindSpeed-LLM's flags for stages that differ."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened checkpoint: headers read and checked, no tensor data touched."""

    kind: str
    """ "hf" or "mg"."""
    folder: Path
    config: Qwen2Config
    held: tuple[Held, ...]
    side_files: tuple[Path, ...]
    """config.json, tokenizer and chat template files."""
    format: str
    """"safetensors", "megatron" or "torch_dist"."""
    layout: ParallelLayout | None = None
    """How Megatron shards are cut; None where the files do not depend on a layout."""
    padded_vocab_size: int

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(sorted({held.stored.dtype for held in self.held}))

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(held.stored.path for held in self.held))

    def describe(self) -> str:
        """One line for a log."""
        size = size_text(sum(held.stored.num_bytes for held in self.held))
        cut = ""
        if self.layout is not None:
            cut = f", TP{self.layout.tp} PP{self.layout.pp}"
            if n := self.layout.num_layers_per_virtual_pipeline_stage:
                cut += f", {n} layers per virtual stage"
        return printable(
            f"{self.folder}: {'Hugging Face' if self.kind == 'hf' else 'Megatron shards'} "
            f"({self.format}){cut}, {len(self.held)} tensors, {size} {'/'.join(self.dtypes)}"
        )


def detect(folder: str | Path) -> str:
    """What a folder holds: "hf" or "mg".

    Raises:
        UserError: neither, or both.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(hugging_face.missing_model(folder))
    is_hf = hugging_face.is_model_folder(folder)
    is_mg = megatron.is_checkpoint_folder(folder)
    if is_hf and is_mg:
        raise UserError(
            f"{folder}: holds Hugging Face weights and Megatron shards; say which with "
            "--load-model-type."
        )
    if is_mg:
        return "mg"
    if not is_hf and any(folder.glob("iter_*")):
        megatron.iteration_folder(folder)  # says what is missing
    if not is_hf:
        hugging_face.read_tensors(folder)  # says what is missing
    return "hf"


def _check_kind(folder: Path, kind: str) -> None:
    """Refuses a folder that is all the other kind.

    Raises:
        UserError: it is.
    """
    is_hf = hugging_face.is_model_folder(folder)
    is_mg = megatron.is_checkpoint_folder(folder)
    if kind == "mg" and is_hf and not is_mg:
        raise UserError(
            f"{folder}: is a Hugging Face folder, no Megatron shards; leave --load-model-type out, "
            "or say hf."
        )
    if kind == "hf" and is_mg and not is_hf:
        raise UserError(
            f"{folder}: holds Megatron shards, no Hugging Face weights; leave --load-model-type "
            "out, or say mg."
        )


def open_source(
    folder: str | Path, kind: str | None = None, hf_cfg_dir: str | Path | None = None
) -> Source:
    """Opens a Hugging Face folder, Megatron shards or a training checkpoint.

    Args:
        folder: the folder; for Megatron also one iteration's.
        kind: "hf" or "mg"; detected when None.
        hf_cfg_dir: where config.json and the tokenizer are, if not beside the weights.

    Raises:
        UserError: anything in it that does not fit the config; every fault at once.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(hugging_face.missing_model(folder))
    if kind is not None:
        _check_kind(folder, kind)
    kind = kind or detect(folder)
    iteration = megatron.iteration_folder(folder) if kind == "mg" else folder
    config_folder = _config_folder(folder, iteration, hf_cfg_dir)
    config = Qwen2Config.from_pretrained(config_folder)
    side_files = hugging_face.side_files(config_folder)
    if kind == "hf":
        return _open_hugging_face(folder, config, side_files)
    if megatron.is_torch_dist(iteration):
        return _open_torch_dist(iteration, config, side_files)
    return _open_ranks(iteration, config, side_files)


def open_states(
    folder: Path,
    config: Qwen2Config,
    kinds: Mapping[str, str],
    *,
    args: Namespace,
    sharding_type: str | None,
) -> dict[str, Source]:
    """What an iteration holds beside every weight, such as Adam's moments.

    Args:
        folder: of the iteration.
        config: the model's; rows from its vocab_size on are padding and are not loaded.
        kinds: what is wanted, "" for the weights, each with what its keys in a torch_dist folder
            have before the weight's own.
        args: of the run that wrote it.
        sharding_type: how a torch_dist folder keeps the distributed optimizer's state.

    Returns:
        By kind, a source that is read as if its tensors were weights.

    Raises:
        UserError: as `open_source`.
    """
    if not megatron.is_torch_dist(folder):
        return {
            kind: _ranks_source(folder, config, (), shards, kind)
            for kind, shards in megatron_optimizer.read_rank_states(folder, kinds).items()
        }
    by_buckets = sharding_type in megatron_optimizer.BY_BUCKETS
    own_kinds = {kind: prefix for kind, prefix in kinds.items() if not (kind and by_buckets)}
    prefixes = tuple(own_kinds.values())
    chunks = torch_dist.read(folder, wanted=lambda key: key.startswith(prefixes)).chunks
    sources = {}
    for kind, prefix in own_kinds.items():
        own = {k.removeprefix(prefix): v for k, v in chunks.items() if k.startswith(prefix)}
        own = {key: parts for key, parts in own.items() if _is_model_key(key)}
        where = f"{folder}: {prefix}*"
        sources[kind] = _torch_dist_source(
            folder, config, (), own, where, prefix=prefix, padded=config.vocab_size
        )
    if by_buckets and sharding_type:
        others = [kind for kind in kinds if kind]
        sources |= _bucket_sources(folder, config, others, args, sharding_type)
    return sources


def _bucket_sources(
    folder: Path, config: Qwen2Config, kinds: Sequence[str], args: Namespace, sharding_type: str
) -> dict[str, Source]:
    """The distributed optimizer's tensors, of which a torch_dist folder has whole buckets."""
    layout = _layout_of_args(folder, args, config)
    pieces = megatron_pieces(config, layout, args.padded_vocab_size)
    segments = megatron_optimizer.read_segments(folder, sharding_type)
    own = owners(pieces)
    held: dict[str, list[Held]] = {kind: [] for kind in kinds}
    for shard, of_shard in pieces.items():
        names = megatron_optimizer.in_model_order(of_shard, args)
        of_rank = [of for other, of in pieces.items() if other[:2] == shard[:2]]
        num_parameters = sum(volume(piece.box) for of in of_rank for piece in of.values())
        starts, total = megatron_optimizer.flat_starts(
            {name: volume(of_shard[name].box) for name in names},
            alone=megatron_optimizer.own_buckets(args, layout.pp),
            bucket_size=megatron_optimizer.bucket_size(
                args, shard.pp_stage, shard.chunk, num_parameters
            ),
        )
        rank = shard.pp_stage * layout.tp + shard.tp_rank
        for kind in kinds:
            flat = segments.get((rank, shard.chunk, kind), [])
            if (found := megatron_optimizer.total_of(flat)) != total:
                raise UserError(
                    f"{folder}: rank {rank}'s {kind} has {found} elements, not the {total} that "
                    f"{megatron_optimizer.SAID_BY} give its model. --no-load-optim takes the "
                    "weights and begins with new moments."
                )
            for name in own[shard]:
                held[kind] += _bucket_held(name, of_shard[name], flat, starts[name])
    return {
        kind: Source(
            kind="mg",
            folder=folder,
            config=config,
            held=tuple(of_kind),
            side_files=(),
            format="torch_dist",
            padded_vocab_size=args.padded_vocab_size,
        )
        for kind, of_kind in held.items()
    }


def _bucket_held(
    name: str, piece: Piece, flat: Sequence[megatron_optimizer.Segment], start: int
) -> Iterator[Held]:
    """The parts of one parameter's tensor that lie in a flat tensor from `start` on."""
    for at, stored in megatron_optimizer.cut_out(flat, start, start + volume(piece.box)):
        yield from _run_held(name, piece, Run(at, at + stored.shape[0]), stored)


def _run_held(name: str, piece: Piece, run: Run, stored: StoredTensor) -> Iterator[Held]:
    """A run of a piece's elements, as boxes."""
    size = NUMPY_DTYPES[stored.dtype].itemsize
    for box, part in parts_of(piece.box, run, joins_blocks=True):
        shape = tuple(stop - start for start, stop in box)
        offset = stored.offset + (part.start - run.start) * size
        own = stored._replace(offset=offset, shape=shape)
        yield Held(f"{name}[{part.start}:{part.stop}]", Piece(piece.tensor, box, shape), own)


def _layout_of_args(folder: Path, args: Namespace, config: Qwen2Config) -> ParallelLayout:
    """How the run that wrote `args` was cut.

    Raises:
        UserError: its stages have layers of their own numbers, in a way that is not implemented.
    """
    odd = [name for name in _UNEVEN if getattr(args, name, None)]
    if odd:
        raise UserError(
            f"{folder}: its optimizer state lies as {', '.join(odd)} cut it, which is not "
            "implemented; save with --ckpt-format torch, or take the weights with --no-load-optim."
        )
    pp = args.pipeline_model_parallel_size
    chunks = getattr(args, "virtual_pipeline_model_parallel_size", None) or 1
    numbers = getattr(args, "num_layer_list", None)
    layout = ParallelLayout(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=pp,
        num_layers_per_virtual_pipeline_stage=(
            config.num_layers // (pp * chunks) if chunks > 1 else None
        ),
        num_layer_list=tuple(map(int, numbers.split(","))) if numbers else None,
    )
    layout.check(config, args.padded_vocab_size)
    return layout


def target_dtype(source: Source, wanted: str | None) -> str:
    """The dtype to write: `wanted` (--dtype), or the one that all the source's tensors have.

    Raises:
        UserError: the source leaves it in doubt.
    """
    if wanted is not None:
        return wanted
    counts = Counter(held.stored.dtype for held in source.held)
    found = counts.most_common(1)[0][0]
    if len(counts) > 1:
        mix = ", ".join(f"{n} x {dtype}" for dtype, n in counts.items())
        raise UserError(f"{source.folder}: mixes dtypes ({mix}); say for example --dtype {found}.")
    if source.kind == "hf" and found != source.config.dtype:
        raise UserError(
            f"{source.folder}: config.json says {source.config.dtype}, the tensors are {found}; "
            f"say --dtype {found} to keep them or --dtype {source.config.dtype} to cast them."
        )
    return found


def lacks_config(folder: Path) -> bool:
    """Whether shards have no config.json beside them, as those of Megatron-LM and MindSpeed-LLM."""
    if not megatron.is_checkpoint_folder(folder):
        return False
    return not any(map(_has_config, _beside(folder, megatron.iteration_folder(folder))))


def _beside(folder: Path, iteration: Path) -> tuple[Path, ...]:
    """Where config.json may be."""
    return folder, iteration, iteration.parent


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _config_folder(folder: Path, iteration: Path, given: str | Path | None) -> Path:
    if given is not None:
        return Path(given).parent if Path(given).is_file() else Path(given)
    for candidate in filter(_has_config, _beside(folder, iteration)):
        return candidate
    raise UserError(
        f"{folder}: has no config.json; name the Hugging Face folder that has it with --hf-cfg-dir."
    )


def _open_hugging_face(folder: Path, config: Qwen2Config, side_files: tuple[Path, ...]) -> Source:
    tensors = {
        name: tensor
        for name, tensor in hugging_face.read_tensors(folder).items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    if (prefix := _prefix(tensors)) == "":  # as transformers' Qwen2Model is saved by itself
        tensors = {f"{_PREFIX}{name}": tensor for name, tensor in tensors.items()}
    raise_if(f"{folder}: {fault}" for fault in _other_models(tensors, prefix))
    _check_layer_count(folder, config, len(tensors))
    pieces = hugging_face_pieces(config)
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        # some tools write the tied output too; equal bytes are checked before the work begins
        pieces["lm_head.weight"] = pieces["model.embed_tokens.weight"]
    held, faults = _match(pieces, tensors)
    rows = (tensors[_EMBEDDING].shape or (0,))[0] if _EMBEDDING in tensors else config.vocab_size
    if rows != config.vocab_size:
        faults.append(
            f'config.json says "vocab_size": {config.vocab_size}, the embedding has {rows} rows; '
            f"where tokens were added to the model, set it to {rows}."
        )
    if "lm_head.weight" in set(pieces) - set(tensors):
        faults.append(
            'config.json says "tie_word_embeddings": false, but there is no lm_head.weight; '
            "set it to true if the output shares the embedding."
        )
    raise_if(f"{folder}: {fault}" for fault in faults)
    return Source(
        kind="hf",
        folder=folder,
        config=config,
        held=tuple(held),
        side_files=side_files,
        format="safetensors",
        padded_vocab_size=config.vocab_size,
    )


def _prefix(tensors: Mapping[str, StoredTensor]) -> str:
    """What stands before the embedding's own name: that of the model in the model."""
    own = _EMBEDDING.removeprefix(_PREFIX)
    names = (name.removesuffix(own) for name in tensors if name.endswith(own))
    return next((name for name in names if name == "" or name.endswith(".")), _PREFIX)


def _other_models(tensors: Mapping[str, StoredTensor], prefix: str) -> Iterator[str]:
    """What says that a folder holds no plain language model, however its config.json calls it."""
    if prefix not in ("", _PREFIX):
        yield (
            f"its tensors' names begin with {prefix} where {_PREFIX} is expected: a model was "
            "saved inside another one (torch.compile, DistributedDataParallel, PEFT, a vision "
            "model). Save the inner one (of PEFT: model.merge_and_unload())."
        )
    elif heads := {"score.weight", "classifier.weight", "qa_outputs.weight"} & tensors.keys():
        yield (
            f"{heads.pop()} is the head of a reward model or a classifier; this project trains "
            "language models, which have an lm_head or a tied embedding instead."
        )


def _open_ranks(folder: Path, config: Qwen2Config, side_files: tuple[Path, ...]) -> Source:
    return _ranks_source(folder, config, side_files, megatron.read_ranks(folder).shards)


def _ranks_source(
    folder: Path,
    config: Qwen2Config,
    side_files: tuple[Path, ...],
    shards: Mapping[Shard, Mapping[str, StoredTensor]],
    kind: str = "",
) -> Source:
    """The source of the ranks' weights, or of the optimizer's tensors of a kind."""
    _check_layer_count(folder, config, sum(map(len, shards.values())))
    layout = layout_of(folder, shards, config)
    padded = _padded_vocab_size(folder, shards, layout, config)
    layout.check(config, padded)
    held: list[Held] = []
    faults: list[str] = []
    for shard, pieces in megatron_pieces(config, layout, padded).items():
        where = megatron.rank_folder_name(shard.tp_rank, shard.pp_stage, layout.pp)
        found, wrong = _match(pieces, shards.get(shard, {}))
        held += (one._replace(name=_name_in_file(one, shard, layout, kind)) for one in found)
        faults += [f"{folder / where}: {fault}" for fault in wrong]
    if faults and any(OUTPUT in fault for fault in faults):
        tied = str(config.tie_word_embeddings).lower()
        faults.append(f'{folder}: config.json says "tie_word_embeddings": {tied}; is that right?')
    raise_if(faults)
    return Source(
        kind="mg",
        folder=folder,
        config=config,
        held=tuple(held),
        side_files=side_files,
        format=_format_name(held),
        layout=layout,
        padded_vocab_size=padded,
    )


def _name_in_file(held: Held, shard: Shard, layout: ParallelLayout, kind: str) -> str:
    """A .pt holds several models of an interleaved pipeline, whose tensors have the same names."""
    has_chunks = layout.num_layers_per_virtual_pipeline_stage is not None
    model = f"model{shard.chunk}" if has_chunks else "model"
    if kind:
        return f"{megatron_optimizer.KEY}/{model}/{held.name}/{kind}"
    is_pt = held.stored.path.name == megatron.PT_FILE
    return f"{model}/{held.name}" if has_chunks and is_pt else held.name


def _format_name(held: list[Held]) -> str:
    return "safetensors" if held[0].stored.path.suffix == ".safetensors" else "megatron"


def _check_layer_count(where: Path | str, config: Qwen2Config, num_tensors: int) -> None:
    """Before anything is enumerated per layer: a config may claim any number of them."""
    if config.num_layers > num_tensors:
        raise UserError(
            f"{where}: config.json says {config.num_layers} layers, "
            f"but there are only {num_tensors} tensors."
        )


def _match(
    pieces: Mapping[str, Piece], tensors: Mapping[str, StoredTensor]
) -> tuple[list[Held], list[str]]:
    """Pairs expected pieces with stored tensors; what does not fit, in sentences."""
    faults = _names("missing tensors", [n for n in pieces if n not in tensors])
    faults += _names("unexpected tensors", [n for n in tensors if n not in pieces])
    extra_layers = _layers(tensors) - _layers(pieces)
    if extra_layers:
        faults.append(
            f"the files hold layers up to {max(extra_layers)}, "
            f"config.json says {len(_layers(pieces))} layers."
        )
    held = [Held(name, piece, tensors[name]) for name, piece in pieces.items() if name in tensors]
    return held, faults + _some([fault for one in held for fault in _tensor_faults(one)])


def _tensor_faults(held: Held) -> Iterator[str]:
    name, piece, stored = held
    if stored.shape != piece.shape:
        yield f"{name}: expected shape {piece.shape}, found {stored.shape} in {stored.path.name}."
    if stored.dtype not in WEIGHT_DTYPES:
        yield (
            f"{name}: dtype {stored.dtype} is none of {', '.join(WEIGHT_DTYPES)}, "
            f"in {stored.path.name}."
        )


def _names(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return [f"{len(names)} {what}: {', '.join(names[:_MOST_NAMED])}{more}."]


def _some(faults: list[str]) -> list[str]:
    if len(faults) <= _MOST_NAMED:
        return faults
    return [*faults[:_MOST_NAMED], f"and {len(faults) - _MOST_NAMED} more faults of this kind."]


def _layers(names: Iterable[str]) -> set[int]:
    found = (re.search(r"\blayers\.(\d{1,9})\.", name) for name in names)
    return {int(match[1]) for match in found if match}


def layout_of(
    folder: Path, shards: Mapping[Shard, Mapping[str, StoredTensor]], config: Qwen2Config
) -> ParallelLayout:
    """The layout that the ranks' files show; stages are counted on tensor-parallel rank 0."""
    tp = 1 + max(shard.tp_rank for shard in shards)
    pp = 1 + max(shard.pp_stage for shard in shards)
    counts = {s[1:]: len(_layers(t)) for s, t in sorted(shards.items()) if s.tp_rank == 0}
    total = sum(counts.values())
    if total != config.num_layers:
        raise UserError(
            f"{folder}: the shards hold {total} layers, config.json says {config.num_layers}."
        )
    per_chunk = set(counts.values())
    if max(chunk for _, chunk in counts) > 0:
        if len(per_chunk) > 1:
            raise UserError(f"{folder}: virtual stages of unequal length are not implemented.")
        return ParallelLayout(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            num_layers_per_virtual_pipeline_stage=per_chunk.pop(),
        )
    return ParallelLayout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        num_layer_list=None if len(per_chunk) == 1 else tuple(counts.values()),
    )


def _padded_vocab_size(
    folder: Path,
    shards: Mapping[Shard, Mapping[str, StoredTensor]],
    layout: ParallelLayout,
    config: Qwen2Config,
) -> int:
    embedding = shards.get(Shard(0, 0, 0), {}).get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{folder}: the first stage has no {EMBEDDING} of two axes.")
    padded = embedding.shape[0] * layout.tp
    if padded < config.vocab_size:
        raise UserError(
            f"{folder}: {layout.tp} x {embedding.shape[0]} vocabulary rows, fewer than "
            f"config.json's vocab_size={config.vocab_size}."
        )
    return padded


def _open_torch_dist(folder: Path, config: Qwen2Config, side_files: tuple[Path, ...]) -> Source:
    chunks = torch_dist.read(folder, wanted=_is_model_key).chunks
    return _torch_dist_source(folder, config, side_files, chunks, str(folder))


def _torch_dist_source(
    folder: Path,
    config: Qwen2Config,
    side_files: tuple[Path, ...],
    chunks: Mapping[str, list[torch_dist.Chunk]],
    where: str,
    *,
    prefix: str = "",
    padded: int | None = None,
) -> Source:
    """The source of `chunks`, whose keys are weights'; in the folder they begin with `prefix`.

    `where` begins every fault; `padded` is the padded vocabulary, if it is known.
    """
    padded = padded or _vocabulary_rows(where, chunks, config)
    rules = {_stacked(rule): rule for rule in qwen2_rules(config, padded)}
    held: list[Held] = []
    unexpected: list[str] = []
    faults: list[str] = []
    for key, parts in chunks.items():
        plain, layer = _unstack(key)
        if plain in rules:
            for part in parts:
                whole, run = _unflattened(rules[plain], layer, part, config)
                wrong = list(_chunk_faults(key, rules[plain], layer, whole, config))
                faults += wrong
                if not wrong:
                    found = _chunk_held(prefix + key, rules[plain], layer, whole)
                    held += found if run is None else _flat_held(found, run, part)
        elif megatron.plain_name(key):
            unexpected.append(key)
    faults = _names("unexpected tensors", unexpected) + _some(faults)
    raise_if(f"{where}: {fault}" for fault in faults)
    _check_layer_count(where, config, len(held))
    faults += _coverage_faults(rules.values(), held, config)
    raise_if(f"{where}: {fault}" for fault in faults)
    return Source(
        kind="mg",
        folder=folder,
        config=config,
        held=tuple(held),
        side_files=side_files,
        format="torch_dist",
        padded_vocab_size=padded,
    )


def _vocabulary_rows(
    where: str, chunks: Mapping[str, list[torch_dist.Chunk]], config: Qwen2Config
) -> int:
    if EMBEDDING not in chunks or len(chunks[EMBEDDING][0].global_shape) != 2:
        raise UserError(f"{where}: no {EMBEDDING} in it; not a Qwen2 model.")
    padded = chunks[EMBEDDING][0].global_shape[0]
    if padded < config.vocab_size:
        raise UserError(
            f"{where}: {padded} vocabulary rows, fewer than vocab_size={config.vocab_size}."
        )
    return padded


def _is_model_key(key: str) -> bool:
    return not key.startswith("optimizer.")


def _stacked(rule: Rule) -> str:
    return rule.megatron.replace(".{}", "")


def _unstack(key: str) -> tuple[str, int | None]:
    """A torch_dist key without its layer number, which homogeneous models stack on an axis."""
    key = megatron.plain_name(key) or key
    match = re.fullmatch(r"decoder\.layers\.(\d{1,9})\.(.+)", key)
    return (f"decoder.layers.{match[2]}", int(match[1])) if match else (key, None)


def _whole_shape(rule: Rule, layer: int | None, config: Qwen2Config) -> tuple[int, ...]:
    whole = rule.shape(tuple((0, n) for n in rule.view))
    return (config.num_layers, *whole) if "{}" in rule.megatron and layer is None else whole


def _unflattened(
    rule: Rule, layer: int | None, chunk: torch_dist.Chunk, config: Qwen2Config
) -> tuple[torch_dist.Chunk, Run | None]:
    """A run of a box's elements, as megatron-core before 0.15 keeps the distributed optimizer's.

    Of a tensor [X, Y] in boxes [x, y] it makes one [X / x, Y / y, x * y].

    Returns:
        The box, without its bytes, and the run; of any other chunk itself and None.
    """
    whole = _whole_shape(rule, layer, config)
    *counts, size = chunk.global_shape
    fits = len(counts) == len(whole) and all(
        n and total % n == 0 for n, total in zip(counts, whole, strict=True)
    )
    local = tuple(total // n for n, total in zip(counts, whole, strict=True)) if fits else ()
    if not fits or prod(local) != size:
        return chunk, None
    offsets = tuple(at * n for at, n in zip(chunk.offsets, local, strict=False))
    box = torch_dist.Chunk(whole, offsets, chunk.tensor._replace(shape=local))
    start = chunk.offsets[-1]
    return box, Run(start, start + prod(chunk.tensor.shape))


def _flat_held(found: Iterable[Held], run: Run, chunk: torch_dist.Chunk) -> Iterator[Held]:
    """The part of the one tensor `found` that a chunk of its elements is."""
    (one,) = found
    yield from _run_held(one.name, one.piece, run, chunk.tensor)


def _chunk_faults(
    key: str, rule: Rule, layer: int | None, chunk: torch_dist.Chunk, config: Qwen2Config
) -> Iterator[str]:
    """What of one chunk does not fit its rule."""
    whole = _whole_shape(rule, layer, config)
    if chunk.global_shape != whole:
        yield f"{key}: expected shape {whole}, found {chunk.global_shape}."
        return
    if chunk.tensor.dtype not in WEIGHT_DTYPES:
        yield f"{key}: dtype {chunk.tensor.dtype} is none of {', '.join(WEIGHT_DTYPES)}."
    ends = [o + n for o, n in zip(chunk.offsets, chunk.tensor.shape, strict=True)]
    if any(o < 0 or end > n for o, end, n in zip(chunk.offsets, ends, whole, strict=True)):
        yield f"{key}: a chunk of {chunk.tensor.shape} at {chunk.offsets} leaves {whole}."
        return
    rows_axis = -2 if rule.is_matrix else -1
    try:
        rule.rows_box(chunk.offsets[rows_axis], ends[rows_axis])
    except ValueError as error:
        yield f"{key}: {error}."


def _chunk_held(key: str, rule: Rule, layer: int | None, chunk: torch_dist.Chunk) -> Iterator[Held]:
    """The held tensors of one chunk; more than one where it spans layers."""
    tensor, offsets = chunk.tensor, chunk.offsets
    first, count, shape = layer or 0, 1, tensor.shape
    if "{}" in rule.megatron and layer is None:
        first, count = offsets[0], shape[0]
        offsets, shape = offsets[1:], shape[1:]
    rows, columns = (*shape, 1)[:2]
    column = (offsets[1], offsets[1] + columns) if rule.is_matrix else (0, 1)
    size = rows * columns * NUMPY_DTYPES[tensor.dtype].itemsize
    box = (*rule.rows_box(offsets[0], offsets[0] + rows)[:2], column)
    for i in range(count):
        name = rule.megatron.format(first + i)
        stored = tensor._replace(offset=tensor.offset + i * size, shape=tuple(shape))
        start = (chunk.offsets[0] + i, *chunk.offsets[1:])
        in_file = f"{key}[{','.join(map(str, start))}]"
        yield Held(in_file, Piece(name, box, tuple(shape)), stored)


def _coverage_faults(
    rules: Iterable[Rule], held: Iterable[Held], config: Qwen2Config
) -> Iterator[str]:
    """Tensors of which elements are missing, or stored twice."""
    found: dict[str, int] = {}
    for one in {(h.piece.tensor, h.piece.box) for h in held}:
        found[one[0]] = found.get(one[0], 0) + volume(one[1])
    missing = []
    for rule in rules:
        layers = range(config.num_layers) if "{}" in rule.megatron else range(1)
        whole = volume(tuple((0, n) for n in rule.view))
        for layer in layers:
            name = rule.megatron.format(layer)
            if found.pop(name, 0) != whole:
                missing.append(name)
    yield from _names("missing or incomplete tensors", missing)
    yield from _names("unexpected tensors", sorted(found))
