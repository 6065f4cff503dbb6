"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290).

The reference model is the model as it is when the run begins. What it says of the data is computed
once, before the first step, and kept beside the checkpoints, so no second model is ever in memory.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import xxhash
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch.nn.functional import logsigmoid, relu

from qwen2_ascend.data.chat.dataset import EpochDataset
from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning.saved_lora import SavedLora
from qwen2_ascend.finetuning.settings import FinetuneSettings, TuningSettings
from qwen2_ascend.model.sequence_cut import is_first_part, sum_over_parts
from qwen2_ascend.runtime.agreement import made_by_first
from qwen2_ascend.training.loop import Batch, TrainingRun, forward_only

if TYPE_CHECKING:
    from qwen2_ascend.training.plan import RunPlan

logger = logging.getLogger(__name__)

REFERENCE_FILE = "dpo_reference.safetensors"
TRAIN, VALID = "train", "valid"
_KEYS = {TRAIN: "", VALID: "valid_"}
"""What the names in REFERENCE_FILE of each source begin with."""
MARK = "dpo_reference"
"""What a checkpoint calls the digest of the reference that its run uses."""
UNSCORED = (
    "validation: not done, since the model as it was when the run began has not scored these "
    "pairs; {}begin a new run to have it"
)
METRIC_NAMES = ("rewards_chosen", "rewards_rejected", "rewards_accuracy", "rewards_margin")


