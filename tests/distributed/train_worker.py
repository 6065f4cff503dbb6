"""Training at every layout: losses, resuming, numbers that are not finite, precisions.

A check that trains returns its losses as JSON, so that the test can compare layouts with each
other; each is compared with an independent loop of transformers and torch.optim.AdamW here.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed.harness import Checks, Run, main
from helpers import make_tiny_hugging_face_folder, tiny_config

if TYPE_CHECKING:
    from qwen2_ascend.training.loop import StepResult, TrainingRun

TOLERANCE = 2e-7
STEPS, WARMUP = 4, 2
LENGTH, GLOBAL_BATCH, MICRO_BATCH = 24, 8, 2
LR, MIN_LR, WEIGHT_DECAY, CLIP = 3e-3, 1e-4, 0.1, 0.3

CHECKS = Checks()

LAYOUTS = {
    "tp1-pp1": (1, ""),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp2-vpp2": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "dp2-distributed-optimizer": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "tp2-pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "dp2-pp2-vpp2-distributed-optimizer": (
        4,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
}
FLAGS = (
    f"--mock-data --seq-length {LENGTH} --global-batch-size {GLOBAL_BATCH} "
    f"--micro-batch-size {MICRO_BATCH} --train-iters {STEPS} --lr {LR} --min-lr {MIN_LR} "
    f"--lr-decay-style cosine --lr-warmup-iters {WARMUP} --lr-warmup-init 1e-4 "
    f"--weight-decay {WEIGHT_DECAY} --clip-grad {CLIP} --device cpu"
)


# --- losses --------------------------------------------------------------------------------------


def losses_are_those_of_transformers(layout: str, tied: bool, run: Run) -> str:
    """The losses of four steps, whose gradients and updates they therefore share."""
    training = start(run, f"{FLAGS} {LAYOUTS[layout][1]}", tied)
    results = steps(training, STEPS)
    expected_losses, expected_norms = reference(hugging_face_folder(run, tied), tied)
    losses = [result.loss for result in results]
    differences = [abs(a - b) for a, b in zip(losses, expected_losses, strict=True)]
    assert max(differences) <= TOLERANCE, f"losses {losses}, transformers {expected_losses}"
    norms = [result.grad_norm for result in results]
    worst = max(abs(a - b) for a, b in zip(norms, expected_norms, strict=True))
    assert worst <= 2e-6, f"gradient norms {norms}, transformers {expected_norms}"
    assert min(norms) > CLIP, "clipping was not tried"
    return json.dumps({"losses": losses, "from transformers": max(differences), "norms": worst})


for _layout, (_world_size, _) in LAYOUTS.items():
    for _tied in (False, True):
        CHECKS.add(world_size=_world_size, name=f"{_layout}-{'tied' if _tied else 'untied'}")(
            functools.partial(losses_are_those_of_transformers, _layout, _tied)
        )


@functools.cache
def reference(folder: Path, tied: bool) -> tuple[list[float], list[float]]:
    """(losses, gradient norms) of transformers and torch.optim.AdamW alone."""
    import torch
    from qwen2_ascend.training.mock_data import MockDataset
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).float().train()
    data = MockDataset(STEPS * GLOBAL_BATCH, LENGTH, tiny_config().vocab_size, seed=1234)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    losses, norms = [], []
    for step in range(STEPS):
        samples = [data[step * GLOBAL_BATCH + i] for i in range(GLOBAL_BATCH)]
        tokens, labels = (torch.stack([s[key] for s in samples]) for key in ("tokens", "labels"))
        logits = model(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        for group in optimizer.param_groups:
            group["lr"] = reference_lr(step)
        optimizer.step()
        per_token = torch.nn.functional.cross_entropy(
            logits.detach().flatten(0, 1), labels.flatten(), reduction="none"
        )
        losses.append(per_token.double().mean().item())
    return losses, norms


def reference_lr(step: int) -> float:
    if step <= WARMUP:
        return 1e-4 + (LR - 1e-4) * step / WARMUP
    part = (step - WARMUP) / (STEPS - WARMUP)
    return MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * part)) / 2


# --- building ------------------------------------------------------------------------------------


def hugging_face_folder(run: Run, tied: bool) -> Path:
    """Weights with random biases and norms; written by the first rank that asks."""
    import torch

    folder = run.folder / ("tied" if tied else "untied")
    if run.runtime.rank == 0 and not folder.exists():
        make_tiny_hugging_face_folder(folder, tiny_config(tie_word_embeddings=tied))
    torch.distributed.barrier()
    return folder


def start(run: Run, flags: str, tied: bool = False, load: Path | None = None) -> TrainingRun:
    """A run as `launch/pretrain_qwen2.py` builds it, resumed if `load` is a training checkpoint."""
    from qwen2_ascend import runtime
    from qwen2_ascend.training.checkpointing import resume
    from qwen2_ascend.training.pretrain import build_run, checkpoint_identity, find_start
    from qwen2_ascend.training.settings import parse, validate

    load = load or hugging_face_folder(run, tied)
    settings = parse([*flags.split(), "--load", str(load)])
    begin = find_start(settings)
    settings = begin.settings
    validate(settings, begin.config, run.runtime.world_size)
    runtime.destroy_model_parallel()
    runtime.initialize_model_parallel(settings.layout(), begin.config.num_layers)
    run.runtime.seed_all(settings.runtime.seed)
    training = build_run(settings, begin, run.runtime, lambda line: None)
    if begin.saved is not None:
        resume(training, begin.saved, checkpoint_identity(settings, begin), settings.checkpoint)
    return training


def steps(training: TrainingRun, count: int) -> list[StepResult]:
    from qwen2_ascend.training.loop import train_batches, train_step

    batches = train_batches(training)
    return [train_step(training, batches) for _ in range(count)]


def state_of(training: TrainingRun) -> dict[str, Any]:
    """Every weight and every tensor of the optimizer, copied."""
    from qwen2_ascend.training.checkpointing import unwrap
    from qwen2_ascend.training.optimizer import gather_state

    chunks = [unwrap(chunk) for chunk in training.chunks]
    state = {
        f"{index}.{name}": parameter.detach().clone()
        for index, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }
    for index, name, values in gather_state(training.optimizer, chunks):
        state |= {f"{index}.{name}.{kind}": value.clone() for kind, value in values.items()}
    return state


if __name__ == "__main__":
    main(CHECKS)
