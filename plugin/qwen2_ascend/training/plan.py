"""RunPlan: what a run is, settled before anything of it is loaded.

Rank 0 looks at the disk and checks everything, without torch and without the other ranks: a mistake
ends the run at once. Then it tells the others what it found (which iteration is resumed, which
exports are there), every rank makes its own plan of that, and all compare them. So no rank decides
anything alone; only the paths may differ, since nodes may keep copies on disks of their own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import xxhash

from qwen2_ascend import machine
from qwen2_ascend.checkpoint.formats.hugging_face import hub_hint
from qwen2_ascend.checkpoint.iteration import resumable_iterations
from qwen2_ascend.checkpoint.manifest import check_iteration
from qwen2_ascend.checkpoint.source import lacks_config, open_source
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import DamagedError, UserError, raise_if
from qwen2_ascend.flags import flag_of
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.training.length import RunLength
from qwen2_ascend.training.saved_run import find_saved_run
from qwen2_ascend.training.settings import TrainingSettings

if TYPE_CHECKING:
    from qwen2_ascend.checkpoint.readers.base import Source
    from qwen2_ascend.finetuning.deepspeed.saved import SavedZero
    from qwen2_ascend.finetuning.saved_lora import SavedLora
    from qwen2_ascend.lora_config import LoraConfig
    from qwen2_ascend.training.saved_run import SavedRun

S = TypeVar("S", bound=TrainingSettings)
S_co = TypeVar("S_co", bound=TrainingSettings, covariant=True)

PATHS = (
    "--config",
    "--data-path",
    "--train-data-path",
    "--valid-data-path",
    "--tokenizer-name-or-path",
)
"""Flags with paths, which nodes may have of their own, besides those that are paths by their type;
a number of workers may be a node's own too."""
MAKING = ("optimizer", "precision", "batch", "data", "tuning", "chat")
"""Groups of settings that decide what a finished run has learnt."""


class Found(NamedTuple):
    """What rank 0 found on the disk; the other ranks do not look for themselves."""

    folders: Mapping[str, str] = {}
    """The folder that --load or --pretrained-checkpoint opens in its own: an iteration, or "." for
    the folder itself. What is not named holds no checkpoint."""
    exports: tuple[str, ...] = ()
    """Flags of exports that this run has made already."""


NOTHING = Found()
MOST_BYTES_CHECKED = 1 << 26
"""Larger files of a checkpoint are not read by rank 0 alone before the run begins."""


