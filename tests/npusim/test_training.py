"""Pretraining on simulated cards: the losses of transformers, through torch_npu and HCCL."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from distributed.train_worker import FLAGS, GLOBAL_BATCH, LAYOUTS, LENGTH, STEPS, reference
from npusim.env import environment
from npusim.launches import FUSED_OPERATORS
from npusim.launches import OFF as PLAIN
from npusim.run import command

TOLERANCE = 1e-6
NPU_FLAGS = FLAGS.replace("--device cpu", "--device npu")
LAUNCH = Path(__file__).parents[2] / "launch" / "pretrain_qwen2.py"
REDUCTIONS = {"AllReduce", "Reduce", "ReduceScatter", "ReduceScatterV"}

FULL_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
OVERLAPPED = LAYOUTS["dp2-distributed-optimizer"][1]
RUNS = {
    "tp1": LAYOUTS["tp1-pp1"],
    "tp2": LAYOUTS["tp2"],
    "pp2": LAYOUTS["pp2"],
    "pp2-vpp2": LAYOUTS["pp2-vpp2"],
    "tp2-sp-full-recompute": (2, f"{LAYOUTS['tp2-sp'][1]} {FULL_RECOMPUTE}"),
    "tp2-sp-selective-recompute": (
        2,
        f"{LAYOUTS['tp2-sp'][1]} --recompute-granularity selective",
    ),
    "dp2-distributed-optimizer": LAYOUTS["dp2-distributed-optimizer"],
    "tp2-pp2": LAYOUTS["tp2-pp2"],
    "tp2-sp-chunked-cross-entropy": (
        2,
        f"{LAYOUTS['tp2-sp'][1]} --cross-entropy-chunk-size 10",
    ),
    "tp2-sp-swapped-and-recomputed-outputs": (
        2,
        f"{LAYOUTS['tp2-sp'][1]} --swap-attention --recompute-activation-function --recompute-norm",
    ),
    "tp2-plain": (2, f"{LAYOUTS['tp2'][1]} {PLAIN}"),
}

simulated_runs = pytest.mark.parametrize(
    "flags",
    [
        pytest.param(flags, id=name, marks=pytest.mark.simulated(cards=cards, alone="training"))
        for name, (cards, flags) in RUNS.items()
    ],
)


# Foreign warnings are errors in the CPU's training tests, and torch_npu adds many of its own.
@pytest.mark.filterwarnings("default")
@simulated_runs
def test_losses_are_those_of_transformers(flags, run, record_property):
    from distributed.train_worker import hugging_face_folder, start, steps
    from npusim.cards import hccl_calls
    from npusim.simulator import recording

    training = start(run, f"{NPU_FLAGS} {flags}")
    before = len(hccl_calls())
    with recording() as record:
        results = steps(training, STEPS)
    calls = hccl_calls()[before:]
    fused = set(record.ops) & FUSED_OPERATORS
    assert fused == (set() if PLAIN in flags else FUSED_OPERATORS)
    losses, norms = reference(hugging_face_folder(run, False), False)
    for found, loss, norm in zip(results, losses, norms, strict=True):
        assert abs(found.loss - loss) <= TOLERANCE
        assert abs(found.grad_norm - norm) <= 4 * TOLERANCE
    assert calls or "parallel" not in flags, "nothing went through HCCL"
    assert not [call for call in calls if call.op in REDUCTIONS and call.dtype == "fp64"]
    record_property("hccl", str(Counter((call.op, call.dtype) for call in calls)))


@pytest.mark.filterwarnings("default")
@pytest.mark.simulated(cards=2, alone="training")
def test_reused_fp32_weights_change_no_loss(run):
    from distributed.train_worker import start, steps
    from qwen2_ascend.training.halves import split_mains

    flags = f"{NPU_FLAGS} --bf16 --use-distributed-optimizer"
    plain = [result.loss for result in steps(start(run, flags), STEPS)]
    training = start(run, f"{flags} --reuse-fp32-param")
    assert [result.loss for result in steps(training, STEPS)] == plain
    mains = split_mains(training.optimizer)
    assert mains is not None and mains.num_bytes > 0


@pytest.mark.filterwarnings("default")
@pytest.mark.simulated(cards=2, alone="training")
def test_o2_reduces_in_bf16_and_stays_near(run):
    """Half the bytes go through HCCL, and losses are as near as on the CPU."""
    from distributed.train_worker import BF16_STATE, start, steps
    from npusim.cards import hccl_calls

    flags = f"{NPU_FLAGS} --bf16 --use-distributed-optimizer"
    losses, sent = {}, {}
    for more in ("", "--o2-gradient --o2-optimizer"):
        training = start(run, f"{flags} {more}")
        before = len(hccl_calls())
        losses[more] = [result.loss for result in steps(training, STEPS)]
        calls = [call for call in hccl_calls()[before:] if call.op.startswith("ReduceScatter")]
        assert {call.dtype for call in calls} == {"bf16" if more else "fp32"}
        sent[more] = sum(call.num_bytes for call in calls)
    plain, o2 = losses.values()
    assert max(abs(a - b) for a, b in zip(o2, plain, strict=True)) <= BF16_STATE
    assert o2 != plain and 2 * sent["--o2-gradient --o2-optimizer"] == sent[""]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "flags",
    [
        "--tensor-model-parallel-size 2 --sequence-parallel --micro-batch-size 2 --pack",
        f"--pipeline-model-parallel-size 2 --micro-batch-size 1 --pack {FULL_RECOMPUTE}",
    ],
    ids=["tp2-sp", "pp2-recompute"],
)
@pytest.mark.simulated(cards=2, alone="training")
def test_packed_documents_have_the_losses_of_each_alone(flags, run, monkeypatch):
    from npusim.simulator import recording

    with recording() as record:
        sft_losses_are_those_of_transformers(flags, run, monkeypatch)
    assert "aclnnFlashAttentionVarLenScore" in record.ops
    assert "aclnnFlashAttentionScore" not in record.ops


def sft_losses_are_those_of_transformers(flags, run, monkeypatch):
    from finetuning import finetune_worker

    on_npu = finetune_worker.FLAGS.replace("--device cpu", "--device npu")
    monkeypatch.setattr(finetune_worker, "FLAGS", on_npu)
    monkeypatch.setattr(finetune_worker, "TOLERANCE", TOLERANCE)
    finetune_worker.sft_losses_are_those_of_transformers(flags, run)


CUT_SEQUENCES = {
    algorithm: f"--context-parallel-size 2 --context-parallel-algo {algorithm}"
    for algorithm in ("megatron_cp_algo", "ulysses_cp_algo", "kvallgather_cp_algo")
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("algorithm", CUT_SEQUENCES)
@pytest.mark.simulated(cards=2, alone="training")
def test_cut_sequences_have_the_losses_of_whole_ones(algorithm, run):
    """Four steps with the distributed optimizer, whose slices go over both cards."""
    from distributed.train_worker import hugging_face_folder, start, steps
    from npusim.simulator import recording

    training = start(run, f"{NPU_FLAGS} {OVERLAPPED} {CUT_SEQUENCES[algorithm]}")
    with recording() as record:
        results = steps(training, STEPS)
    assert [op for op in record.ops if op.startswith("aclnnFlashAttention") and "Grad" in op]
    losses, norms = reference(hugging_face_folder(run, False), False)
    for found, loss, norm in zip(results, losses, norms, strict=True):
        assert abs(found.loss - loss) <= TOLERANCE
        assert abs(found.grad_norm - norm) <= 4 * TOLERANCE


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("algorithm", CUT_SEQUENCES)
@pytest.mark.simulated(cards=2, alone="training")
def test_packed_documents_that_cross_a_cut_have_the_losses_of_each_alone(
    algorithm, run, monkeypatch
):
    flags = f"{CUT_SEQUENCES[algorithm]} --micro-batch-size 2 --pack"
    sft_losses_are_those_of_transformers(flags, run, monkeypatch)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["tp2-sp", "pp2"])
@pytest.mark.simulated(cards=2, alone="training")
def test_documents_of_pretraining_have_the_losses_of_each_alone(name, run):
    """--reset-attention-mask and --reset-position-ids go through the kernel of packed documents."""
    from distributed import train_worker
    from npusim.simulator import recording

    _, flags = train_worker.APART[name]
    with recording() as record:
        train_worker.documents_are_trained_as_alone(name, flags, run, device="npu")
    assert "aclnnFlashAttentionVarLenScore" in record.ops
    assert "aclnnFlashAttentionScore" not in record.ops


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "flags",
    [
        "--tensor-model-parallel-size 2 --sequence-parallel --cross-entropy-chunk-size 10",
        f"--pipeline-model-parallel-size 2 {FULL_RECOMPUTE}",
    ],
    ids=["tp2-sp-chunked-cross-entropy", "pp2-recompute"],
)
@pytest.mark.simulated(cards=2, alone="training")
def test_lora_by_fused_operators_has_the_losses_of_an_independent_loop(flags, run):
    """Adapters on packed chats: their products between the fused operators of the layer."""
    from finetuning import finetune_worker as worker
    from finetuning.deepspeed_worker import LORA, adapted
    from npusim.simulator import recording

    on_npu = worker.FLAGS.replace("--device cpu", "--device npu")
    data = f"--micro-batch-size 2 --pack --data-path {worker.chats(run)}"
    training = worker.start(run, f"{on_npu} {flags} {LORA} {data}").run
    batches = worker.taken(training)
    with recording() as record:
        losses, norms = worker.trained(training)
    expected, expected_norms = worker.reference(
        worker.hugging_face_folder(run), batches, worker.sft_loss, adapted
    )
    assert losses == pytest.approx(expected, abs=TOLERANCE * max(expected))
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert max(losses) - min(losses) > 1e-3, "nothing was learnt"
    fused = {"aclnnFlashAttentionVarLenScore", "aclnnRmsNorm", "aclnnSwiGlu"}
    assert fused <= set(record.ops)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("precision", ["--bf16", "--fp16 --initial-loss-scale 1024"])
@pytest.mark.simulated(cards=2, alone="training")
def test_half_precision_is_as_near_to_fp32_as_plain_operators_are(precision, run):
    """Where those happen to be nearer, the rounding of each token's loss is the limit."""
    import torch

    from distributed.train_worker import hugging_face_folder, start, steps
    from npusim.cards import hccl_calls

    exact, _ = reference(hugging_face_folder(run, False), False)
    errors = {}
    for switches in ("", PLAIN):
        flags = f"{NPU_FLAGS} {LAYOUTS['tp2-sp'][1]} {precision} {switches}"
        losses = [result.loss for result in steps(start(run, flags), STEPS)]
        errors[switches] = max(abs(a - b) for a, b in zip(losses, exact, strict=True))
    unit = torch.finfo(torch.bfloat16 if "bf16" in precision else torch.float16).eps / 2
    noise = unit * max(exact) / (GLOBAL_BATCH * LENGTH) ** 0.5  # of a mean over so many tokens
    assert errors[""] <= max(1.5 * errors[PLAIN], noise), (errors, noise)
    assert errors[PLAIN] < 5e-3
    assert not [call for call in hccl_calls() if call.op in REDUCTIONS and call.dtype == "fp64"]


