"""What the benchmarks measure of transformers: it trains, and torch.save saves what it trained."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qwen2_ascend.benchmark.work import State, Trainer, Work, batches, moments, weights
from qwen2_ascend.pretrained import open_pretrained
from qwen2_ascend.runtime import Runtime


def trainer(work: Work, runtime: Runtime) -> Trainer:
    """transformers with SDPA, and what its Trainer does by default: autocast, fused AdamW."""
    model: Any = open_pretrained(
        AutoModelForCausalLM, work.folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.to(runtime.device).train()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": work.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=work.lr, fused=True)
    read = batches(work, runtime)
    num_microbatches = work.global_batch_size // work.micro_batch_size
    in_bf16 = torch.autocast(runtime.name, torch.bfloat16, enabled=work.dtype == "bf16")

    def step() -> float:
        total = 0.0
        for batch in islice(read, num_microbatches):
            labels = batch["labels"]
            with in_bf16:
                output = model(batch["tokens"], labels=labels, shift_labels=labels, use_cache=False)
            loss = output.loss / num_microbatches
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, work.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return Trainer(step=step, runtime=runtime, model=model, optimizer=optimizer)


def state(work: Work, runtime: Runtime) -> State:
    """One file of the model's and its optimizer's state_dict."""
    made = trainer(work, runtime)
    made.step()
    model, optimizer = made.model, made.optimizer

    def save(folder: Path) -> None:
        folder.mkdir()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, folder / "state.pt")

    def load(folder: Path) -> None:
        state = torch.load(folder / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    return State(save=save, load=load, tensors=lambda: [*weights(model), *moments(optimizer)])
