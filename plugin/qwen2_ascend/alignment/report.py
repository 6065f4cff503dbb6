"""What is said of a judgement: lines for a terminal, JSON, and the files of --report."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen2_ascend.alignment.judge import Between, Finding, Judgement
from qwen2_ascend.alignment.sublayers import LAYER, LOGITS, split_name
from qwen2_ascend.errors import first_of
from qwen2_ascend.markdown import aligned

logger = logging.getLogger(__name__)


_ROTARY = "the rotary base or scaling of config.json, the positions, the rotary operator"
_QKV = "linear_qkv: the order of q, k and v in a query group, its bias, the head counts"
_NORM = "the norm's weight, norm_epsilon, the norm's operator"
_FC1 = "linear_fc1: gate is the first half of every rank's rows, up the second"
_SUM = "which tensors are added, dropout"

LOOK_AT = {
    "embedding": "the tokens, rows of the vocabulary on each rank",
    "input": "what is sent from stage to stage, the number and order of layers",
    "input_layernorm": _NORM,
    "query": _QKV,
    "key": _QKV,
    "value": _QKV,
    "query_rotary": _ROTARY,
    "key_rotary": _ROTARY,
    "core_attention": "the causal mask, softmax_scale, which heads share a key, the kernel",
    "linear_proj": "linear_proj: its columns on each rank, the sum over the ranks",
    "attention_residual": _SUM,
    "pre_mlp_layernorm": _NORM,
    "gate": _FC1,
    "up": _FC1,
    "swiglu": "which half goes through silu",
    "linear_fc2": "linear_fc2: its columns on each rank, the sum over the ranks",
    "output": _SUM,
    "final_layernorm": _NORM,
    "logits": "the output weight, tied or not, its rows on each rank",
    "loss": "padding of the vocabulary, whose rows count in Megatron's softmax; the labels",
}
"""Where to look when a sublayer parts."""


def describe_verdict(judgement: Judgement, between: Between | None = None) -> str:
    """The whole finding in a sentence or two."""
    words = [_verdict(judgement)]
    if between is not None:
        words.append(f"The run compared with: {_verdict(between.other)}")
    return "\n".join(words)


def _verdict(judgement: Judgement) -> str:
    first, precision = judgement.first, judgement.record.precision
    if first is not None:
        return _parted_verdict(judgement, first)
    if (gradient := judgement.first_gradient) is not None:
        return (
            f"PARTED in backward: every sublayer agrees, but on the way back the gradient of "
            f"{gradient.name} is the first to differ by {_number(gradient.error)}, "
            f"{_times(gradient.ratio)} the noise of {precision} ({_number(gradient.noise)})."
        )
    if (step := judgement.first_step) is not None:
        return (
            f"PARTED in training: at step {step.step} the loss is {step.loss:.6f} and the "
            f"reference's {step.reference:.6f}; noise explains {_number(step.noise)}. Look at the "
            "optimizer: learning rate, weight decay, clipping, main weights."
        )
    if (worst := judgement.unproven) is not None:
        return (
            f"PARTED: in fp64 the largest error is {_number(worst)}; a right mapping stays below "
            "1e-10."
        )
    checked = [f"{len(judgement.findings)} sublayers"]
    if judgement.gradients:
        checked.append(f"{len(judgement.gradients)} gradients")
    if judgement.steps:
        checked.append(f"{len(judgement.steps)} training steps")
    worst = max(judgement.findings, key=lambda x: x.ratio)
    return (
        f"ALIGNED: {_list(checked)} agree within {judgement.noise_factor:g} times the noise of "
        f"{precision}; the largest is {worst.place} at {_times(worst.ratio)}."
    )


def _parted_verdict(judgement: Judgement, first: Finding) -> str:
    names = [finding.name for finding in judgement.findings]
    _, short = split_name(first.name)
    parted = judgement.parted
    words = [
        f"PARTED at {first.place} first: given the same input it differs by "
        f"{_number(first.own.worst)}, {_times(first.ratio)} the noise of "
        f"{judgement.record.precision} there. Look at {LOOK_AT[short]}."
    ]
    if differ := judgement.record.disagreement.get(first.name):
        words.append(
            f"The tensor-parallel ranks, which should hold the same, differ by {_number(differ)}: "
            "look at what is summed or copied over them."
        )
    if before := names.index(first.name):
        words.append(f"The {before} sublayer(s) before it agree.")
    if rest := parted[1:]:
        places = first_of([finding.place for finding in rest], 6)
        words.append(f"These differ by themselves too: {places}.")
    elif first is not judgement.findings[-1]:
        words.append("Those after it only inherit its error.")
    return " ".join(words)


def print_report(judgement: Judgement, between: Between | None) -> None:
    """A line for every layer, with its worst sublayer."""
    rows = [("", "worst sublayer", "own error", "noise", "ratio", "whole model", "noise", "")]
    for layer_findings in _by_layer(judgement):
        worst, last = max(layer_findings, key=lambda x: x.ratio), layer_findings[-1]
        layer, short = split_name(worst.name)
        rows.append(
            (
                worst.place if layer is None else f"layer {layer}",
                "" if layer is None else next(x.label for x in LAYER if x.name == short),
                _number(worst.own.worst),
                _number(worst.noise.worst),
                _times(worst.ratio),
                "" if last.total is None else _number(last.total.mean),
                "" if last.total_noise is None else _number(last.total_noise.mean),
                "PARTED" if worst.parted else "",
            )
        )
    for line in (*aligned(rows, "llrrrrrl"), *_summary(judgement, between)):
        logger.info(line)


def _by_layer(judgement: Judgement) -> list[list[Finding]]:
    groups: dict[Any, list[Finding]] = {}
    for finding in judgement.findings:
        layer, short = split_name(finding.name)
        groups.setdefault(short if layer is None else layer, []).append(finding)
    return list(groups.values())


def _summary(judgement: Judgement, between: Between | None) -> list[str]:
    logits = judgement.logits
    lines = [
        f"logits: largest difference {_number(logits['max_abs'])}, "
        f"{_number(logits['relative_to_largest'])} of the largest logit; KL divergence "
        f"{_number(logits['kl_mean'])} nats; the likeliest token agrees at "
        f"{100 * logits['top1']:.2f}%",
        f"loss: {judgement.record.loss:.8f}, reference {judgement.loss:.8f} "
        f"(difference {_number(abs(judgement.record.loss - judgement.loss))}, noise "
        f"{_number(judgement.loss_noise)})",
    ]
    if judgement.gradients:
        worst = max(judgement.gradients, key=lambda x: x.ratio)
        parted = sum(x.parted for x in judgement.gradients)
        lines.append(
            f"gradients: {len(judgement.gradients)}, {parted} parted; the worst is {worst.name}: "
            f"{_number(worst.error)}, {_times(worst.ratio)} the noise"
        )
    for step in judgement.steps:
        lines.append(
            f"step {step.step}: loss {step.loss:.7f}, reference {step.reference:.7f} (noise "
            f"{_number(step.noise)}); gradient norm {step.grad_norm:.5f}, reference "
            f"{step.reference_grad_norm:.5f}{'   PARTED' if step.parted else ''}"
        )
    if between is not None:
        error = between.activations[LOGITS]
        lines.append(
            f"the two runs: logits differ by {_number(error.mean)} on average, "
            f"{_number(error.worst)} at the worst token"
        )
    return lines


def to_json(judgement: Judgement, between: Between | None) -> dict[str, Any]:
    """Every figure, in plain numbers; infinity is null."""
    found = _judgement_json(judgement)
    if between is not None:
        found["compared_with"] = _judgement_json(between.other)
        found["between"] = {
            "activations": {k: asdict(v) for k, v in between.activations.items()},
            "gradients": dict(between.gradients),
        }
    return _finite(found)


def _judgement_json(judgement: Judgement) -> dict[str, Any]:
    record, first = judgement.record, judgement.first
    return {
        "aligned": judgement.aligned,
        "verdict": _verdict(judgement),
        "first": None if first is None else first.name,
        "origin": record.origin,
        "precision": record.precision,
        "reference_dtype": judgement.wide,
        "noise_factor": judgement.noise_factor,
        "loss": {
            "ours": record.loss,
            "reference": judgement.loss,
            "noise": judgement.loss_noise,
        },
        "logits": dict(judgement.logits),
        "sublayers": [asdict(finding) for finding in judgement.findings],
        "gradients": [asdict(finding) for finding in judgement.gradients],
        "steps": [asdict(step) for step in judgement.steps],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_files(judgement: Judgement, between: Between | None, files: Mapping[str, Path]) -> None:
    """Writes what is asked for.

    Args:
        judgement: the judgement of this run.
        between: the comparison with another run.
        files: paths by "html", "png" and "json".

    Raises:
        OSError: a file cannot be written.
    """
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    if "json" in files:
        text = json.dumps(to_json(judgement, between), indent=1) + "\n"
        files["json"].write_text(text, encoding="utf-8")
    if "html" in files or "png" in files:
        from qwen2_ascend.alignment.page import write_pages  # matplotlib, which is an extra's

        write_pages(judgement, between, describe_verdict(judgement, between), files)
    for path in files.values():
        logger.info(f"report: {path}")


def _number(value: float) -> str:
    """Two digits are what an error is worth."""
    return "0" if value == 0 else f"{value:.1e}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 1000 else f"{ratio:.0e}x"


def _list(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
