"""Finds the first sublayer whose own error, apart from what it inherited, exceeds the noise.

A difference at the end of a model says nothing about where it arose, and a threshold for it is a
guess. So every sublayer is judged by itself: transformers' same sublayer is given *our* recorded
input, in a wider dtype. What our output differs from that is the sublayer's own error; nothing of
it came from before. And the noise is measured beside it: transformers' sublayer in our dtype, on
the same input, against the same wide result; where there are several right ways to round (a bias
added before or after rounding, a sum over ranks), the noisiest of them. A sublayer has parted when
its own error is more than `noise_factor` times that noise, at its worst token or over all of them.

Where every sublayer agrees, the whole model does; where one does not, it is named, and so is
whether what is seen after it is its doing only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen2_ascend.alignment.record import Record
from qwen2_ascend.alignment.reference import (
    Computed,
    copy_of,
    layer_sublayers,
    other_roundings,
    tables,
    token_losses,
)
from qwen2_ascend.alignment.sublayers import (
    EMBEDDING,
    FINAL_NORM,
    LOGITS,
    LOSS,
    Sublayer,
    describe,
    split_name,
    sublayers,
)
from qwen2_ascend.comparison.statistics import difference, logits_agreement
from qwen2_ascend.comparison.torch_dumps import to_numpy
from qwen2_ascend.dtypes import TORCH_DTYPES

PIECE = 1 << 22
"""Elements that are widened at once."""

PROVEN = 1e-10
"""The largest relative difference that fp64 may have at the end of the whole model."""


@dataclass(frozen=True)
class Error:
    """How far a tensor is from another, relative to it, token by token."""

    mean: float
    """Mean over the tokens of the difference's length over the reference's."""
    worst: float
    """The largest error of a token; infinite where something is not a finite number."""

    def scaled(self, factor: float) -> Error:
        return Error(self.mean * factor, self.worst * factor)

    def above(self, noise: Error, floor: float) -> float:
        """How many times the noise this is; `floor` is the least that counts as noise."""
        return max(
            self.mean / max(noise.mean, floor),
            self.worst / max(noise.worst, floor),
        )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sublayer."""

    name: str
    own: Error
    """The output's error, computed from our own input."""
    noise: Error
    """The same of transformers in our dtype."""
    total: Error | None = None
    """The output's error in the whole model up to here, with inherited errors."""
    total_noise: Error | None = None
    ratio: float
    """Own error over noise."""
    parted: bool
    histogram: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """`counts` of tokens whose own error lies between two `edges`."""

    @property
    def place(self) -> str:
        return describe(self.name)


@dataclass(frozen=True, kw_only=True)
class GradientFinding:
    """One parameter's gradient, everything before it included."""

    name: str
    error: float
    """Length of the difference over the length of the reference."""
    noise: float
    ratio: float
    parted: bool


@dataclass(frozen=True, kw_only=True)
class StepFinding:
    """One training step."""

    step: int
    loss: float
    reference: float
    """The loss in the wider dtype."""
    noise: float
    """Largest |transformers in our dtype - reference| of the steps so far."""
    grad_norm: float
    reference_grad_norm: float
    parted: bool


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What is found of one record."""

    record: Record
    wide: str
    """The dtype of what it was held to."""
    noise_factor: float
    findings: tuple[Finding, ...]
    gradients: tuple[GradientFinding, ...] = ()
    steps: tuple[StepFinding, ...] = ()
    loss: float
    """The reference's."""
    loss_noise: float
    logits: Mapping[str, float] = field(default_factory=dict)
    """KL divergence, agreement on the likeliest token, largest difference of the whole models."""

    @property
    def first(self) -> Finding | None:
        """The first sublayer that parts, in the order of computation."""
        return next((finding for finding in self.findings if finding.parted), None)

    @property
    def parted(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.parted)

    @property
    def first_gradient(self) -> GradientFinding | None:
        """The first gradient that parts on the way back: parameters are in the model's order."""
        return next((x for x in reversed(self.gradients) if x.parted), None)

    @property
    def first_step(self) -> StepFinding | None:
        return next((step for step in self.steps if step.parted), None)

    @property
    def unproven(self) -> float | None:
        """fp64: the largest total error, where it is above PROVEN."""
        if self.record.precision != "fp64":
            return None
        worst = max(finding.total.worst for finding in self.findings if finding.total)
        return worst if not worst <= PROVEN else None

    @property
    def aligned(self) -> bool:
        found = (self.first, self.first_gradient, self.first_step, self.unproven)
        return all(x is None for x in found)


def wide_dtype(precision: str) -> str:
    """What a run of `precision` is held to."""
    return "fp64" if precision in ("fp64", "fp32") else "fp32"


def noise_dtype(precision: str) -> tuple[str, float]:
    """What noise is measured in, and what it is multiplied by.

    Nothing here is wider than fp64: its noise is fp32's, by the ratio of their roundings.
    """
    if precision != "fp64":
        return precision, 1.0
    eps = [torch.finfo(TORCH_DTYPES[name]).eps for name in ("fp64", "fp32")]
    return "fp32", eps[0] / eps[1]


