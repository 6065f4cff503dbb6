"""What torch_npu launches for a layer and for a training step.

    PYTHONPATH=tests python -m npusim.launches           # the tables of docs/benchmarks.md
    PYTHONPATH=tests python -m npusim.launches --write   # writes goldens/ anew: read the difference

A launch is one call of an aclnn operator by torch_npu's host code, not a kernel. What CANN starts
inside such a call is not seen, but some of it follows from what it is given: see `hidden_copies`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npusim.env import SOC_910B, SOC_910C, environment
from qwen2_ascend import markdown

if TYPE_CHECKING:
    from npusim.simulator import Launch, Recording, Simulator
    from qwen2_ascend.runtime import Runtime

GOLDENS = Path(__file__).parent / "goldens"
CHIPS = (SOC_910B, SOC_910C)
LAYER_OPERATORS = ("attention", "rms_norm", "rotary", "swiglu")
FUSED_OPERATORS = {
    "aclnnFlashAttentionScore",
    "aclnnFlashAttentionScoreGrad",
    "aclnnRmsNorm",
    "aclnnRmsNormGrad",
    "aclnnRotaryPositionEmbeddingV2",
    "aclnnRotaryPositionEmbeddingGrad",
    "aclnnSwiGlu",
    "aclnnSwiGluGrad",
}
"""What the fused layers launch in a training step, and nothing else does."""
OFF = (
    "--attention-backend unfused --no-fused-rmsnorm --no-fused-rotary-pos-emb --no-fused-swiglu "
    "--no-fused-adamw"
)
LAYERS: dict[str, dict[str, Any]] = {
    "fused": {"backend": "npu"},
    "fused, packed": {"backend": "npu", "packed": True},
    "torch's own": {"backend": "torch"},
    "switched off": {"backend": "npu", "plain": LAYER_OPERATORS},
}
"""Ways to compute a layer. torch's own is plain PyTorch code, in which torch_npu makes one kernel
of scaled_dot_product_attention."""
STEPS = {"fused": "", "fused, `--no-fused-adamw`": "--no-fused-adamw", "switched off": OFF}
"""Flags of training runs."""
STEP_LAYERS = (2, 4)
"""Two sizes, which tell the others: every layer adds as much."""


@contextmanager
def host_code(simulator: Simulator) -> Iterator[None]:
    """Has the host code of aten operators run too, so that their launches are recorded."""
    before, simulator.host_code = simulator.host_code, True
    try:
        yield
    finally:
        simulator.host_code = before
    assert not simulator.host_faults, simulator.host_faults


def layer_launches(
    runtime: Runtime,
    simulator: Simulator,
    *,
    backend: str,
    plain: tuple[str, ...] = (),
    packed: bool = False,
) -> dict[str, list[str]]:
    """The operators of one bf16 layer, forward and backward, in order.

    The second pass through it: masks and tables are there already.
    """
    import torch

    from helpers import tiny_config
    from npusim.simulator import recording
    from qwen2_ascend import runtime as runtimes
    from qwen2_ascend.model.build import build_model
    from qwen2_ascend.model.packed import PackedBatch
    from qwen2_ascend.parallel import ParallelLayout

    config, layout = tiny_config(num_layers=1), ParallelLayout()
    runtimes.destroy_model_parallel()
    runtimes.initialize_model_parallel(layout, config.num_layers)
    runtime.seed_all(1)
    (model,) = build_model(config, layout, dtype="bf16", backend=backend, plain=plain)
    model = model.to(runtime.device)
    length, batch = 16, 2
    table = model.rotary_pos_emb(length)
    documents = None
    if packed:
        positions = torch.cat([torch.arange(n) for n in (5, 11, 16)]).view(batch, length)
        documents = PackedBatch((5, 16, 32), positions.to(runtime.device))
    shape = (length, batch, config.hidden_size)
    hidden, upstream = (torch.randn(shape).bfloat16().to(runtime.device) for _ in range(2))
    record: dict[str, Recording] = {}
    with host_code(simulator):
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            leaf = hidden.clone().requires_grad_()
            with recording() as record["forward"]:
                output, _ = model.decoder.layers[0](
                    leaf, None, rotary_pos_emb=table, packed_seq_params=documents
                )
            with recording() as record["backward"]:
                output.backward(upstream)
    return {part: found.ops for part, found in record.items()}


def step_launches(
    runtime: Runtime, simulator: Simulator, folder: Path, num_layers: int, flags: str
) -> dict[str, int]:
    """Launches of one training step of one micro-batch in bf16, and those of its update alone.

    Args:
        runtime: started on the simulated device.
        simulator: the one that is entered.
        folder: for the model, tied as the 0.5B is, and with its heads; all widths are small.
        num_layers: of the model.
        flags: further ones of the launcher.

    Returns:
        "step" and "update": launches; "update bytes": how much the latter read and write;
        "weights": of the model.
    """
    from distributed.harness import Run
    from distributed.train_worker import start, steps
    from helpers import make_tiny_hugging_face_folder, tiny_config
    from npusim.simulator import recording
    from qwen2_ascend.planning.parameters import num_parameters

    config = tiny_config(
        num_layers=num_layers,
        hidden_size=112,
        num_attention_heads=14,
        num_query_groups=2,
        tie_word_embeddings=True,
    )
    model = folder / f"layers-{num_layers}"
    if not model.exists():
        make_tiny_hugging_face_folder(model, config)
    training = start(
        Run(runtime, folder),
        f"--mock-data --seq-length 16 --train-iters 3 --lr 1e-3 --bf16 --device npu "
        f"--num-workers 0 {flags}",
        load=model,
    )
    steps(training, 1)
    with host_code(simulator):
        with recording() as step:
            steps(training, 1)
        update = _recorded_update(training)
    return {
        "step": len(step.launches),
        "update": len(update.launches),
        "update bytes": sum(map(launch_bytes, update.launches)),
        "weights": num_parameters(config),
    }


def _recorded_update(training: Any) -> Recording:
    """A further step, of which only the optimizer's update is recorded."""
    from distributed.train_worker import steps
    from npusim.simulator import recording

    found: list[Recording] = []
    update = training.optimizer.step_with_ready_grads

    def recorded() -> Any:
        with recording() as record:
            result = update()
        found.append(record)
        return result

    training.optimizer.step_with_ready_grads = recorded
    steps(training, 1)
    return found[0]


