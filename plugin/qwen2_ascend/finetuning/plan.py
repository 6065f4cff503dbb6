"""The plan of a tuning run, LoRA or not: opened, and held to what the flags say of it."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

from qwen2_ascend.checkpoint.formats.peft_adapter import read_lora_config
from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning.base_model import base_folder, require_same_base
from qwen2_ascend.finetuning.exports import find_exports
from qwen2_ascend.finetuning.saved_lora import SavedLora, find_saved_lora
from qwen2_ascend.finetuning.settings import LORA_FIELDS, F, FinetuneSettings, LoraSettings
from qwen2_ascend.flags import given_flags
from qwen2_ascend.lora_config import LoraConfig
from qwen2_ascend.training import plan as plans
from qwen2_ascend.training.plan import Found, RunPlan, folder_of, within

logger = logging.getLogger(__name__)

SAME_OR_NOTHING = "say the same, or nothing."


def make_plan(settings: F, found: Found | None = None) -> RunPlan[F]:
    """Opens what --load and --lora-load name; reads headers only.

    The arguments are those of `training.plan.make_plan`.

    Raises:
        UserError: nothing usable is there, it contradicts the flags, or the run's end could not
            be written.
    """
    plan = plan_of_run(settings, found)
    return with_exports(plan) if found is None else plan


def with_exports(plan: RunPlan[F]) -> RunPlan[F]:
    """The plan with the exports that are there; rank 0 looks.

    Raises:
        UserError: an export could not be made at the end.
    """
    return replace(plan, found=plan.found._replace(exports=find_exports(plan)))


def plan_of_run(settings: F, found: Found | None) -> RunPlan[F]:
    """The plan that `make_plan` makes, without the exports."""
    plan = _opened(settings, found)
    if plan.lora is not None and plan.source is not None and plan.config != plan.source.config:
        raise UserError(
            "--rope-scaling-type yarn: an adapter does not say how its base model counts "
            f"positions; write rope_scaling into the config.json of {plan.base} instead."
        )
    return plan


def _opened(settings: F, found: Found | None) -> RunPlan[F]:
    load = settings.model.load
    saved = find_saved_lora(load and folder_of("load", load, found))
    if load is None or saved is None:
        plan = plans.make_plan(settings, found)
        if settings.lora.is_on and plan.saved is not None:
            raise UserError(
                f"--load {load}: holds a run that tunes all weights; --finetune takes its weights "
                "alone, to put adapters on them."
            )
        return replace(plan, lora=_asked(settings.lora))
    if settings.model.finetune:
        _require_own(settings, saved)
    lora = saved.lora
    started = _adapter(settings.lora) or lora  # the run's first weights
    if replace(started, **{"dropout": lora.dropout, **settings.lora.said()}) != lora:
        raise UserError(f"--load {load}: is a run with {_described(lora)}; {SAME_OR_NOTHING}")
    given = settings.model.pretrained_checkpoint
    # the other ranks' folder may be a copy: rank 0 tells them where in it the base is
    base = base_folder(given, saved) if found is None else given or saved.base
    if base is None or not base.exists():
        raise UserError(
            f"{saved.folder}: its base model was {base or 'random'}, which is not there; name it "
            "with --pretrained-checkpoint."
        )
    # the base is opened as --pretrained-checkpoint is, and what was not said has been settled
    model = replace(settings.model, load=None, pretrained_checkpoint=base)
    settings = replace(settings, model=model, lora=LoraSettings.of(lora))
    plan = plans.make_plan(settings, found)
    folders = {**plan.found.folders, "load": within(load, saved.folder)}
    if found is None and plan.source is not None:
        require_same_base(saved, plan.source)
        where = given or base
        folders["pretrained_checkpoint"] = within(where.resolve(), plan.source.folder.resolve())
    return replace(
        plan,
        saved=saved,
        lora=lora,
        found=plan.found._replace(folders=folders),
    )


def _require_own(settings: FinetuneSettings, saved: SavedLora) -> None:
    """Refuses --finetune with a LoRA run, unless this command line has begun it and goes on."""
    load, save = settings.model.load, settings.checkpoint.save
    if load is None or save is None or os.path.realpath(load) != os.path.realpath(save):
        raise UserError(
            f"--finetune with --load {load}: holds a LoRA run, which goes on as it began; leave "
            f"--finetune out, or begin a new run on its adapter with {saved.start_anew()}."
        )
    logger.info(f"--finetune: {save} holds this run already, which goes on")


def _asked(flags: LoraSettings) -> LoraConfig | None:
    """The adapters of a new run: new ones, or those of --lora-load.

    Raises:
        UserError: flags contradict the adapter, or say how there should be none.
    """
    said = flags.said()
    if (adapter := _adapter(flags)) is not None:
        asked = replace(adapter, **{"dropout": 0.0, **said})
        if asked != replace(adapter, dropout=asked.dropout):
            raise UserError(
                f"--lora-load {flags.lora_load}: is {_described(adapter)}; {SAME_OR_NOTHING}"
            )
        return asked
    if said and flags.lora_r is None:
        raise UserError(
            f"{', '.join(given_flags(flags, LORA_FIELDS))}: give --lora-r RANK or --lora-load too; "
            "without them all weights are tuned."
        )
    return LoraConfig(**said) if said else None


def _adapter(flags: LoraSettings) -> LoraConfig | None:
    """What --lora-load names."""
    return None if flags.lora_load is None else read_lora_config(flags.lora_load)


def _described(lora: LoraConfig) -> str:
    scaled = ", rank-stabilized" if lora.use_rslora else ""
    return (
        f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}{scaled}, dropout {lora.dropout:g} on "
        f"{', '.join(lora.targets)}"
    )
