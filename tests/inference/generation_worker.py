"""Generation at every layout against transformers' generate, with random weights.

One prompt after the other there, all together in three rows here: rows are filled anew and moved.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from distributed.harness import Checks, Run, main
from helpers import generated, make_tiny_hugging_face_folder, tiny_config
from qwen2_ascend.parallel import ParallelLayout

NEW_TOKENS = 64
PROMPT_LENGTHS = (5, 1, 40, 17, 2, 29, 8)
LOGITS_TOLERANCE = 2e-6
# an odd vocabulary has padding at TP2
CONFIG = tiny_config(vocab_size=255, max_position_embeddings=256)
ONE_GROUP = tiny_config(
    vocab_size=255, max_position_embeddings=256, num_query_groups=1, tie_word_embeddings=True
)

CHECKS = Checks()


def prompts() -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(11)
    return [torch.randint(255, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def most_tokens(index: int) -> int:
    """A limit of its own for each prompt."""
    return NEW_TOKENS - 5 * (index % 3)


def model_folder(run: Run, config: Any) -> Any:
    """The random model's folder, written by rank 0 once."""
    import torch

    folder = run.folder / f"model-{config.num_query_groups}"
    if run.runtime.rank == 0 and not folder.exists():
        make_tiny_hugging_face_folder(folder, config, seed=4)
    torch.distributed.barrier()
    return folder


def theirs(run: Run, config: Any) -> Any:
    """The transformers model, on rank 0 after `model_folder`."""
    from transformers import Qwen2ForCausalLM

    folder = run.folder / f"model-{config.num_query_groups}"
    return Qwen2ForCausalLM.from_pretrained(folder).float().eval()