_TENSOR = re.compile(r"([a-z]+)(\d+)\[([\d,]*)\]")


def launch_bytes(launch: Launch) -> int:
    """The size of all tensors a launch was given: what it reads or writes, each once."""
    return sum(_tensor_bytes(str(argument)) for argument in launch.arguments)


def _tensor_bytes(text: str) -> int:
    """Bytes of all tensors in a launch's argument."""
    return sum(
        int(bits) // 8 * math.prod(int(n) for n in filter(None, shape.split(",")))
        for _, bits, shape in _TENSOR.findall(text)
    )


def hidden_copies(launch: Launch) -> list[int]:
    """Bytes read and written by the copies that CANN makes inside a fused operator, one each.

    CANN's host code makes every strided input of these operators contiguous before the kernel
    (ops-transformer and ops-nn: `l0op::Contiguous` in op_api, `AutoContiguous` in *_def.cpp), and
    attention in SBH or BSND transposes what lies more than 65,535 numbers apart: q, k, v and the
    result forward; also the results' gradients, and the gradients back, backward.
    """
    if launch.op not in FUSED_OPERATORS:
        return []
    tensors = [x for x in launch.arguments if isinstance(x, str) and _TENSOR.search(x)]
    copied = [x for x in tensors if x.endswith("strided")]
    if launch.op.startswith("aclnnFlashAttention"):
        layout = next(x for x in launch.arguments if x in ("'SBH'", "'BSND'", "'TND'"))
        wide = [x for x in tensors if _sequence_stride(x, layout) > 65_535]
        if wide:  # then q, k, v, what is like them, and the results, all together
            copied += [x for x in tensors if _TENSOR.fullmatch(x) and _is_activation(x, layout)]
    return [2 * _tensor_bytes(x) for x in copied]


