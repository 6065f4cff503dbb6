"""Megatron's own optimizer states: where the tensors of every parameter lie, read without torch.

In an mp_rank tree (`--ckpt-format torch`), by the kind of optimizer:

    model_optim_rng.pt  "optimizer" of fp32 weights is torch's own state,
                        {"state": {0: {"exp_avg", "exp_avg_sq", "step"}, ...}, "param_groups": [..]}
                        of 16-bit weights
                        {"optimizer": torch's, "fp32_from_fp16_params": [[..], ..], "grad_scaler"}
                        of the distributed optimizer {"optimizer": {"param_groups"}, "grad_scaler"}
    distrib_optim.pt    the distributed optimizer's tensors, by model chunk and dtypes: "param",
                        "exp_avg" and "exp_avg_sq", each of all parameters end to end

torch numbers parameters group by group, in the order of the model; groups differ in weight decay,
which vectors do not have. The distributed optimizer's tensors are the buckets of megatron-core's
gradient buffer one after the other, without the padding behind each (`flat_starts`).

In a torch_dist folder the tensors of a plain optimizer have keys like the weights'. Those of the
distributed one have too, or they are the buckets again, by the value of
"param_state_sharding_type".
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwen2_ascend.checkpoint.formats import megatron, torch_dist, torch_pt
from qwen2_ascend.checkpoint.formats.stored import NUMPY_DTYPES, StoredTensor
from qwen2_ascend.checkpoint.rules import EMBEDDING, FINAL_NORM, OUTPUT, Shard
from qwen2_ascend.errors import UserError

KEY = "optimizer"
FLAT_FILE = "distrib_optim.pt"
MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "fp32_param"
FLAT_KINDS = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", MAIN: "param"}
"""What the distributed optimizer's files call each kind of tensors."""
SAID_BY = "args.overlap_grad_reduce and args.ddp_bucket_size"
"""What of a run's args makes buckets."""
_ALIGNMENT = 64
"""Elements; where parameters begin in a bucket."""
_LEAST_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000
"""Elements of a bucket, unless --ddp-bucket-size says it."""
_COMPARED = 256
"""Elements of each parameter, from either end, that are held against the weights."""

Name = tuple[int, str]
"""A parameter of a rank: its model chunk, and its name there."""
OfRank = dict[str, dict[Name, StoredTensor]]
"""The optimizer's tensors of one rank, by kind."""


class UnfitError(ValueError):
    """Why a state is not one of this model: a phrase."""


def read_rank_states(
    folder: Path, kinds: Iterable[str]
) -> dict[str, dict[Shard, dict[str, StoredTensor]]]:
    """Where every rank's tensors of the optimizer lie in an mp_rank tree.

    Args:
        folder: of the iteration.
        kinds: which of MOMENTS and MAIN; "" is the weights.

    Raises:
        UserError: as `megatron.read_ranks`, or a rank has no such state.
    """
    ranks = sorted(megatron.rank_folders(folder).items())
    pp = 1 + max(pp_stage for (_, pp_stage), _ in ranks)
    found: dict[str, dict[Shard, dict[str, StoredTensor]]] = {kind: {} for kind in kinds}
    for (tp_rank, pp_stage), rank_folder in ranks:
        path = rank_folder / megatron.PT_FILE
        state = torch_pt.read(path)
        models = megatron.models_of(path, state)
        of_rank: OfRank = {"": {(c, n): t for c, model in models.items() for n, t in model.items()}}
        try:
            of_rank |= _tensors_of_rank(rank_folder, state, of_rank[""], pp_stage, pp)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise UserError(
                f"{path}: its {KEY} is not that of its model: {words(error)}. --no-load-optim "
                "takes the weights and begins with new moments."
            ) from None
        for kind, shards in found.items():
            for chunk in models:
                shards[Shard(tp_rank, pp_stage, chunk)] = {
                    name: tensor for (c, name), tensor in of_rank[kind].items() if c == chunk
                }
    return found