@dataclass(frozen=True, kw_only=True)
class RunPlan(Generic[S_co]):
    """A run, before anything of it is loaded."""

    settings: S_co
    """The settings, with what the checkpoint settles filled in."""
    config: Qwen2Config
    world_size: int
    source: Source | None
    """The weights, or None for random ones."""
    saved: SavedRun | SavedLora | SavedZero | None = None
    """The training state, where one is resumed."""
    lora: LoraConfig | None = None
    """The adapters that are tuned; None tunes all weights."""
    found: Found = NOTHING

    @property
    def base(self) -> Path | None:
        """Where the weights come from."""
        return self.source.folder if self.source else None

    @property
    def layout(self) -> ParallelLayout:
        return self.settings.layout()

    @property
    def padded_vocab_size(self) -> int:
        return self.settings.padded_vocab_size(self.config)

    @property
    def length(self) -> RunLength:
        """How long the run is; with --num-train-epochs known after `with_epochs`."""
        return self.settings.length(self.world_size, **self.made())

    @property
    def saved_state(self) -> Mapping[str, Any]:
        """What the checkpoint that is resumed says of its run; empty where none is resumed."""
        if self.saved is None:
            return {}
        return getattr(self.saved, "common", None) or self.saved.state  # pyright: ignore

    def made(self) -> dict[str, int]:
        """Steps made and samples consumed by the run that is resumed."""
        if self.saved is None:
            return {"iteration": 0, "consumed_samples": 0}
        progress = self.saved_state["progress"]
        return {name: int(progress[name]) for name in ("iteration", "consumed_samples")}

    def with_epochs(self, samples_per_epoch: int) -> RunPlan[S_co]:
        """The same when it is known what an epoch is; see `FinetuneSettings.with_epochs`.

        Raises:
            UserError: steps are to be profiled that the run does not have.
        """
        settings: Any = self.settings
        settings = settings.with_epochs(samples_per_epoch, self.world_size, **self.made())
        plan = replace(self, settings=settings)
        raise_if(settings.profile.range_faults(plan.length.train_iters))
        return plan

    def facts(self) -> dict[str, str]:
        """Everything that has to be the same on all ranks, by its name."""
        facts = {name: _fact(name, value) for name, value in flags(self.settings).items()}
        return facts | {
            "the number of ranks": str(self.world_size),
            "the model's config": str(self.config),
            "the weights": _fingerprint(self.source),
            "the training state": str(self.made()),
            "the adapter": str(self.lora),
        }

    def identity(self) -> str:
        """A short hash of what a finished run depends on, wherever and however it is run."""
        settings: Any = self.settings
        groups = {group.name for group in fields(settings)}
        said: dict[str, Any] = {
            name: asdict(getattr(settings, name)) for name in MAKING if name in groups
        }
        where = ("data_cache_path", "no_shared_storage")
        for name in ("num_workers", "eval_iters", "eval_interval", *where):
            said["data"].pop(name, None)
        for name in ("micro_batch_size", "exit_interval"):
            said["batch"].pop(name)
        if said.get("tuning", {}).get("num_train_epochs") is not None:
            said["batch"].pop("train_iters")  # `with_epochs` sets it
        said["model"], said["lora"] = asdict(self.config), self.lora and asdict(self.lora)
        said["model"].pop("dtype")  # of the file that was read: a run's own checkpoint has another
        said["seed"] = settings.runtime.seed
        save = settings.checkpoint.save
        said["save"] = os.path.realpath(save) if save else None
        if not save and "lora" in groups:
            said["lora_load"] = settings.lora.lora_load  # a run that goes on need not say it again
        return _hash(json.dumps(said, default=str, sort_keys=True))


def make_plan(settings: S, found: Found | None = None) -> RunPlan[S]:
    """Opens what --load names; reads headers only.

    Args:
        settings: all flags.
        found: what rank 0 found on the disk; rank 0 itself looks.

    Raises:
        UserError: nothing usable is there, or nothing says what the model is.
    """
    model, load = settings.model, _load(settings, found)
    folder = load or model.pretrained_checkpoint
    world_size = machine.world_size()
    if folder is None:
        config = settings.config_of_run(_config(model.config))
        return RunPlan(settings=settings, config=config, world_size=world_size, source=None)

    if model.config is not None and not Path(model.config).exists():
        raise UserError(
            f"--config {model.config}: no such folder or file; with weights from {folder} give "
            "their Hugging Face folder, or nothing."
        )
    what = "load" if load else "pretrained_checkpoint"
    opened = folder_of(what, folder, found) or folder
    config_folder = model.config or _config_beside_tokenizer(settings, opened)
    source = open_source(opened, None, config_folder)
    saved = None
    if load and not model.finetune and source.kind == "mg":
        saved = find_saved_run(source.folder)
    if saved and model.padded_vocab_size is None and model.make_vocab_size_divisible_by is None:
        # the optimizer's state has as many rows as the weights had
        model = replace(model, padded_vocab_size=saved.padded_vocab_size)
    config = settings.config_of_run(source.config)
    if saved and not saved.is_foreign:
        require_same_positions(folder, config, source)
    return RunPlan(
        settings=replace(settings, model=model),
        config=config,
        world_size=world_size,
        source=source,
        saved=saved,
        found=found or Found({what: within(folder, source.folder)}),
    )


def require_same_positions(load: Path, config: Qwen2Config, source: Source) -> None:
    """Refuses YaRN for a run that goes on and began without it.

    Args:
        load: the run's folder.
        config: what the flags make of the model.
        source: the run's weights.

    Raises:
        UserError: with the way out.
    """
    if config != source.config:
        raise UserError(
            f"--rope-scaling-type yarn: the run in {load} is without it, and goes on as it began; "
            "leave it out, or begin a new run from its weights with --finetune and another --save."
        )


