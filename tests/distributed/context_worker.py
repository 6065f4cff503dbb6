"""Context parallelism: the same losses, norms and checkpoints as without it.

Every check runs the same flags once with a cut of the sequences and once without, on as many
ranks, which then are data parallel; what those compute, other workers compare with transformers.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distributed import train_worker as pretraining
from distributed.harness import Checks, Run, main
from distributed.trainings import OVERLAP, PP2, TP2, VPP2, ZERO1, apart, tiny_folder
from finetuning import finetune_worker as tuning
from qwen2_ascend.config import YarnScaling

if TYPE_CHECKING:
    from qwen2_ascend.training.loop import TrainingRun

TOLERANCE = 5e-7
"""Tolerance of fp32 losses near 5.6, one rounding of which is 4.8e-7; over 4 steps 6e-8 is seen."""
ALGORITHMS = ("megatron_cp_algo", "ulysses_cp_algo", "kvallgather_cp_algo")

CP2 = "--context-parallel-size 2"
O2 = "--o2-gradient --o2-optimizer"

DATA = {
    "mock": "--mock-data --seq-length 24",
    "documents": "--reset-attention-mask --eod-token 0 --split 100,0,0 --seq-length 48",
    "packed": "--pack",
    "variable": "--variable-seq-lengths",
    "lora": "--lora-r 4 --lora-alpha 8 --pack",
    "dpo": "--stage dpo --dpo-label-smoothing 0.1 --pref-ftx 0.5",
    "ipo": "--stage dpo --dpo-loss-type ipo --variable-seq-lengths",
    "lora-dpo": "--stage dpo --lora-r 4 --lora-alpha 8",
    "yarn": "--mock-data --seq-length 48",
    "0.5B": "--mock-data --seq-length 56",
}
"""Flags of pretraining, then of fine-tuning."""
PRETRAINING = ("mock", "documents", "yarn", "0.5B")
MODELS: dict[str, dict[str, Any]] = {
    # beyond the 16 positions that the frequencies are of, so that they are interpolated
    "yarn": {
        "yarn": YarnScaling(
            factor=8.0, original_max_position_embeddings=16, attention_factor=1.2079
        )
    },
    # 14 query heads in 2 groups
    "0.5B": {"num_attention_heads": 14, "num_query_groups": 2, "hidden_size": 112},
}
"""What differs from the tiny model, by data that are pretrained on with it."""

CHECKS = Checks()


class Case(NamedTuple):
    """What is run with `layout` and without."""

    data: str
    layout: str
    flags: str = ""
    """Flags of both runs."""
    tolerance: float = TOLERANCE
    world_size: int = 2


def _cases() -> dict[str, Case]:
    cases = {}
    for algorithm in ALGORITHMS:
        layout, word = f"{CP2} --context-parallel-algo {algorithm}", algorithm.split("_")[0]
        for data in ("mock", "documents", "packed", "dpo"):
            cases[f"cp2-{word}-{data}"] = Case(data, layout)
        cases[f"cp4-{word}-mock"] = Case("mock", layout.replace("2", "4", 1), world_size=4)
        cases[f"cp4-{word}-packed"] = Case("packed", layout.replace("2", "4", 1), world_size=4)
        tp2 = f"{TP2} --sequence-parallel {layout}"
        cases[f"tp2-cp2-{word}-documents"] = Case("documents", tp2, world_size=4)
        cases[f"cp2-{word}-yarn"] = Case("yarn", layout)
        cases[f"cp2-{word}-0.5B"] = Case("0.5B", layout)
        if algorithm != "ulysses_cp_algo":  # a rank's 7 heads are not divided by 2
            cases[f"tp2-cp2-{word}-0.5B"] = Case("0.5B", tp2, world_size=4)
            pieces = f"{tp2} --use-ascend-coc --coc-parallel-num 2"
            cases[f"tp2-cp2-{word}-coc"] = Case("mock", pieces, world_size=4)
    cases |= {
        "cp2-zero1": Case("mock", CP2, OVERLAP),
        "cp2-variable": Case("variable", CP2),
        "cp2-lora": Case("lora", CP2),
        "cp2-ipo": Case("ipo", CP2, "", 5e-6),  # of losses near 25, one rounding of which is 2e-6
        "cp2-lora-dpo": Case("lora-dpo", CP2, ZERO1),
        "cp2-recompute": Case(
            "packed",
            f"{CP2} --recompute-granularity full --recompute-method uniform "
            "--recompute-num-layers 2 --swap-attention",
        ),
        "cp2-selective": Case("documents", f"{CP2} --recompute-granularity selective"),
        "cp2-outputs": Case("mock", f"{CP2} --recompute-activation-function --recompute-norm"),
        "cp2-chunked-swapped": Case(
            "packed", f"{CP2} --cross-entropy-chunk-size 8 --swap-attention"
        ),
        "cp2-unfused": Case("documents", f"{CP2} --attention-backend unfused"),
        # a rounding of bf16 is 2^-8; whichever part of a sum is rounded first is another one
        "cp2-bf16": Case("mock", CP2, f"--bf16 {ZERO1}", 5e-3),
        "cp2-halves": Case("packed", CP2, f"--bf16 {OVERLAP} --reuse-fp32-param", 5e-3),
        "tp2-cp2": Case("mock", f"{TP2} {CP2}", world_size=4),
        "tp2-cp2-sp-variable": Case("variable", f"{TP2} --sequence-parallel {CP2}", world_size=4),
        "tp2-cp2-dpo": Case("dpo", f"{TP2} --sequence-parallel {CP2}", world_size=4),
        "pp2-cp2": Case("mock", f"{PP2} {CP2}", world_size=4),
        "pp2-cp2-packed": Case("packed", f"{PP2} {CP2}", ZERO1, world_size=4),
        "pp2-cp2-dpo": Case("dpo", f"{PP2} {CP2}", world_size=4),
        "vpp2-cp2": Case("mock", f"{VPP2} {CP2}", OVERLAP, world_size=4),
        "vpp2-cp2-lora": Case("lora", f"{VPP2} {CP2}", world_size=4),
        "cp2-dp2": Case("mock", CP2, OVERLAP, world_size=4),
        # bf16 gradients and moments: another order of sums is rounded otherwise
        "cp2-o2": Case("mock", CP2, f"--bf16 {OVERLAP} {O2}", 2e-3),
        "cp2-dp2-o2": Case("packed", CP2, f"--bf16 {OVERLAP} {O2}", 2e-3, world_size=4),
        "cp2-dp2-documents": Case("documents", CP2, OVERLAP, world_size=4),
        "cp2-dp2-dpo": Case("dpo", CP2, ZERO1, world_size=4),
    }
    return cases


def losses_are_those_of_whole_sequences(case: Case, run: Run) -> str:
    """Losses and gradient norms of four steps, whose updates they therefore share."""
    losses, norms = trained(run, case.data, f"{case.flags} {case.layout}")
    expected, expected_norms = whole(run, case.data, case.flags)
    worst = apart(losses, expected)
    norm = max(abs(a / b - 1) for a, b in zip(norms, expected_norms, strict=True))
    assert worst <= case.tolerance, f"losses {losses} instead of {expected}"
    assert norm <= 10 * case.tolerance, f"gradient norms {norms} instead of {expected_norms}"
    assert max(expected) - min(expected) > 1e-3, f"nothing is learnt: {expected}"
    return f"losses {worst:.1e}, norms {norm:.1e}"


for _name, _case in _cases().items():
    CHECKS.case(_name, _case.world_size, losses_are_those_of_whole_sequences, _case)


@CHECKS.add(world_size=2)
def the_validation_loss_is_that_of_whole_sequences(run: Run) -> str:
    flags = "--eval-iters 2"
    found, expected = (start(run, "mock", f"{flags} {layout}").evaluate() for layout in (CP2, ""))
    assert abs(found - expected) <= TOLERANCE, (found, expected)
    return f"{abs(found - expected):.1e}"


@CHECKS.add(world_size=2)
def a_part_without_any_loss_counts_nothing(run: Run) -> str:
    """One rank's positions have no loss at all; every other token weighs the same."""
    results = []
    for layout in (f"{CP2} --context-parallel-algo ulysses_cp_algo", ""):
        training = start(run, "mock", layout)
        training.train_data = pretraining.Masked(training.train_data, lambda index: 24 // 2)
        results.append(pretraining.steps(training, 2))
    for own, other in zip(*results, strict=True):
        assert own.num_tokens == other.num_tokens
        assert abs(own.loss - other.loss) <= TOLERANCE, results
        assert abs(own.grad_norm - other.grad_norm) <= TOLERANCE * 10, results
    return str(results[0][0].num_tokens)


# --- checkpoints ---------------------------------------------------------------------------------

MOVED = [
    # data, format, flags of all, layouts one after the other
    ("mock", "torch_dist", OVERLAP, (CP2, "", "--context-parallel-size 4")),
    ("mock", "torch", ZERO1, (CP2, "", "--context-parallel-size 4")),
    ("mock", "torch_dist", "", (f"{TP2} {CP2}", f"{PP2} {CP2}", TP2)),
    ("packed", "torch_dist", ZERO1, ("--context-parallel-size 4", f"{PP2} {CP2}", CP2)),
    ("lora", "torch_dist", ZERO1, (CP2, "", "--context-parallel-size 4")),
]


def a_run_goes_on_at_other_sizes(
    data: str, form: str, flags: str, layouts: tuple[str, ...], run: Run
) -> str:
    """Two steps at one size, one at the next and one at the last are four undisturbed ones."""
    expected, _ = whole(run, data, flags)
    name = f"moved-{data}-{form}-{len(flags)}"
    losses, load = [], None
    for number, (layout, count) in enumerate(zip(layouts, (2, 1, 1), strict=True)):
        folder = run.folder / f"{name}-{number}"
        words = f"{flags} {layout} --ckpt-format {form} --save {folder} --save-interval 100"
        prepared = prepare(run, data, words, load)
        training = prepared.run
        assert training.progress.iteration == len(losses)
        losses += [result.loss for result in pretraining.steps(training, count)]
        prepared.save()
        load = folder
    worst = apart(losses, expected)
    assert worst <= pretraining.MOVED_TOLERANCE, (losses, expected)
    return f"{worst:.1e}"


for _moved in MOVED:
    _name = f"moved-{_moved[0]}-{_moved[1]}-{_moved[3][0].split()[0][2:4]}"
    CHECKS.case(_name, 4, a_run_goes_on_at_other_sizes, *_moved)


@CHECKS.add(world_size=2)
def a_run_saved_in_the_background_goes_on(run: Run) -> str:
    """--async-save at CP2: what it wrote after two of four steps goes on at CP2 and without."""
    expected, _ = whole(run, "mock", OVERLAP)
    folder = run.folder / "background"
    flags = f"{OVERLAP} --async-save --save {folder} --save-interval 2"
    training = start(run, "mock", f"{flags} {CP2}")
    undisturbed: list[float] = []
    pretraining.train_and_save(training, lambda result, *_: undisturbed.append(result.loss))
    pretraining.track(run, folder, 2)
    found = [undisturbed]
    for layout in (CP2, ""):
        resumed = prepare(run, "mock", f"{OVERLAP} {layout}", folder).run
        assert resumed.progress.iteration == 2
        later = [result.loss for result in pretraining.steps(resumed, 2)]
        found.append([*undisturbed[:2], *later])
    worst = max(apart(own, expected) for own in found)
    assert worst <= pretraining.MOVED_TOLERANCE, (found, expected)
    return f"{worst:.1e}"


@CHECKS.add(world_size=4)
def nothing_is_written_twice(run: Run) -> str:
    """A checkpoint says the same of a run whatever its sequences are cut into, in as many bytes."""
    found = {}
    for name, layout in (("cut", CP2), ("whole", "")):
        folder = run.folder / f"once-{name}"
        training = start(run, "mock", f"{ZERO1} {layout} --save {folder}")
        pretraining.steps(training, 1)
        saved = pretraining.save(training)
        sizes = [path.stat().st_size for path in saved.rglob("*.distcp")]
        found[name] = (sum(sizes), _said(saved))
    (cut, said), (other, said_of_whole) = found.values()
    assert said == said_of_whole, found
    assert abs(cut - other) < 0.01 * other, found
    return str(found)


def _said(folder: Path) -> Any:
    """What a checkpoint's manifest says of how the run was cut."""
    from qwen2_ascend.checkpoint.formats.megatron import MANIFEST_FILE

    return json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["layout"]


# --- shared --------------------------------------------------------------------------------------


def flags_of(run: Run, data: str) -> str:
    """Everything but the layout."""
    if data in PRETRAINING:
        flags = f"{pretraining.FLAGS} {DATA[data]}"
        if data == "documents":
            prefix = pretraining.write_documents(run, "context", has_eod=True)
            flags = flags.replace("--mock-data", f"--data-path {prefix}")
        return flags
    prefix = tuning.pairs(run) if "--stage dpo" in DATA[data] else tuning.chats(run)
    size = "" if "--micro-batch-size" in DATA[data] else "--micro-batch-size 2"
    return f"{tuning.FLAGS} {size} {DATA[data]} --data-path {prefix}"


def prepare(run: Run, data: str, flags: str, load: Path | None = None) -> tuning.TuningRun:
    """A run as its launcher builds it."""
    words = f"{flags_of(run, data)} {flags}"
    if data in PRETRAINING:
        load = load or model_folder(run, data)
        training = pretraining.start(run, words, load=load)
        save = functools.partial(pretraining.save, training)
        return tuning.TuningRun(training, save)
    return tuning.start(run, words, load=load)


def model_folder(run: Run, data: str) -> Path | None:
    """Random weights of a model that is not the tiny one; None where it is."""
    return tiny_folder(run, f"model-{data}", **MODELS[data]) if data in MODELS else None


def start(run: Run, data: str, flags: str) -> TrainingRun:
    return prepare(run, data, flags).run


def trained(run: Run, data: str, flags: str) -> tuple[list[float], list[float]]:
    """(losses, gradient norms)"""
    return tuning.trained(start(run, data, flags))


_WHOLE: dict[tuple[str, str], tuple[list[float], list[float]]] = {}


def whole(run: Run, data: str, flags: str) -> tuple[list[float], list[float]]:
    """`trained` without a cut of sequences; run once in a launch."""
    if (data, flags) not in _WHOLE:
        _WHOLE[data, flags] = trained(run, data, flags)
    return _WHOLE[data, flags]


if __name__ == "__main__":
    main(CHECKS)