def words(error: Exception) -> str:
    """What is wrong with a state, or what it lacks."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    return str(error)


def _tensors_of_rank(
    folder: Path, state: Mapping, weights: Mapping[Name, StoredTensor], pp_stage: int, pp: int
) -> OfRank:
    optimizer = state[KEY]
    inner = _inner(optimizer)
    if "state" in inner:
        return _plain(inner, optimizer.get("fp32_from_fp16_params"), weights)
    args = state["args"]
    stored = torch_pt.read(folder / FLAT_FILE)
    found = flat_tensors(stored, weights, args, pp_stage, pp)
    if "contents" not in state:  # else this project wrote it, with a checksum for each tensor
        _check_places(found[MAIN], weights)
    return found


def _inner(optimizer: Any) -> Mapping[str, Any]:
    """What a Megatron optimizer has of torch's."""
    if not isinstance(optimizer, Mapping) or not isinstance(
        inner := optimizer.get("optimizer", optimizer), Mapping
    ):
        raise UnfitError("several optimizers are chained (of experts, or with overlapped steps)")
    return inner


# -- a plain optimizer


def _plain(inner: Mapping, mains: Any, weights: Mapping[Name, StoredTensor]) -> OfRank:
    """The tensors of torch's state, whose parameters are numbered."""
    found: OfRank = {kind: {} for kind in (*MOMENTS, *((MAIN,) if mains is not None else ()))}
    for number, group in enumerate(inner["param_groups"]):
        states = [inner["state"][key] for key in group["params"]]
        names = _group_names([one["exp_avg"].shape for one in states], weights)
        for kind in MOMENTS:
            found[kind] |= {n: one[kind] for n, one in zip(names, states, strict=True)}
        if mains is not None:
            found[MAIN] |= dict(zip(names, mains[number], strict=True))
    if any(of_kind.keys() != weights.keys() for of_kind in found.values()):
        raise UnfitError(f"it has {len(found['exp_avg'])} parameters, the model {len(weights)}")
    return found


def _group_names(
    shapes: Sequence[tuple[int, ...]], weights: Mapping[Name, StoredTensor]
) -> list[Name]:
    """The parameters of a group: all matrices, all vectors, or both, in the model's order."""
    axes = {len(shape) for shape in shapes}
    names = [name for name, weight in weights.items() if len(weight.shape) in axes]
    if [weights[name].shape for name in names] != list(shapes):
        raise UnfitError("a parameter group is neither all matrices nor all vectors of the model")
    return names


# -- the distributed optimizer


def flat_tensors(
    stored: Any, weights: Mapping[Name, StoredTensor], args: Namespace, pp_stage: int, pp: int
) -> OfRank:
    """The tensors of every parameter of a rank in the distributed optimizer's flat ones.

    Args:
        stored: what `distrib_optim.pt` holds.
        weights: of the rank, in the order of its model.
        args: of the run that wrote it.
        pp_stage: of the rank.
        pp: stages.

    Raises:
        ValueError: they are not of this model.
    """
    if not isinstance(stored, Mapping) or not stored.get("buckets_coalesced"):
        raise UnfitError(
            "its buckets are in the form before February 2024; Megatron-LM's "
            "--ckpt-convert-update-legacy-dist-opt-format renews it"
        )
    found: OfRank = {kind: {} for kind in FLAT_KINDS}
    num_parameters = sum(prod(weight.shape) for weight in weights.values())
    for chunk in sorted({chunk for chunk, _ in weights}):
        (tensors,) = stored[chunk].values()
        own = {name: weight.shape for (c, name), weight in weights.items() if c == chunk}
        starts, total = flat_starts(
            {name: prod(shape) for name, shape in own.items()},
            alone=own_buckets(args, pp),
            bucket_size=bucket_size(args, pp_stage, chunk, num_parameters),
        )
        for kind, key in FLAT_KINDS.items():
            whole = tensors[key]
            if whole.shape != (total,):
                raise UnfitError(
                    f"{FLAT_FILE} has {prod(whole.shape)} elements of {key}, not the {total} that "
                    f"{SAID_BY} give its model"
                )
            for name, shape in own.items():
                offset = whole.offset + starts[name] * NUMPY_DTYPES[whole.dtype].itemsize
                found[kind][chunk, name] = whole._replace(offset=offset, shape=shape)
    return found


def flat_starts(
    sizes: Mapping[str, int], *, alone: Container[str], bucket_size: int | None
) -> tuple[dict[str, int], int]:
    """Where parameters begin in the buckets of a gradient buffer, set end to end without padding.

    Args:
        sizes: elements of every parameter, in the order of the model; the buffer goes backwards.
        alone: names of those that have a bucket of their own.
        bucket_size: elements at which a bucket is full; None for one bucket.

    Returns:
        The first element of each, and how many there are.
    """
    starts: dict[str, int] = {}
    before, end = 0, 0  # elements of the buckets before, and of this one
    for name, size in reversed(list(sizes.items())):
        start = end + -end % _ALIGNMENT
        if name in alone and end:
            before, start = before + start, 0
        starts[name] = before + start
        end = start + size
        if name in alone or (bucket_size is not None and end >= bucket_size):
            before, end = before + end, 0
    return starts, before + end


