"""DeepSpeed's path on the simulated device: the fused attention in transformers' interface, and
ZeRO's steps through torch_npu's host code."""

from __future__ import annotations

import pytest

from helpers import random_hugging_face_model, tiny_config

pytestmark = [
    pytest.mark.simulated(alone="deepspeed"),
    # torch_npu and DeepSpeed warn of each other's names
    pytest.mark.filterwarnings("default"),
]

CONFIG = tiny_config(kv_channels=16)
ENDS = (5, 12, 20, 40)
"""Documents of 2 rows of 20 tokens."""


def gradients(device: str, name: str, ends: tuple[int, ...] | None):
    """Logits of 2 rows and the gradients of every weight, on the host."""
    import torch

    model = random_hugging_face_model(CONFIG, seed=2).to(device).train()
    model.config._attn_implementation = name
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 20), generator=generator)
    weight = torch.randn(2, 20, CONFIG.vocab_size, generator=generator)
    starts = torch.zeros(40, dtype=torch.int64)
    for start, end in zip((0, *(ends or (20,))), ends or (20, 40), strict=False):
        starts[start:end] = start
    positions = (torch.arange(40) - starts).view(2, 20)
    packed = {"ends": ends} if ends else {}
    logits = model(
        input_ids=tokens.to(device), position_ids=positions.to(device), use_cache=False, **packed
    ).logits
    (logits * weight.to(device)).sum().backward()
    return logits.detach().cpu(), [p.grad.cpu() for p in model.parameters()]


@pytest.mark.parametrize("ends", [None, ENDS], ids=["rows", "packed"])
def test_the_fused_attention_is_that_of_the_cpu(run, ends) -> None:
    """One kernel per layer and direction; logits and all gradients as without it."""
    import torch

    from npusim.simulator import recording
    from qwen2_ascend.finetuning.deepspeed.attention import register_attention

    expected, wanted = gradients("cpu", register_attention("torch"), ends)
    fused = register_attention("npu")
    assert fused == "qwen2_ascend_npu"
    with recording() as record:
        logits, found = gradients("npu", fused, ends)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    attention = [op for op in record.ops if "FlashAttention" in op]
    assert len(attention) == 2 * CONFIG.num_layers, attention


def test_unpacked_attention_sees_no_later_token(run) -> None:
    """Without its mask the operator would attend to all of a row, silently."""
    import torch

    from qwen2_ascend.finetuning.deepspeed.attention import register_attention

    model = random_hugging_face_model(CONFIG, seed=2).to("npu")
    model.config._attn_implementation = register_attention("npu")
    tokens = torch.arange(20)[None]
    changed = tokens.clone()
    changed[0, 12:] += 100
    with torch.no_grad():
        before, after = (model(t.to("npu"), use_cache=False).logits for t in (tokens, changed))
    assert torch.equal(before[0, :12].cpu(), after[0, :12].cpu())
    assert not torch.equal(before[0, 12:].cpu(), after[0, 12:].cpu())


@pytest.mark.parametrize(
    ("stage", "has_lora"), [(2, False), (3, False), (2, True)], ids=["2", "3", "2-lora"]
)
def test_steps_have_the_losses_of_transformers(
    run, stage: int, has_lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    from finetuning.deepspeed_worker import LORA, LOSS_TOLERANCE, adapted, start, steps_of
    from finetuning.finetune_worker import (
        FLAGS,
        chats,
        hugging_face_folder,
        reference,
        sft_loss,
        taken,
    )

    monkeypatch.setenv("ASCEND_HOME_PATH", str(run.folder))  # where CANN would be
    flags = FLAGS.replace("--device cpu", "--device npu")
    flags += f" --zero-stage {stage} --micro-batch-size 2 --pack --data-path {chats(run)}"
    if has_lora:
        flags += f" {LORA}"
    training = start(run, flags)[0]
    assert training.model.config._attn_implementation == "qwen2_ascend_npu"
    batches = taken(training)
    losses, _ = steps_of(training)
    change = adapted if has_lora else None
    expected, _ = reference(hugging_face_folder(run), batches, sft_loss, change)
    worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    assert worst <= 2 * LOSS_TOLERANCE, (losses, expected)