class DpoObjective(NamedTuple):
    """The Objective of preference pairs: the mean over the pairs."""

    reference: torch.Tensor
    """Log-probabilities of the chosen and the rejected answers under the reference model, sums over
    their tokens, `[pairs, 2]`, by a batch's `index`."""
    tuning: TuningSettings

    def __call__(
        self, losses: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """losses `[2 b, s]`, the chosen rows first; see `training.loop.Objective`."""
        tuning = self.tuning
        log_probs, lengths = answer_log_probs(losses, batch["loss_mask"])
        gain = log_probs - self.reference[batch["index"]].t()
        shown = tuning.dpo_beta * gain.detach()
        if tuning.dpo_loss_type == "ipo":
            gain = gain / lengths
        of_pairs = pair_loss(gain[0] - gain[1], tuning)
        if tuning.pref_ftx:
            of_pairs = of_pairs - tuning.pref_ftx * log_probs[0] / lengths[0]
        total, pairs = of_pairs.sum(), torch.ones_like(of_pairs.detach()).sum()
        mean = total.detach() / pairs
        rest = (of_pairs.detach() - mean).sum()
        margin = shown[0] - shown[1]
        sums = (shown[0].sum(), shown[1].sum(), (margin > 0).float().sum(), margin.sum())
        return total, *_once(pairs, torch.stack((mean, rest, pairs, *sums)))


def _once(number: torch.Tensor, report: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number and report of whole rows, which all ranks of a context-parallel group know.

    The first says them, the others zeros.
    """
    if not is_first_part():
        number, report = torch.zeros_like(number), torch.zeros_like(report)
    return number.to(torch.int), report


def answer_log_probs(
    losses: torch.Tensor, loss_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability of each answer, its number of tokens), each `[2, b]`: chosen, rejected.

    Under context parallelism each rank has a part of the rows and gets the sums of all parts.

    Args:
        losses: every token's loss, `[2 b, s]`, the chosen rows first.
        loss_mask: `[2 b, s]`, 1 on the answers' tokens.
    """
    mask = loss_mask.float()
    log_probs = -(losses.float() * mask).sum(-1)
    log_probs, lengths = sum_over_parts(torch.stack((log_probs, mask.sum(-1)))).unbind()
    return log_probs.view(2, -1), lengths.clamp(min=1).view(2, -1)


def pair_loss(margin: torch.Tensor, tuning: TuningSettings) -> torch.Tensor:
    """Loss of each pair, `[b]`.

    Args:
        margin: how much more the model has gained on the chosen answer than on the rejected one
            since the start; per token with ipo (Azar et al. 2023, arXiv:2310.12036).
        tuning: beta, the kind of loss and its label smoothing.
    """
    beta, smoothing = tuning.dpo_beta, tuning.dpo_label_smoothing
    if tuning.dpo_loss_type == "hinge":
        return relu(1 - beta * margin)
    if tuning.dpo_loss_type == "ipo":
        return (margin - 1 / (2 * beta)).square()
    return -(1 - smoothing) * logsigmoid(beta * margin) - smoothing * logsigmoid(-beta * margin)


def prepare_dpo(run: TrainingRun, plan: RunPlan[FinetuneSettings]) -> None:
    """Gives `run` the objective, with what the model says before the first step as reference.

    Raises:
        UserError: a run is resumed whose reference is lost, or was made of other pairs.
    """
    run.rows_per_sample, run.metric_names = 2, METRIC_NAMES
    reference = _reference(run, plan)
    log_probs = [reference[TRAIN].log_probs]
    if run.valid_data is not None:
        run.valid_data = _Numbered(run.valid_data, first=len(log_probs[0]))
        log_probs.append(reference[VALID].log_probs)
    run.objective = DpoObjective(torch.cat(log_probs).to(run.runtime.device), plan.settings.tuning)


class _Numbered:
    """A dataset of pairs whose numbers begin at `first`."""

    def __init__(self, data: Any, first: int) -> None:
        self.data, self.first = data, first

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]

    def collate(self, samples: list[Any]) -> Batch:
        batch = self.data.collate(samples)
        batch["index"] = batch["index"] + self.first
        return batch


def _reference(run: TrainingRun, plan: RunPlan[FinetuneSettings]) -> Mapping[str, _Scored]:
    """What is said of each source of `run` on every rank, computed now or kept from before.

    Without validation where a resumed run's has not been scored by the model it began as.
    """
    sources = {TRAIN: run.train_data.source}
    if run.valid_data is not None:
        sources[VALID] = run.valid_data.source
    identity, kept = made_by_first(lambda: _kept_reference(plan, sources))
    scored = dict(kept.scored) if kept else {}
    for name, source in sources.items():
        pairs = identity.pairs[name]
        if name in scored and scored[name].pairs == pairs:
            continue
        if plan.saved is not None:  # its model is not what it was at the start
            other = "give the validation data that it began with, or " if name in scored else ""
            logger.info(UNSCORED.format(other))
            run.valid_data = None
            continue
        logger.info(f"reference log-probabilities of {len(source):,} pairs: computing")
        scored[name] = _Scored(reference_log_probs(run, source), pairs)
    run.marks = {**run.marks, MARK: scored[TRAIN].digest()}
    if plan.settings.checkpoint.save is not None and run.runtime.rank == 0:
        # a later start may know that folder alone; the reference stays that of its weights
        reference = _Kept(kept.weights if kept else identity.weights, scored)
        run.beside = {**run.beside, REFERENCE_FILE: reference.encoded()}
    return scored


def _kept_reference(
    plan: RunPlan[FinetuneSettings], sources: Mapping[str, Any]
) -> tuple[_Identity, _Kept | None]:
    """What pairs and weights these are; and what a file says of them, if there is one.

    Raises:
        UserError: a run is resumed whose reference is lost, or was made of other pairs.
    """
    identity, resumed, save = _identity(plan, sources), plan.saved, plan.settings.checkpoint.save
    folders = [resumed.folder.parent] if resumed else []
    folders += [save] if save else []
    began_with, others = plan.saved_state.get(MARK), []
    for folder in dict.fromkeys(folders):
        path = folder / REFERENCE_FILE
        kept = _Kept.read(path, identity)
        if kept is None or kept.scored[TRAIN].pairs != identity.pairs[TRAIN]:
            continue
        if resumed and began_with not in (None, kept.scored[TRAIN].digest()):
            others.append(str(path))
        elif resumed or kept.weights == identity.weights:
            logger.info(f"reference log-probabilities: {path}")
            return identity, kept
    if resumed is None:
        return identity, None
    anew = resumed.start_anew() if isinstance(resumed, SavedLora) else "--finetune"
    if others:
        raise UserError(
            f"{resumed.folder} is resumed, and {' and '.join(others)} is not the reference that it "
            "began with: another run, on other weights, has written it. Put the file of this run "
            f"back, or begin a new run with {anew} and another --save."
        )
    raise UserError(
        f"{resumed.folder} is resumed, and there is no {REFERENCE_FILE} of these pairs in "
        f"{' or '.join(map(str, folders))}: what the model said at the start is lost. Put the "
        f"file and the data back, or begin a new run with {anew}."
    )


def reference_log_probs(run: TrainingRun, source: Any) -> torch.Tensor:
    """Log-probabilities of the answers of every pair under the model as it is.

    Args:
        run: its model and layout.
        source: a PairDataset; every pair of it is scored.

    Returns:
        `[pairs, 2]`, chosen and rejected, on the host; the same on every rank.
    """
    found = torch.zeros(len(source), 3)  # the last column: whether it was scored here
    for micro_batch in forward_only(
        replace(run, objective=_report_log_probs), _in_order(run, source)
    ):
        pairs = len(micro_batch.metrics) // 3
        numbers, *sides = torch.tensor(micro_batch.metrics).view(3, pairs)
        found[numbers.long()] = torch.stack((*sides, torch.ones(pairs)), dim=1)
    return _from_last_stages(run, found)


def _in_order(run: TrainingRun, source: Any) -> Any:
    """Every pair once, and a few twice to fill the last global batch."""
    size = run.global_batch_size
    return EpochDataset(source, num_samples=-(-len(source) // size) * size, seed=0, shuffle=False)


def _report_log_probs(
    losses: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An Objective that reports, behind its three numbers, the pairs' numbers and both sides."""
    log_probs, _ = answer_log_probs(losses, batch["loss_mask"])
    numbers = batch["index"].float()
    one = torch.ones_like(numbers.sum())
    report = torch.cat((torch.stack((one, one, one)), numbers, log_probs.flatten()))
    return losses.sum(), *_once(one, report)


def _from_last_stages(run: TrainingRun, found: torch.Tensor) -> torch.Tensor:
    """Puts together what the data-parallel ranks of the last stage have found.

    A pair that filled a batch up may have been scored by two of them: the mean is taken.
    """
    has_result = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    has_result = has_result and parallel_state.get_tensor_model_parallel_rank() == 0
    has_result = has_result and is_first_part()
    sums = (found if has_result else torch.zeros_like(found)).to(run.runtime.device)
    torch.distributed.all_reduce(sums)
    sums = sums.cpu()
    return sums[:, :2] / sums[:, 2:]


class _Identity(NamedTuple):
    """What rank 0 tells the pairs and the reference's weights by."""

    pairs: dict[str, str]
    """A hash of each source's pairs."""
    num_train: int
    all_pairs: str
    """The hash of all of them, as the files of older releases have it."""
    weights: str


def _identity(plan: RunPlan[FinetuneSettings], sources: Mapping[str, Any]) -> _Identity:
    all_pairs, pairs = xxhash.xxh3_64(), {}
    for name, source in sources.items():
        own = xxhash.xxh3_64()
        for row in _rows(source):
            own.update(row)
            all_pairs.update(row)
        pairs[name] = own.hexdigest()
    files = [] if plan.source is None else list(plan.source.files)
    if plan.settings.lora.lora_load is not None:
        files += sorted(plan.settings.lora.lora_load.glob("adapter_*"))
    stats = [(path.resolve(), path.stat()) for path in files]
    weights = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    seed = None if files else plan.settings.runtime.seed
    return _Identity(pairs, len(sources[TRAIN]), all_pairs.hexdigest(), json.dumps([weights, seed]))


def _rows(source: Any) -> Iterator[bytes]:
    for index in range(len(source)):
        for side in source[index].values():
            yield side["tokens"].numpy().tobytes()
            yield side["loss_mask"].numpy().tobytes()


class _Scored(NamedTuple):
    """What the reference says of a source."""

    log_probs: torch.Tensor
    """`[pairs, 2]`, chosen and rejected, on the host."""
    pairs: str
    """The hash of the pairs."""

    def digest(self) -> str:
        """Tells these log-probabilities from those of other weights."""
        return xxhash.xxh3_64_hexdigest(self.log_probs.contiguous().numpy().tobytes())


def _of_sources(scored: dict[str, _Scored], identity: _Identity) -> dict[str, _Scored]:
    """`scored` by source; older releases put both into one, and have hashed them together."""
    both = scored[TRAIN]
    if VALID in scored or VALID not in identity.pairs or both.pairs != identity.all_pairs:
        return scored
    parts = both.log_probs.split([identity.num_train, len(both.log_probs) - identity.num_train])
    return {
        name: _Scored(part, identity.pairs[name])
        for name, part in zip((TRAIN, VALID), parts, strict=True)
    }


class _Kept(NamedTuple):
    """The contents of REFERENCE_FILE."""

    weights: str
    scored: Mapping[str, _Scored]
    """By TRAIN, and VALID where there is one."""

    @classmethod
    def read(cls, path: Path, identity: _Identity) -> _Kept | None:
        """What the file says; None where there is none.

        Raises:
            UserError: it is damaged.
        """
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                said = file.metadata() or {}
                scored = {
                    name: _Scored(file.get_tensor(f"{key}log_probs"), said[f"{key}pairs"])
                    for name, key in _KEYS.items()
                    if name == TRAIN or f"{key}pairs" in said
                }
                return cls(said["weights"], _of_sources(scored, identity))
        except (SafetensorError, KeyError) as error:
            raise UserError(
                f"{path} is damaged ({error}); delete it to compute it again."
            ) from None

    def encoded(self) -> bytes:
        """The file."""
        metadata, tensors = {"weights": self.weights}, {}
        for name, key in _KEYS.items():
            if name in self.scored:
                tensors[f"{key}log_probs"] = self.scored[name].log_probs.contiguous()
                metadata[f"{key}pairs"] = self.scored[name].pairs
        return save_tensors(tensors, metadata)