def own_buckets(args: Namespace, pp: int) -> tuple[str, ...]:
    """Parameters with a bucket of their own: a tied embedding, when two stages have it."""
    is_tied = not getattr(args, "untie_embeddings_and_output_weights", True)
    return (EMBEDDING, OUTPUT) if is_tied and pp > 1 else ()


def bucket_size(args: Namespace, pp_stage: int, chunk: int, num_parameters: int) -> int | None:
    """Elements at which a bucket of a rank's model chunk is full; None where it never is.

    Args:
        args: of the run that wrote the buckets.
        pp_stage: of the rank.
        chunk: of the rank's model chunks.
        num_parameters: of all of them.
    """
    if not getattr(args, "overlap_grad_reduce", False) or pp_stage > 0 or chunk > 0:
        return None
    if number := getattr(args, "ddp_num_buckets", None):
        return num_parameters // number
    if said := getattr(args, "ddp_bucket_size", None):
        return said
    replicas = args.data_parallel_size * getattr(args, "context_parallel_size", 1)
    return max(_LEAST_BUCKET, _BUCKET_PER_RANK * replicas)


def _check_places(mains: Mapping[Name, StoredTensor], weights: Mapping[Name, StoredTensor]) -> None:
    """Each fp32 weight, rounded, must be the weight: else they were not laid out as thought.

    Raises:
        ValueError: one is not.
    """
    for name, weight in weights.items():
        for own, main in zip(_ends(weight), _ends(mains[name]), strict=True):
            if not np.array_equal(main.astype(own.dtype).view(np.uint8), own.view(np.uint8)):
                raise UnfitError(f"{FLAT_FILE} does not have {name[1]} where {SAID_BY} put it")


def _ends(stored: StoredTensor) -> Iterator[np.ndarray]:
    """The first elements of a tensor, and the last."""
    size = prod(stored.shape)
    count = min(size, _COMPARED)
    for start in (0, size - count):
        offset = stored.offset + start * NUMPY_DTYPES[stored.dtype].itemsize
        yield stored._replace(offset=offset, shape=(count,)).array()


# -- the distributed optimizer in a torch_dist folder, by buckets

BY_BUCKETS = ("dp_reshardable", "dp_zero_gather_scatter")
FULLY_RESHARDABLE = "fully_reshardable"
SHARDING_TYPES = (*BY_BUCKETS, FULLY_RESHARDABLE, "fully_sharded_model_space")
"""Values of "param_state_sharding_type"; but for BY_BUCKETS the keys are like the weights'."""
_BUCKET = re.compile(
    r"optimizer\.distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)\.dtype_.*\.bucket_idx_(\d+)\."
    r"(param|exp_avg|exp_avg_sq)"
)
_NORM, _PROJ = "input_layernorm.weight", "self_attention.linear_proj.weight"
_OTHERS = (
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)
_LAYER_ORDERS = {
    "local": (_NORM, _PROJ, *_OTHERS),
    "transformer_engine": (_PROJ, _NORM, *_OTHERS),
}
"""The order of a layer's parameters in a model, by --transformer-impl: a fused norm is one of its
linear layer's."""


class Segment(NamedTuple):
    """Some elements of a flat tensor, from `start` on."""

    start: int
    stored: StoredTensor
    """The tensor has one axis."""


def in_model_order(names: Iterable[str], args: Namespace) -> list[str]:
    """A chunk's parameters as the model of the run that wrote `args` has them.

    Args:
        names: layer after layer.
        args: of that run.
    """
    order = _LAYER_ORDERS[getattr(args, "transformer_impl", "local")]
    ends = [EMBEDDING, *order, FINAL_NORM, OUTPUT]

    def place(name: str) -> tuple[int, int, int]:
        if not name.startswith("decoder.layers."):
            return (0 if name == EMBEDDING else 2, 0, ends.index(name))
        _, _, layer, rest = name.split(".", 3)
        return (1, int(layer), order.index(rest))

    return sorted(names, key=place)