def _is_activation(tensor: str, layout: str) -> bool:
    shape = _TENSOR.findall(tensor)[0][2].split(",")
    return not tensor.startswith(("bool", "f32")) and len(shape) == len(layout.strip("'"))


def _sequence_stride(tensor: str, layout: str) -> int:
    """Numbers from one token of a sequence to its next; 0 of what has no such axis."""
    if layout == "'TND'" or not _is_activation(tensor, layout):
        return 0
    shape = [int(n) for n in _TENSOR.findall(tensor)[0][2].split(",")]
    after = shape[1:] if layout == "'SBH'" else shape[2:]
    return math.prod(after)


# --- golden files and the tables ------------------------------------------------------------------


def golden(chip: str) -> dict[str, Any]:
    """What `chip`'s golden file holds: of every way to compute a layer its launches."""
    return json.loads((GOLDENS / f"{chip}.json").read_text(encoding="utf-8"))


def main() -> None:
    """Measures on every chip, each in a process of its own, and prints or writes."""
    parser = argparse.ArgumentParser(prog="npusim.launches", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the golden files")
    parser.add_argument("--inside", metavar="PART", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        _inside(options.inside)
    elif options.write:
        GOLDENS.mkdir(exist_ok=True)
        for chip in CHIPS:
            text = json.dumps(_measured("layers", chip), indent=1)
            (GOLDENS / f"{chip}.json").write_text(text + "\n", encoding="utf-8")
    else:
        for chip in CHIPS:
            print(f"\n{chip}: launches of a layer\n")
            print(layer_table(_measured("layers", chip)))
        print("\nlaunches of a training step\n")
        print(_step_table(_measured("steps", CHIPS[0])))


def _measured(part: str, chip: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "npusim.launches", "--inside", part]
    done = subprocess.run(
        command, env=environment(soc=chip), stdout=subprocess.PIPE, check=True, timeout=1200
    )
    return json.loads(done.stdout.splitlines()[-1])


def _inside(part: str) -> None:
    """Prints one line of JSON, in the simulation."""
    from npusim.simulator import Simulator
    from qwen2_ascend import runtime as runtimes

    with Simulator() as simulator, tempfile.TemporaryDirectory() as folder:
        runtime = runtimes.start("npu")
        found: dict[str, Any] = {}
        if part == "layers":
            for name, options in LAYERS.items():
                found[name] = layer_launches(runtime, simulator, **options)
        else:
            for layers, (name, flags) in product(STEP_LAYERS, STEPS.items()):
                counts = step_launches(runtime, simulator, Path(folder), layers, flags)
                found[f"{name} | {layers}"] = counts
        print(json.dumps(found), flush=True)
    os._exit(0)


def layer_table(found: dict[str, Any]) -> str:
    """Markdown: the number of launches of every way to compute a layer."""
    rows = []
    for name, launches in found.items():
        forward, backward = len(launches["forward"]), len(launches["backward"])
        rows.append((name, str(forward), str(backward), str(forward + backward)))
    return markdown.table(("layer", "forward", "backward", "together"), rows)


def _step_table(found: dict[str, Any]) -> str:
    rows = []
    for name, numbers in found.items():
        per_weight = f"{numbers['update bytes'] / numbers['weights']:.0f}"
        counts = (str(numbers["step"]), str(numbers["update"]))
        rows.append((*name.split(" | "), *counts, per_weight))
    head = ("run", "layers", "launches", "of them in the update", "bytes in the update, per weight")
    return markdown.table(head, rows)


if __name__ == "__main__":
    main()
