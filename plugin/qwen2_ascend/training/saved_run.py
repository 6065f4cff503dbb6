"""What a training checkpoint says of its run, read before torch and megatron-core are imported."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2_ascend.checkpoint.formats import megatron, megatron_optimizer, torch_dist, torch_pt
from qwen2_ascend.errors import UserError

_SIGNS = (megatron_optimizer.KEY, "opt_param_scheduler", "lr_scheduler", "rng_state")
"""What Megatron-LM keeps of a run and not of weights alone."""


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A training checkpoint, as far as it is the same on every rank."""

    folder: Path
    """The iteration's folder."""
    common: Mapping[str, Any]
    sharding_type: str | None = None
    """How the distributed optimizer's state is kept in a torch_dist folder."""
    is_foreign: bool = False
    """Whether Megatron-LM wrote it, or another tool that writes as Megatron-LM does."""

    @property
    def has_optimizer(self) -> bool:
        return bool(self.common["contents"]["optimizer"])

    @property
    def padded_vocab_size(self) -> int:
        return self.common["args"].padded_vocab_size


def find_saved_run(folder: Path) -> SavedRun | None:
    """The training state in a Megatron folder, ours or Megatron-LM's.

    Returns:
        None where the folder holds weights only.

    Raises:
        UserError: the folder is damaged, or does not say where its run was.
    """
    iteration = megatron.iteration_folder(folder)
    objects: tuple[str, ...] = ()
    if megatron.is_torch_dist(iteration):
        opened = torch_dist.read(iteration, wanted=lambda key: False)
        common, objects = opened.common, opened.objects
    else:
        files = sorted(iteration.glob(f"mp_rank_*/{megatron.PT_FILE}"))
        common = torch_pt.read(files[0]) if files else None
    if not isinstance(common, Mapping):
        return None
    try:
        return _saved_run(iteration, common, objects)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{iteration}: its training state cannot be resumed: "
            f"{megatron_optimizer.words(error)}. --finetune begins a new run with its weights."
        ) from None


def _saved_run(
    iteration: Path, common: Mapping[str, Any], objects: tuple[str, ...]
) -> SavedRun | None:
    optimizer = _optimizer(iteration, common, objects)
    kinds = megatron_optimizer.kinds_of(optimizer) if optimizer else None
    sharding_type = kinds.sharding_type if kinds else None
    if sharding_type not in (None, *megatron_optimizer.SHARDING_TYPES):
        raise ValueError(f"the optimizer's state is of the type {sharding_type}")
    if {"progress", "contents"} <= common.keys():
        return SavedRun(folder=iteration, common=common, sharding_type=sharding_type)
    if not _is_of_a_run(iteration, common, objects):
        return None
    return SavedRun(
        folder=iteration,
        common=_as_ours(common, optimizer, kinds, has_rng=_has_rng(common, objects)),
        sharding_type=sharding_type,
        is_foreign=True,
    )


def _optimizer(iteration: Path, common: Mapping[str, Any], objects: tuple[str, ...]) -> Any:
    """Megatron's state of the optimizer, without its tensors where they lie apart.

    In a torch_dist folder of the distributed optimizer it may be in objects, one for each
    tensor/pipeline rank; what is wanted of it is the same in all.
    """
    optimizer = common.get(megatron_optimizer.KEY)
    begins = "optimizer.distributed.dp_group_idx_0."
    own = {key.removeprefix(begins): key for key in objects if key.startswith(begins)}
    if not own or not isinstance(optimizer, Mapping):
        return optimizer
    names = {key.split("/")[0]: whole for key, whole in own.items()}
    wanted = [name for name in ("optimizer", "grad_scaler") if name in names]
    return {**optimizer, **{n: torch_dist.read_object(iteration, names[n]) for n in wanted}}


def _is_of_a_run(iteration: Path, common: Mapping[str, Any], objects: tuple[str, ...]) -> bool:
    """Whether more than weights was saved, and not as a release, which a new run begins with."""
    if iteration.name.strip(".").startswith("release"):
        return False
    args = common.get("args")
    consumed = getattr(args, "consumed_train_samples", 0) if isinstance(args, Namespace) else 0
    return bool(consumed) or _has_rng(common, objects) or any(common.get(sign) for sign in _SIGNS)


def _has_rng(common: Mapping[str, Any], objects: tuple[str, ...]) -> bool:
    return "rng_state" in common or any(key.startswith("rng_state/") for key in objects)


def _as_ours(
    common: Mapping[str, Any],
    optimizer: Any,
    kinds: megatron_optimizer.Kinds | None,
    *,
    has_rng: bool,
) -> dict[str, Any]:
    """Megatron-LM's state of a run, as ours says the same."""
    args = common["args"]
    if not getattr(args, "padded_vocab_size", None):
        raise ValueError("its args do not say padded_vocab_size")
    return {
        "args": args,
        "iteration": common["iteration"],
        "progress": {
            "iteration": common["iteration"],
            "consumed_samples": args.consumed_train_samples,
            "skipped_iterations": 0,
        },
        "opt_param_scheduler": common.get("opt_param_scheduler") or common.get("lr_scheduler"),
        "optimizer_updates": megatron_optimizer.num_updates(optimizer) if kinds else 0,
        "loss_scaler": megatron_optimizer.loss_scale(optimizer) if kinds else {},
        "contents": {"optimizer": list(kinds.names) if kinds else [], "rng": has_rng},
    }