def read_segments(folder: Path, sharding_type: str) -> dict[tuple[int, int, str], list[Segment]]:
    """The flat tensors of the distributed optimizer in a torch_dist folder.

    Args:
        folder: of the iteration.
        sharding_type: one of BY_BUCKETS.

    Returns:
        By tensor/pipeline rank (stages are outer), model chunk and kind.

    Raises:
        UserError: the folder is damaged.
    """
    if sharding_type == "dp_zero_gather_scatter":
        return _gathered_segments(folder)
    chunks = torch_dist.read(folder, wanted=lambda key: bool(_BUCKET.fullmatch(key))).chunks
    buckets: dict[tuple[int, int, str], dict[int, list[torch_dist.Chunk]]] = defaultdict(dict)
    kinds = {key: kind for kind, key in FLAT_KINDS.items()}
    for key, parts in chunks.items():
        match = _BUCKET.fullmatch(key)
        assert match
        buckets[int(match[1]), int(match[2]), kinds[match[4]]][int(match[3])] = parts
    found: dict[tuple[int, int, str], list[Segment]] = {}
    for which, of_one in buckets.items():
        start, found[which] = 0, []
        for _, parts in sorted(of_one.items()):
            found[which] += (Segment(start + part.offsets[0], part.tensor) for part in parts)
            start += parts[0].global_shape[0]
    return found


def _gathered_segments(folder: Path) -> dict[tuple[int, int, str], list[Segment]]:
    """Where each tensor/pipeline rank's first replica gathered what `distrib_optim.pt` holds."""
    found: dict[tuple[int, int, str], list[Segment]] = {}
    objects = torch_dist.read(folder, wanted=lambda key: False).objects
    for key in objects:
        match = re.fullmatch(r"optimizer\.distributed\.dp_group_idx_(\d+)\.param_state/.*", key)
        state = torch_dist.read_object(folder, key) if match else {}
        for chunk, of_chunk in state.items():
            if match and isinstance(chunk, int) and not isinstance(chunk, bool):
                (tensors,) = of_chunk.values()
                for kind, name in FLAT_KINDS.items():
                    found[int(match[1]), chunk, kind] = [Segment(0, tensors[name])]
    return found


def total_of(segments: Iterable[Segment]) -> int:
    """Elements of a flat tensor."""
    return max((one.start + one.stored.shape[0] for one in segments), default=0)


def cut_out(segments: Iterable[Segment], start: int, stop: int) -> Iterator[Segment]:
    """Elements start..stop of a flat tensor, counted from `start`."""
    for at, stored in segments:
        first, last = max(at, start), min(at + stored.shape[0], stop)
        if first < last:
            offset = stored.offset + (first - at) * NUMPY_DTYPES[stored.dtype].itemsize
            yield Segment(first - start, stored._replace(offset=offset, shape=(last - first,)))


# -- what is no tensor of a parameter


def num_updates(optimizer: Any) -> int:
    """Updates that Adam had made, which its bias correction goes by.

    Args:
        optimizer: Megatron's state, in any of its forms.

    Raises:
        ValueError: it does not say.
    """
    inner = _inner(optimizer)
    states = inner.get("state", {})
    told = [states["common_step"]] if "common_step" in states else []
    told += [one["step"] for one in states.values() if isinstance(one, Mapping) and "step" in one]
    told += [group["step"] for group in inner["param_groups"] if group.get("step") is not None]
    if not told:
        raise UnfitError("it has made no update")
    return int(_number(told[0]))


def loss_scale(optimizer: Any) -> dict[str, float]:
    """The dynamic loss scale, in plain numbers; empty without one."""
    scaler = optimizer.get("grad_scaler") if isinstance(optimizer, Mapping) else None
    if not scaler or "growth_tracker" not in scaler:
        return {}
    return {
        name: _number(scaler[name]) for name in ("scale", "growth_tracker", "hysteresis_tracker")
    }


class Kinds(NamedTuple):
    """What an optimizer's state has, in a torch_dist folder or in an mp_rank tree."""

    names: tuple[str, ...]
    """These are some of MOMENTS and MAIN."""
    sharding_type: str | None
    """The distributed optimizer's, in a torch_dist folder."""


def kinds_of(optimizer: Any) -> Kinds:
    """Which tensors of each parameter there are."""
    inner = _inner(optimizer)
    sharding_type = optimizer.get("param_state_sharding_type")
    is_plain_fp32 = "state" in inner and "optimizer" not in optimizer
    return Kinds(
        MOMENTS if is_plain_fp32 and not sharding_type else (*MOMENTS, MAIN), sharding_type
    )


def _number(value: Any) -> float:
    return float(value.array().reshape(-1)[0] if isinstance(value, StoredTensor) else value)