def engine(run: Run, tp: int, pp: int, config: Any, num_rows: int) -> Any:
    from qwen2_ascend import runtime
    from qwen2_ascend.inference.engine import load_engine

    runtime.destroy_model_parallel()
    layout = ParallelLayout(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    runtime.initialize_model_parallel(layout, config.num_layers)
    folder = model_folder(run, config)
    return load_engine(folder, layout, dtype="fp32", num_rows=num_rows, config=config)


def generator(built: Any, **options: Any) -> Any:
    from qwen2_ascend.inference.generator import Generator

    return Generator(built, decode=lambda ids: "".join(f"<{i}>" for i in ids), **options)


def completions(made: Any, tokens: list[list[int]]) -> list[Any]:
    from qwen2_ascend.inference.generator import Request

    requests = [
        Request(index=i, tokens=ids, max_new_tokens=most_tokens(i)) for i, ids in enumerate(tokens)
    ]
    return sorted(made.run(requests), key=lambda done: done.index)


def asked(run: Run, name: str, question: Callable[[], Any]) -> Any:
    """What rank 0 finds out from transformers, once for all ranks and layouts of a launch."""
    import torch

    path = run.folder / f"{name}.json"
    if run.runtime.rank == 0 and not path.exists():
        path.write_text(json.dumps(question()), encoding="utf-8")
    torch.distributed.barrier()
    return json.loads(path.read_text(encoding="utf-8"))


def greedy(tp: int, pp: int, config: Any, run: Run) -> str:
    """Token for token, with sequences that end early and rows that are used again."""
    from qwen2_ascend.runtime.megatron_compat import megatron_release

    if tp > config.num_query_groups and megatron_release() < (0, 16):
        return "megatron-core 0.12 cannot do this layout, and refuses it"

    def question() -> list[list[int]]:
        model = theirs(run, config)
        return [generated(model, ids, NEW_TOKENS) for ids in prompts()]

    folder = model_folder(run, config).name
    whole = asked(run, f"greedy-{folder}", question)
    limited = [ids[: most_tokens(index)] for index, ids in enumerate(whole)]
    # the token that ends them at the most different places, and one of them not at all
    endings = {t: [cut(ids, t) for ids in limited] for t in range(255)}
    endings = {t: found for t, found in endings.items() if limited[0] in found}
    eos = max(endings, key=lambda t: len(set(map(len, endings[t]))))
    expected, lengths = endings[eos], set(map(len, endings[eos]))
    assert len(lengths) > 3, "the sequences do not end at different places"
    made = generator(engine(run, tp, pp, config, num_rows=3), eos_tokens=[eos])
    found = completions(made, prompts())
    tokens = [done.tokens for done in found]
    assert tokens == expected, [(x, y) for x, y in zip(tokens, expected, strict=True) if x != y]
    for done, ids in zip(found, expected, strict=True):
        ended = ids[-1] == eos
        assert done.finish_reason == ("eos" if ended else "length")
        assert done.text == "".join(f"<{i}>" for i in (ids[:-1] if ended else ids))
    return f"{sum(map(len, expected))} tokens, lengths {sorted(lengths)}"


def cut(ids: list[int], eos: int) -> list[int]:
    """The tokens up to and with the first `eos`."""
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def beams(tp: int, pp: int, config: Any, run: Run) -> str:
    """Token for token what transformers' search with two and three beams finds."""
    from qwen2_ascend.inference.beams import beam_search
    from qwen2_ascend.inference.sampling import Sampling

    folder = model_folder(run, config).name
    asked_for = asked(run, f"beams-{folder}", lambda: searches(theirs(run, config)))
    built = engine(run, tp, pp, config, num_rows=6)
    search = partial(beam_search, built, max_new_tokens=BEAM_TOKENS)
    plain = {"sampling": Sampling(repetition_penalty=PENALTY), "seed": 1}
    for ids, num_beams, eos, wanted in asked_for:
        found = search(ids, num_beams=num_beams, eos_tokens=eos, **plain)
        assert list(found) == wanted, (num_beams, eos, found, wanted)
    lengths = {len(wanted) for *_, wanted in asked_for}
    assert len(lengths) > 3, "the texts do not end at different places"
    sampling = Sampling(do_sample=True, temperature=1.5)
    drawn = [
        search(prompts()[0], num_beams=2, eos_tokens=(0,), sampling=sampling, seed=seed)
        for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    return f"lengths {sorted(lengths)}"


BEAM_TOKENS = 20
PENALTY = 1.5
"""Without it a random model says the same token again and again."""


def searches(model: Any) -> list[tuple[list[int], int, list[int], list[int]]]:
    """(prompt, number of beams, tokens that end a text, the text that transformers finds)."""
    found = []
    for ids in prompts()[:4]:
        for num_beams in (2, 3):
            free = searched(model, ids, num_beams, [])
            ends = [[], *([free[place]] for place in (1, 4, 9)), [free[2], free[7], 0]]
            found += [(ids, num_beams, e, searched(model, ids, num_beams, e)) for e in ends]
    return found


def searched(model: Any, ids: list[int], num_beams: int, eos: list[int]) -> list[int]:
    options = {"num_beams": num_beams, "repetition_penalty": PENALTY}
    return generated(model, ids, BEAM_TOKENS, eos or None, **options)


def cached_logits(tp: int, pp: int, config: Any, run: Run) -> str:
    """A cache gives the logits of a whole forward: prefilled, token by token, and going on."""
    import torch

    from qwen2_ascend.model.kv_cache import NewTokens

    tokens = [ids[:5] for ids in prompts() if len(ids) >= 5]
    (a, b, c), n = tokens[:3], 3

    def question() -> Any:
        with torch.no_grad():
            return theirs(run, config)(torch.tensor([a, b, c])).logits.tolist()

    model_folder(run, config)
    expected = torch.tensor(asked(run, "logits", question))
    built = engine(run, tp, pp, config, num_rows=n)
    built.reserve(16)
    worst = 0.0

    def compare(found: Any, wanted: torch.Tensor) -> None:
        nonlocal worst
        assert (found is not None) == built.is_last
        if found is not None:
            assert found.shape == wanted.shape
            worst = max(worst, (found - wanted).abs().max().item())

    # three, two and one token of the three prompts at once, then one at a time, at three places
    starts = [3, 2, 1]
    flat = [t for ids, count in zip((a, b, c), starts, strict=True) for t in ids[:count]]
    first = built.last_logits(flat, NewTokens(range(n), [0] * n, starts))
    compare(first, torch.stack([expected[i, count - 1] for i, count in enumerate(starts)]))
    for step in range(2):
        places = [start + step for start in starts]
        newest = [ids[place] for ids, place in zip((a, b, c), places, strict=True)]
        found = built.last_logits(newest, NewTokens(range(n), places, [1] * n))
        compare(found, torch.stack([expected[i, place] for i, place in enumerate(places)]))
    # the first row alone, from its third token on
    found = built.last_logits(a[2:], NewTokens(range(1), [2], [3]))
    compare(found, expected[:1, 4])
    assert worst <= LOGITS_TOLERANCE, worst
    return f"largest difference {worst:.1e}"


def sampled(tp: int, pp: int, config: Any, run: Run) -> str:
    """The tokens that transformers' logits give with the same draws: the same at any layout."""
    import torch

    from qwen2_ascend.inference.sampling import Place, Sampling, choose, sequence_generator

    sampling = Sampling(
        do_sample=True, temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.2
    )
    tokens = prompts()[:4]

    def question() -> list[list[int]]:
        model, answers = theirs(run, config), []
        for index, ids in enumerate(tokens):
            random, ids = sequence_generator(77, index), list(ids)
            process = sampling.processors(Place(prompt=ids, max_new_tokens=16, eos_tokens=[]))
            for _ in range(16):
                with torch.no_grad():
                    logits = model(torch.tensor([ids])).logits[:, -1]
                ids += choose(logits, sampling, [ids], [process], [random])
            answers.append(ids[-16:])
        return answers

    model_folder(run, config)
    expected = asked(run, "sampled", question)
    made = generator(
        engine(run, tp, pp, config, num_rows=2), eos_tokens=[], sampling=sampling, seed=77
    )
    found = [done.tokens[:16] for done in completions(made, tokens)]
    assert found == expected
    return f"{16 * len(tokens)} tokens"


def not_finite(tp: int, pp: int, config: Any, run: Run) -> str:
    """One bad weight, on the last rank: every rank ends with a sentence, greedy or drawing."""
    import pytest
    import torch

    from qwen2_ascend.errors import UserError
    from qwen2_ascend.inference.sampling import Sampling

    for value in (float("nan"), float("inf"), -float("inf")):
        built = engine(run, tp, pp, config, num_rows=2)
        if built.is_last and run.runtime.rank == run.runtime.world_size - 1:
            built.model.output_layer.weight[0] = value
        for sampling in (Sampling(), Sampling(do_sample=True, top_k=5)):
            made = generator(built, eos_tokens=[], sampling=sampling)
            with pytest.raises(UserError, match="logits are not finite in fp32"):
                completions(made, prompts()[:2])
    torch.distributed.barrier()
    return "refused on every rank"


def a_token_beyond_the_vocabulary(tp: int, pp: int, config: Any, run: Run) -> str:
    """With a cut embedding it would be zeros in silence."""
    import pytest

    from qwen2_ascend.errors import UserError
    from qwen2_ascend.evaluation.scoring import Scorer

    built = engine(run, tp, pp, config, num_rows=1)
    unknown = [*prompts()[0], config.vocab_size]
    for work in (
        lambda: completions(generator(built, eos_tokens=[]), [unknown]),
        lambda: Scorer(built).score([unknown], [1]),
        lambda: Scorer(built).score([[*unknown, 1]], [1]),
    ):
        with pytest.raises(UserError, match=f"holds token {config.vocab_size}"):
            work()
    return "refused on every rank"


def a_turn_goes_on(tp: int, pp: int, config: Any, run: Run) -> str:
    """A chat's second turn, whose beginning is in the cache, gives what it gives without one."""
    from qwen2_ascend.inference.generator import Request

    made = generator(engine(run, tp, pp, config, num_rows=1), eos_tokens=[])
    (first,) = made.run([Request(index=0, tokens=prompts()[2], max_new_tokens=9)])
    longer = [*prompts()[2], *first.tokens, *prompts()[3]]
    calls: list[int] = []
    forward = made.engine.next_tokens

    def counted(tokens: Any, new: Any, choose: Any = None) -> list[int]:
        calls.append(len(tokens))
        return forward(tokens, new, choose)

    made.engine.next_tokens = counted
    (second,) = made.run([Request(index=1, tokens=longer, max_new_tokens=NEW_TOKENS)])
    # the last token of the first answer was never put in
    assert calls[0] == len(prompts()[3]) + 1, calls[0]
    model_folder(run, config)
    wanted = asked(run, "longer", lambda: generated(theirs(run, config), longer, NEW_TOKENS))
    assert second.tokens == wanted
    # another beginning: nothing of it may be used
    (third,) = made.run([Request(index=2, tokens=prompts()[5], max_new_tokens=NEW_TOKENS)])
    other = prompts()[5]
    wanted = asked(run, "other", lambda: generated(theirs(run, config), other, NEW_TOKENS))
    assert third.tokens == wanted
    return f"{calls[0]} of {len(longer)} tokens put in"


for tp, pp in ((1, 1), (2, 1), (1, 2), (2, 2)):
    for function in (
        greedy, beams, cached_logits, sampled, not_finite, a_token_beyond_the_vocabulary,
    ):  # fmt: skip
        CHECKS.case(f"{function.__name__}-tp{tp}-pp{pp}", tp * pp, function, tp, pp, CONFIG)
CHECKS.case("a_turn_goes_on-tp1-pp1", 1, a_turn_goes_on, 1, 1, CONFIG)
CHECKS.case("a_turn_goes_on-tp1-pp2", 2, a_turn_goes_on, 1, 2, CONFIG)
CHECKS.case("greedy-tp2-one-group", 2, greedy, 2, 1, ONE_GROUP)


if __name__ == "__main__":
    main(CHECKS)
