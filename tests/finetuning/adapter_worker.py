"""Adapter folders against peft itself; needs peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distributed.harness import Checks, Run, main
from distributed.trainings import apart, mean_loss, reference, stacked
from finetuning.lora_worker import (
    ADAPTERS,
    CLIP,
    LAYOUTS,
    LR,
    base_folder,
    batches_of,
    evaluate,
    model_config,
    save_adapter,
    settle,
    start,
    train,
    unless_refused,
)

TOLERANCE = 5e-7
"""Tolerance of peft's logits, and of a loss after an adapter has come from peft."""

CHECKS = Checks()


def peft_model(base: Path, adapter: Path):
    """peft's model of an adapter folder, in fp32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base).float(), adapter)


def all_logits(training: Any, tokens: Any):
    """`[b, s, vocabulary]` of a model without pipeline stages."""
    import torch
    from megatron.core import parallel_state

    chunk = training.chunks[0].module.eval()
    with torch.no_grad():
        own = chunk(tokens, None, None)
    parts = [torch.empty_like(own) for _ in range(training.settings.layout().tp)]
    torch.distributed.all_gather(parts, own, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1)


@unless_refused
def peft_loads_what_is_saved(layout: str, case: str, run: Run) -> str:
    """Its logits (or loss, where the logits are spread over stages) are those of the trained."""
    import torch

    training = start(run, case, LAYOUTS[layout][1])
    train(training)
    settle(training)
    folder = run.folder / f"saved-{layout}-{case}"
    save_adapter(training, case, folder)
    model = peft_model(base_folder(run, case), folder).eval()
    with torch.no_grad():
        worst = abs(mean_loss(model, batches_of(case)[0]).item() - evaluate(training))
        assert worst <= TOLERANCE, worst
        if training.settings.layout().pp == 1:
            tokens, _ = stacked(batches_of(case)[1])
            theirs = model(input_ids=tokens, use_cache=False).logits
            worst = (theirs - all_logits(training, tokens)).abs().max().item()
            assert worst <= 5e-6, worst
            with model.disable_adapter():
                base = model(input_ids=tokens, use_cache=False).logits
            assert (theirs - base).abs().max() > 1e-2, "the adapter does not matter"
    return f"off by {worst:.1e}"


@unless_refused
def what_peft_saves_is_loaded(layout: str, case: str, run: Run) -> str:
    """An adapter that peft made, with values everywhere."""
    import torch
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from qwen2_ascend.checkpoint.formats.peft_adapter import read_lora_config
    from qwen2_ascend.finetuning.adapter import load_adapter

    lora, base = ADAPTERS[case], base_folder(run, case)
    folder = run.folder / f"peft-{layout}-{case}"
    if run.runtime.rank == 0:
        settings = PeftConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=list(lora.targets),
            use_rslora=lora.use_rslora,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base).float(), settings)
        generator = torch.Generator().manual_seed(4)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(0.2 * values)
        model.save_pretrained(folder)
    torch.distributed.barrier()
    assert read_lora_config(folder) == lora
    training = start(run, case, LAYOUTS[layout][1])
    before = evaluate(training)
    config, cut = model_config(case), training.settings.layout()
    load_adapter(training.chunks, lora, config, cut, folder)
    with torch.no_grad():
        expected = mean_loss(peft_model(base, folder).eval(), batches_of(case)[0]).item()
    found = evaluate(training)
    assert abs(expected - before) > 1e-2, "the adapter does not matter"
    assert abs(found - expected) <= 1e-6, (found, expected)
    return f"off by {abs(found - expected):.1e}"


for _layout, _case in (
    ("tp1", "some"),
    ("tp2-sp", "all"),
    ("tp2-sp", "some"),
    ("pp2-vpp2", "all"),
    ("dp2-distributed-optimizer", "some"),
    ("tp2-pp2", "some"),
    ("tp4-sp", "some"),
    ("tp4-sp", "all"),
):
    for _check in (peft_loads_what_is_saved, what_peft_saves_is_loaded):
        _name = f"{_check.__name__}-{_layout}-{_case}"
        CHECKS.case(_name, LAYOUTS[_layout][0], _check, _layout, _case)


def peft_trains_alike(case: str, run: Run) -> str:
    """peft and torch's AdamW, from the same start, see the same losses."""
    from peft import PeftModel

    training = start(run, case, "")
    folder = run.folder / f"untrained-{case}"
    save_adapter(training, case, folder)
    losses = [result.loss for result in train(training)]
    theirs, _ = reference(
        base_folder(run, case),
        batches_of(case),
        mean_loss,
        lr=lambda step: LR,
        clip=CLIP,
        change=lambda model: PeftModel.from_pretrained(model, folder, is_trainable=True),
    )
    worst = apart(losses, theirs)
    assert worst <= TOLERANCE, (losses, theirs)
    return f"off by {worst:.1e}"


for _case in ADAPTERS:
    CHECKS.case(f"peft_trains_alike-{_case}", 1, peft_trains_alike, _case)


@CHECKS.add(world_size=1)
def merging_files_is_merge_and_unload(run: Run) -> str:
    """`convert --adapter`, straight and by way of shards, gives peft's merged weights."""
    import torch
    from safetensors.torch import load_file

    from qwen2_ascend.checkpoint.command import main as convert

    notes = []
    for case, lora in ADAPTERS.items():
        training = start(run, case, "")
        train(training)
        base, adapter = base_folder(run, case), run.folder / f"to-merge-{case}"
        save_adapter(training, case, adapter)
        merged = peft_model(base, adapter).merge_and_unload()
        expected = dict(merged.named_parameters())
        straight, shards, back = (run.folder / f"{name}-{case}" for name in ("m", "s", "b"))
        common = f"--load-dir {base} --adapter {adapter} --verify --save-dir"
        convert(f"{common} {straight} --save-model-type hf".split())
        sizes = "--target-tensor-parallel-size 4 --target-pipeline-parallel-size 2"
        convert(f"{common} {shards} --save-model-type mg {sizes}".split())
        convert(f"--load-dir {shards} --save-dir {back} --save-model-type hf".split())
        found = load_file(straight / "model.safetensors")
        again = load_file(back / "model.safetensors")
        assert found.keys() == expected.keys() == again.keys()
        worst = max((found[name] - expected[name]).abs().max().item() for name in expected)
        assert worst <= 1e-7, worst
        off = max((found[name] - again[name]).abs().max().item() for name in expected)
        assert off <= 1e-7, off
        untouched = [n for n in expected if n.split(".")[-2] not in lora.targets]
        assert all(torch.equal(found[name], expected[name]) for name in untouched)
        notes.append(f"off by {worst:.1e}, by way of shards {off:.1e}")
    return "; ".join(notes)


if __name__ == "__main__":
    main(CHECKS)
