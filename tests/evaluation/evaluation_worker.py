"""Perplexity at TP1, TP2 and PP2 against transformers' logits, window by window."""

from __future__ import annotations

from typing import Any

from distributed.harness import Checks, Run, main
from inference.generation_worker import CONFIG, asked, engine, model_folder, theirs

TOLERANCE = 1e-5
NUM_TOKENS, WINDOW, STRIDE = 150, 40, 16

CHECKS = Checks()


def tokens() -> list[int]:
    import torch

    generator = torch.Generator().manual_seed(2)
    return torch.randint(CONFIG.vocab_size, (NUM_TOKENS,), generator=generator).tolist()


def expected(run: Run) -> list[Any]:
    """[loss, number of likeliest tokens], as transformers' page on perplexity computes them."""
    import torch

    model, ids = theirs(run, CONFIG), torch.tensor([tokens()])
    losses, likeliest, previous = [], 0, 1
    for begin in range(0, NUM_TOKENS, STRIDE):
        end = min(begin + WINDOW, NUM_TOKENS)
        with torch.no_grad():
            logits = model(ids[:, begin:end]).logits[0, :-1]
        targets = ids[0, begin + 1 : end]
        new = end - previous
        log = logits.double().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        losses += (-log[-new:]).tolist()
        likeliest += (logits.argmax(-1) == targets)[-new:].sum().item()
        previous = end
        if end == NUM_TOKENS:
            break
    assert len(losses) == NUM_TOKENS - 1
    return [sum(losses) / len(losses), likeliest]


def perplexity(tp: int, pp: int, run: Run) -> str:
    import math

    from qwen2_ascend.evaluation.perplexity import perplexity
    from qwen2_ascend.evaluation.scoring import Scorer, windows

    model_folder(run, CONFIG)
    loss, likeliest = asked(run, "perplexity", lambda: expected(run))
    scorer = Scorer(engine(run, tp, pp, CONFIG, num_rows=3))
    found = perplexity(scorer, tokens(), num_bytes=300, window=WINDOW, stride=STRIDE)
    assert found.num_tokens == NUM_TOKENS - 1
    assert abs(found.loss - loss) <= TOLERANCE, (found.loss, loss)
    assert abs(found.perplexity / math.exp(loss) - 1) <= TOLERANCE
    assert abs(found.bits_per_byte - loss * 149 / 300 / math.log(2)) <= TOLERANCE
    cut = list(windows(NUM_TOKENS, WINDOW, STRIDE))
    scored = scorer.score([tokens()[a:b] for a, b, _ in cut], [first - a for a, _, first in cut])
    assert sum(one.is_likeliest for row in scored for one in row) == likeliest
    return f"loss {found.loss:.6f}, off by {abs(found.loss - loss):.1e}"


for tp, pp in ((1, 1), (2, 1), (1, 2)):
    CHECKS.case(f"perplexity-tp{tp}-pp{pp}", tp * pp, perplexity, tp, pp)


if __name__ == "__main__":
    main(CHECKS)