def token_error(ours: Tensor, reference: Tensor) -> Error:
    """Relative difference by tokens of `[b, s, features]`, computed in fp64."""
    means, worst, count = 0.0, 0.0, 0
    for relative in _by_token(ours, reference):
        means += relative.sum().item()
        worst = max(worst, relative.max().item())
        count += relative.numel()
    return Error(means / count, worst)


def _by_token(ours: Tensor, reference: Tensor) -> Iterator[Tensor]:
    """Relative differences `[s]`, sequence by sequence; infinite where one is no number."""
    for a, b in zip(ours, reference, strict=True):
        a, b = a.double(), b.double()
        distance, length = (a - b).norm(dim=-1), b.norm(dim=-1)
        relative = torch.where(distance == 0, 0.0, distance / length)
        yield torch.where(torch.isfinite(relative), relative, torch.inf)


def token_histogram(ours: Tensor, reference: Tensor) -> dict[str, list[float]]:
    """How many tokens have which relative error, on edges that are a tenth of a decade apart.

    Errors below the first edge count as of the first bin, those above the last one as of the last.
    """
    errors = torch.cat([relative.flatten() for relative in _by_token(ours, reference)])
    numbers = (10 * errors.clamp(1e-18, 1e3).log10()).floor().long()
    low, high = int(numbers.min()), int(numbers.max())
    counts = torch.bincount(numbers - low, minlength=high - low + 1)
    edges = [10 ** (number / 10) for number in range(low, high + 2)]
    return {"edges": edges, "counts": counts.tolist()}


def judge_sublayers(record: Record, model: Any, noise_factor: float) -> list[Finding]:
    """Every sublayer by itself, in the order of computation.

    Args:
        record: what is judged.
        model: transformers' model in `noise_dtype` of the record's precision; it stays as it is.
        noise_factor: see the module.
    """
    found, everything = [], sublayers(record.config.num_layers)
    with torch.no_grad():
        for layer, group in groupby(everything, lambda x: split_name(x.name)[0]):
            wide, narrow = _functions(record, model, layer)
            found += [_judge(record, x, wide, narrow, noise_factor) for x in group]
    return found


class _Functions(NamedTuple):
    """A part of the reference in one dtype."""

    dtype: torch.dtype
    compute: Mapping[str, Sequence[Callable[..., Tensor]]]
    """One function, or several that are as good, for each sublayer's name in its layer."""


def _functions(record: Record, model: Any, layer: int | None) -> tuple[_Functions, _Functions]:
    """The reference of one layer, or of what is outside the layers: wide, and in our dtype."""
    precision = record.precision
    wide = TORCH_DTYPES[wide_dtype(precision)]
    narrow = TORCH_DTYPES[noise_dtype(precision)[0]]
    if layer is None:
        return _Functions(wide, _outer(model, record, wide)), _Functions(
            narrow, _outer(model, record, None)
        )
    rotary = model.model.rotary_emb
    hidden = torch.zeros(1, record.tokens.shape[-1] - 1, 1)
    decoder = model.model.layers[layer]
    wide_tables = tables(copy_of(rotary, wide), hidden.to(wide))
    own_tables = tables(rotary, hidden.to(narrow))
    exact = layer_sublayers(copy_of(decoder, wide), wide_tables)
    own = {name: [compute] for name, compute in layer_sublayers(decoder, own_tables).items()}
    if record.unfused_attention:
        eager = layer_sublayers(decoder, own_tables, "eager")
        own["core_attention"] = [eager["core_attention"]]
    for name, compute in other_roundings(decoder, record.tensor_parallel).items():
        own[name] += [compute]
    return _Functions(wide, {k: [v] for k, v in exact.items()}), _Functions(narrow, own)


def _outer(
    model: Any, record: Record, wide: torch.dtype | None
) -> Mapping[str, Sequence[Callable[..., Tensor]]]:
    inputs, labels = record.tokens[..., :-1].flatten(0, 1), record.tokens[..., 1:].flatten(0, 1)

    def part(module: Any) -> Callable[..., Tensor]:
        # copied when it is called: the vocabulary's matrices are large
        return lambda x: (module if wide is None else copy_of(module, wide))(x)

    return {
        EMBEDDING: [lambda: part(model.model.embed_tokens)(inputs)],
        FINAL_NORM: [part(model.model.norm)],
        LOGITS: [part(model.lm_head)],
        LOSS: [lambda logits: token_losses(logits, labels)],
    }