@pytest.mark.filterwarnings("default")
@pytest.mark.simulated(cards=2, alone="training")
def test_recomputed_attention_drops_what_it_dropped_at_first(run):
    """Sequence parallelism decides who forks the random state."""
    for sequence_parallel in (False, True):
        plain = _dropped_gradients(run, sequence_parallel)
        assert any((plain[key] != value).any() for key, value in _undropped(run).items())
        for recompute in (
            {"recompute_granularity": "selective"},
            {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
        ):
            found = _dropped_gradients(run, sequence_parallel, **recompute)
            assert all((found[key] == value).all() for key, value in plain.items()), recompute


def _undropped(run):
    return _dropped_gradients(run, False, attention_dropout=0.0)


def _dropped_gradients(run, sequence_parallel, attention_dropout=0.3, **options):
    """Every gradient of one pass of a small model at TP2, from the same seed."""
    import torch

    from helpers import tiny_config
    from qwen2_ascend import runtime as runtimes
    from qwen2_ascend.model.build import build_model
    from qwen2_ascend.parallel import ParallelLayout

    config, layout = tiny_config(num_layers=2), ParallelLayout(tensor_model_parallel_size=2)
    runtimes.destroy_model_parallel()
    runtimes.initialize_model_parallel(layout, config.num_layers)
    run.runtime.seed_all(5)
    options |= {"sequence_parallel": sequence_parallel, "attention_dropout": attention_dropout}
    (chunk,) = build_model(config, layout, backend="npu", **options)
    chunk = chunk.to(run.runtime.device).train()
    tokens = torch.arange(48).view(2, 24).to(run.runtime.device)
    chunk(tokens, None, None, labels=tokens).sum().backward()
    return {name: x.grad.cpu() for name, x in chunk.named_parameters()}


@pytest.mark.timeout(600)
def test_the_launcher_trains_saves_and_resumes(tmp_path):
    """`torchrun launch/pretrain_qwen2.py --device npu`, as a user types it.

    Two steps on four cards; the other two from the checkpoint on two cards, and on a CPU with the
    plain operators.
    """
    from helpers import make_tiny_hugging_face_folder

    model = make_tiny_hugging_face_folder(tmp_path / "model")
    expected, _ = reference(model, False)
    saved = tmp_path / "saved"
    log = _launched(
        f"{NPU_FLAGS} {LAYOUTS['tp2-pp2'][1]} --load {model} --save {saved} --exit-interval 2", 4
    )
    assert "device npu (simulated Ascend910B2), backend hccl, 4 process(es)" in log
    assert "fused: attention, rms_norm, rotary, swiglu, adamw\n" in log
    assert _losses(log) == pytest.approx(expected[:2], abs=1e-4)  # as they are printed
    log = _launched(f"{NPU_FLAGS} {LAYOUTS['tp2'][1]} --load {saved}", 2)
    assert _losses(log) == pytest.approx(expected[2:], abs=1e-4)
    done = _run([sys.executable, str(LAUNCH), *FLAGS.split(), "--load", str(saved)], {**os.environ})
    assert "fused: nothing\n" in done
    assert _losses(done) == pytest.approx(expected[2:], abs=1e-4)


def test_a_published_line_trains_with_the_fused_operators_it_asks_for(tmp_path):
    """A line of MindSpeed-LLM's, but for its sizes as it is: --use-flash-attn and its like too."""
    from pasted.test_training import FUSED, by_name, losses, made_paths, small

    line = by_name("2.2.0/qwen25/pretrain_qwen25_7b_8k_pack_ptd")
    paths = made_paths(tmp_path)
    words = small(line, paths, 2, "npu")
    assert {*words} >= FUSED
    log = _launched(" ".join(words), 2)
    assert "fused: attention, rms_norm, rotary, swiglu, adamw\n" in log
    assert "a document sees only itself" in log
    found = losses(paths)
    assert len(found) == 2 and all(4 < loss < 7 for loss in found), found


def _launched(flags: str, cards: int) -> str:
    """What the launcher prints on simulated cards."""
    from npusim.build import Unavailable

    try:
        simulation = environment(num_devices=cards)
    except Unavailable as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"no simulated device: {error}")
    torchrun = f"--standalone --nproc-per-node {cards}"
    return _run(command([str(LAUNCH), *flags.split()], torchrun=torchrun), simulation)


def _run(words: list[str], variables: dict[str, str]) -> str:
    variables["PYTHONPATH"] = os.pathsep.join(
        [str(LAUNCH.parents[1] / "plugin"), variables.get("PYTHONPATH", "")]
    )
    done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _losses(log: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"iteration \d/4 \| loss (\S+)", log)]