def _load(settings: TrainingSettings, found: Found | None) -> Path | None:
    """--load's folder; None where it holds no checkpoint yet.

    Raises:
        UserError: it holds none, and nothing says that it need not.
    """
    load = settings.model.load
    if load is None or _holds_checkpoint(load, found):
        return load
    if settings.model.pretrained_checkpoint is not None or load == settings.checkpoint.save:
        return None

    raise UserError(
        f"--load {load}: there is no checkpoint in it. (That is right only when "
        "--pretrained-checkpoint says where to start, or when --save is the same folder.)"
        f"{hub_hint(load)}"
    )


def flags(settings: Any) -> dict[str, Any]:
    """Every setting by the flag that sets it."""
    found: dict[str, Any] = {}
    for group in fields(settings):
        value = getattr(settings, group.name)
        own = fields(value) if is_dataclass(value) else ()
        found |= {flag_of(one.name): getattr(value, one.name) for one in own}
    return found


def folder_of(what: str, folder: Path, found: Found | None) -> Path | None:
    """Where to look for what `folder` holds; None where rank 0 has found nothing in it.

    Raises:
        DamagedError: it holds damaged iterations only; rank 0 looks.
    """
    if found is None:
        return newest_sound(folder)
    return folder / found.folders[what] if what in found.folders else None


def newest_sound(folder: Path) -> Path:
    """The iteration in a run's folder to go on from, or any other folder itself.

    Of each, what can be checked without reading the tensors is held against its manifest.

    Raises:
        DamagedError: all are damaged.
    """
    iterations = resumable_iterations(folder) or [folder]
    damaged: DamagedError | None = None
    for iteration in iterations:
        try:
            check_iteration(iteration, most_bytes=MOST_BYTES_CHECKED)
        except DamagedError as error:
            damaged = damaged or error
            warn(iteration, error)
        else:
            return iteration
    assert damaged is not None
    raise damaged


def warn(iteration: Path, error: UserError) -> None:
    """Says loudly, on rank 0, that a checkpoint is not used."""
    for fault in error.faults[:3]:
        print(f"WARNING: {fault}", file=sys.stderr)
    print(
        f"WARNING: {iteration} is damaged and NOT used; an older checkpoint is looked for.",
        file=sys.stderr,
        flush=True,
    )


def within(folder: Path, opened: Path) -> str:
    """What `folder_of` needs to find `opened` again on another rank."""
    return str(opened.relative_to(folder)) if opened.is_relative_to(folder) else str(opened)


def _holds_checkpoint(folder: Path, found: Found | None) -> bool:
    """Even a damaged one; not the folder a run is going to save into, perhaps with its metrics."""
    if found is not None:
        return "load" in found.folders
    if not folder.is_dir():
        return folder.exists()
    # a run that was killed before its first checkpoint may have left its config.json
    signs = ("latest_*", "iter_*", ".iter_*.replaced", "mp_rank_*", ".metadata")
    signs += ("*.safetensors*", "*.bin")
    return any(path for sign in signs for path in folder.glob(sign))


def _config(name: str | None) -> Qwen2Config:
    if name is None:
        raise UserError("give --load, or --config for random weights: nothing says which model.")
    return Qwen2Config.from_pretrained(name) if Path(name).exists() else Qwen2Config.named(name)


def _config_beside_tokenizer(settings: TrainingSettings, folder: Path) -> str | None:
    """The tokenizer's folder, where it has the config.json that shards lack.

    MindSpeed-LLM's shards have none, and its command lines name the model's folder there.
    """
    name = settings.tokenizer_folder
    if name is None or not (Path(name) / "config.json").is_file():
        return None
    return name if lacks_config(folder) else None


def _fact(flag: str, value: Any) -> str:
    """What of a flag's value has to be the same on all ranks."""
    if flag == "--num-workers":
        return ""
    is_path = isinstance(value, Path) or flag in PATHS
    return "a path" if is_path and value else str(value)


def _fingerprint(source: Source | None) -> str:
    """A hash of the names, shapes and dtypes of all tensors."""
    if source is None:
        return "random"
    rows = [(held.name, held.piece.box, held.stored.dtype) for held in source.held]
    return f"{len(rows)} tensors, {_hash(repr(sorted(rows)))}"


def _hash(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())