def _judge(
    record: Record, sublayer: Sublayer, wide: _Functions, narrow: _Functions, factor: float
) -> Finding:
    inputs = [record.activations[name] for name in sublayer.parents]
    _, short = split_name(sublayer.name)
    precision = record.precision
    if short == LOSS and precision != "fp64":  # whatever the logits are, it is computed in fp32
        precision = "fp32"
        wide, narrow = wide._replace(dtype=torch.float64), narrow._replace(dtype=torch.float32)
    exact = wide.compute[short][0](*(x.to(wide.dtype) for x in inputs))
    own = token_error(record.activations[sublayer.name], exact)
    # one of the ranks is off by half of what they disagree by, at least
    own = replace(own, worst=max(own.worst, record.disagreement.get(sublayer.name, 0.0)))
    noises = [
        token_error(compute(*(x.to(narrow.dtype) for x in inputs)), exact)
        for compute in narrow.compute[short]
    ]
    noise = Error(max(x.mean for x in noises), max(x.worst for x in noises))
    noise = noise.scaled(noise_dtype(record.precision)[1])
    ratio = own.above(noise, _floor(precision))
    return Finding(
        name=sublayer.name,
        own=own,
        noise=noise,
        ratio=ratio,
        parted=not ratio <= factor,
        histogram=token_histogram(record.activations[sublayer.name], exact),
    )


def _floor(precision: str) -> float:
    """The relative error that one rounding of each element makes, about."""
    return torch.finfo(TORCH_DTYPES[precision]).eps / 4


def with_totals(
    findings: Sequence[Finding], record: Record, exact: Computed, narrow: Computed
) -> list[Finding]:
    """The findings with the errors of the whole models up to each sublayer."""
    scale = noise_dtype(record.precision)[1]
    found = []
    for finding in findings:
        reference = exact.activations[finding.name]
        total = token_error(record.activations[finding.name], reference)
        noise = token_error(narrow.activations[finding.name], reference).scaled(scale)
        found.append(replace(finding, total=total, total_noise=noise))
    return found


def judge_gradient(
    record: Record, name: str, exact: Tensor, narrow: Tensor, factor: float
) -> GradientFinding:
    """One parameter's gradient against the wide one; the noise is what `narrow` differs by."""
    error = _relative(record.gradients[name], exact)
    noise = _relative(narrow, exact) * noise_dtype(record.precision)[1]
    ratio = error / max(noise, _floor(record.precision))
    return GradientFinding(
        name=name, error=error, noise=noise, ratio=ratio, parted=not ratio <= factor
    )


def _relative(ours: Tensor, reference: Tensor) -> float:
    """The relative difference in fp64, computed piece by piece: vocabulary matrices are large."""
    squares = reference_squares = 0.0
    for a, b in zip(ours.flatten().split(PIECE), reference.flatten().split(PIECE), strict=True):
        a, b = a.double(), b.double()
        squares += (a - b).square().sum().item()
        reference_squares += b.square().sum().item()
    if squares == 0:
        return 0.0
    relative = math.sqrt(squares) / max(math.sqrt(reference_squares), 1e-300)
    return relative if math.isfinite(relative) else math.inf


Curve = Sequence[tuple[float, float]]


def judge_steps(
    ours: Curve, exact: Curve, narrow: Curve, precision: str, factor: float
) -> list[StepFinding]:
    """Losses and gradient norms, step by step; noise does not shrink again once it is there."""
    found, noise = [], 0.0
    for step, (mine, wide, other) in enumerate(zip(ours, exact, narrow, strict=True)):
        noise = max(noise, abs(other[0] - wide[0]), _loss_floor(wide[0], precision))
        found.append(
            StepFinding(
                step=step + 1,
                loss=mine[0],
                reference=wide[0],
                noise=noise,
                grad_norm=mine[1],
                reference_grad_norm=wide[1],
                parted=not abs(mine[0] - wide[0]) <= factor * noise,
            )
        )
    return found


def _loss_floor(loss: float, precision: str) -> float:
    """The least that counts as noise: two roundings of an fp32 loss; of logits in fewer digits,
    a tenth of one."""
    eps = torch.finfo(TORCH_DTYPES[noise_dtype(precision)[0]]).eps
    return (2 if precision in ("fp32", "fp64") else 0.1) * eps * abs(loss)


def logits_summary(record: Record, exact: Computed) -> dict[str, float]:
    """What the whole models' logits say of the next token."""
    ours, theirs = (to_numpy(x) for x in (record.activations[LOGITS], exact.activations[LOGITS]))
    found, agreement = difference(ours, theirs), logits_agreement(ours, theirs)
    of_found = ("max_abs", "relative_to_largest", "relative_l2", "cosine_min")
    of_agreement = ("kl_mean", "kl_max", "top1", "top5")
    return {name: getattr(found, name) for name in of_found} | {
        name: getattr(agreement, name) for name in of_agreement
    }


@dataclass(frozen=True, kw_only=True)
class Between:
    """Two records, sublayer by sublayer and gradient by gradient."""

    other: Judgement
    activations: Mapping[str, Error]
    """Our error relative to the other record."""
    gradients: Mapping[str, float]


def compare_records(ours: Record, other: Judgement) -> Between:
    """What two runs of the same weights and tokens differ by, whatever made it."""
    theirs = other.record
    return Between(
        other=other,
        activations={
            name: token_error(tensor, theirs.activations[name])
            for name, tensor in ours.activations.items()
        },
        gradients={
            name: _relative(gradient, theirs.gradients[name])
            for name, gradient in ours.gradients.items()
            if name in theirs.gradients
        },
    )
