"""`qwen2-ascend migrate`: scripts in MindSpeed-LLM's style become jobs of this project.

The new scripts are run by bash, with a torchrun and a qwen2-ascend that only say what they are
given.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from shlex import split as words_of

import pytest

from pasted.command_lines import CommandLine, command_lines
from pasted.migration_page import THEIRS
from qwen2_ascend.cli import main
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.migration.command import migrate
from qwen2_ascend.migration.memory import memory_line
from qwen2_ascend.migration.programs import find_program, own_flags
from qwen2_ascend.planning.job import Job, RunLayout
from qwen2_ascend.planning.memory import fullest_stage

TUNE = """\
#!/bin/bash
export CUDA_DEVICE_MAX_CONNECTIONS=1
source /opt/ascend/set_env.sh

NPUS=8
NODES=${1:-2}
NODE_RANK=${RANK:-0}
WORLD_SIZE=$(($NPUS*$NODES))

LOAD="path to the model"
SAVE='./out dir'
DATA="0.3 ./a 0.7 ./b"
TOKENIZER=./hf

TP=4
PP=2
SEQ_LEN=4096

DISTRIBUTED="
    --nproc_per_node $NPUS \\
    --nnodes ${NODES} \\
    --node_rank $NODE_RANK
"

MODEL="
    --num-layers 28 \\
    --hidden-size 3584 \\
    # --use-ascend-mc2 \\
    --ffn-hidden-size 18944 \\
    --num-attention-heads 28 \\
    --num-query-groups 4 \\
    --group-query-attention \\
    --untie-embeddings-and-output-weights \\
    --padded-vocab-size 152064 \\
    --swiglu
"

GPT="
    $MODEL \\
    --use-mcore-models \\
    --tensor-model-parallel-size ${TP} \\
    --pipeline-model-parallel-size=${PP} \\
    --seq-length ${SEQ_LEN} \\
    --micro-batch-size 1 \\
    --global-batch-size 16 \\
    --train-iters 10 \\
    --lr 1e-5 \\
    --tokenizer-name-or-path ${TOKENIZER} \\
    --bf16 \\
    --use-mc2
"

torchrun $DISTRIBUTED posttrain_gpt.py \\
    $GPT \\
    --finetune \\
    --stage sft \\
    --is-instruction-dataset \\
    --prompt-type qwen \\
    --data-path $DATA \\
    --load ${LOAD} \\
    --save "${SAVE}" \\
    --distributed-backend nccl \\
    | tee logs/tune_${TP}.log
"""
CONVERT = """\
export CUDA_DEVICE_MAX_CONNECTIONS=1
# the original model, where the merge goes
python convert_ckpt.py \\
    --use-mcore-models --model-type GPT --model-type-hf llama2 \\
    --load-model-type mg --save-model-type hf \\
    --add-qkv-bias --params-dtype bf16 \\
    --load-dir ./mcore --save-dir ./hf  # 保存
"""
PREPROCESS = """\
mkdir -p ./data
python ./preprocess_data.py \\
\t--input "./my data/train.parquet" \\
\t--handler-name AlpacaStyleInstructionHandler \\
\t--output-prefix ./data/alpaca \\
\t--tokenizer-name-or-path ./hf \\
\t--map-keys '{"prompt":"instruction","query":"input"}' \\
\t--prompt-type qwen --overwrite-cache --n-subs 4
"""
ECHO = """#!/bin/bash
printf '%s\\n' "${0##*/}" "$@" >> "$TOLD"
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def run_new(text: str, folder: Path, *arguments: str) -> list[str]:
    """The words that the new script gives to torchrun or qwen2-ascend."""
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("torchrun", "qwen2-ascend"):
        write(folder / "bin" / name, ECHO).chmod(0o755)
    script = write(folder / "new.sh", text.replace("source /opt", ": /opt"))
    told = folder / "told"
    told.unlink(missing_ok=True)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "TOLD": str(told)}
    subprocess.run(["bash", script, *arguments], cwd=folder, env=environment, check=True)
    return told.read_text().splitlines()


def test_training_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = write(tmp_path / "tune.sh", TUNE)
    assert main(["migrate", str(script)]) == 0
    told = capsys.readouterr()
    words = run_new(told.out, tmp_path, "4")
    assert words == [
        *words_of("torchrun --nproc_per_node 8 --nnodes 4 --node_rank 0 launch/finetune_qwen2.py"),
        *words_of("--padded-vocab-size 152064 --tensor-model-parallel-size 4"),
        *words_of("--pipeline-model-parallel-size 2 --seq-length 4096 --micro-batch-size 1"),
        *words_of("--global-batch-size 16 --train-iters 10 --lr 1e-5"),
        *words_of("--tokenizer-name-or-path ./hf --bf16 --finetune --stage sft"),
        *words_of("--prompt-type qwen --data-path 0.3 ./a 0.7 ./b"),
        *("--load", "path to the model", "--save", "./out dir"),
        *words_of("--num-layers 28 --hidden-size 3584 --ffn-hidden-size 18944"),
        *words_of("--num-attention-heads 28 --num-query-groups 4"),
        *words_of("--untie-embeddings-and-output-weights --config ./hf"),
    ]
    assert f"{script}: line 50: --use-mc2: " in told.err
    assert f"{script}: line 28: the comment between quotes is left out" in told.err
    for line in (
        "#   --use-mcore-models: left out: all models are megatron-core's",
        "#   --is-instruction-dataset: left out: the data is chats",
        "#   --distributed-backend nccl: left out: the device says which",
        "export CUDA_DEVICE_MAX_CONNECTIONS=1",
        "NODES=${1:-2}",
        "    | tee logs/tune_${TP}.log",
    ):
        assert line in told.out.splitlines()
    assert "WORLD_SIZE" not in told.out
    (memory,) = (line for line in told.out.splitlines() if line.startswith("# memory: "))
    assert "of 16 devices (stage 0 of TP4 PP2 DP2), which fits a 910B" in memory


def test_memory_is_the_planners() -> None:
    words = """--num-layers 28 --hidden-size 3584 --ffn-hidden-size 18944 --num-attention-heads 28
        --num-query-groups 4 --padded-vocab-size 152064 --tensor-model-parallel-size 4
        --pipeline-model-parallel-size 2 --seq-length 4096 --micro-batch-size 2
        --global-batch-size 32 --recompute-granularity full"""
    flags = dict(zip(words.split()[::2], words.split()[1::2], strict=True))
    switches = ("--bf16", "--sequence-parallel", "--use-distributed-optimizer")
    flags = {**flags, **dict.fromkeys((*switches, "--untie-embeddings-and-output-weights"))}
    job = Job(config=Qwen2Config.named("7B"), seq_length=4096, global_batch_size=32)
    cut = RunLayout(
        job=job,
        tp=4,
        pp=2,
        dp=2,
        sequence_parallel=True,
        distributed_optimizer=True,
        recompute="full",
        micro_batch_size=2,
    )
    _, memory = fullest_stage(cut)
    assert f"memory: {memory.total / 1e9:.1f} GB on the fullest of 16" in memory_line(flags, 16)
    uneven = replace(cut, num_layer_list=(10, 18), reuse_fp32_param=True)
    _, memory = fullest_stage(uneven)
    more = {"--num-layer-list": "10,18", "--reuse-fp32-param": None}
    assert f"memory: {memory.total / 1e9:.1f} GB" in memory_line({**flags, **more}, 16)
    for changed, devices, message in (
        ({"--context-parallel-size": "3"}, 16, "TP 4 x PP 2 x CP 3 does not divide 16"),
        ({"--context-parallel-size": "2"}, 16, "TP4 PP2 CP2 DP1"),
        ({"--recompute-granularity": "some"}, 16, "some is none of the launcher's"),
        ({"--num-layer-list": "10,x"}, 16, "10,x is not a list of whole numbers"),
        ({"--hidden-size": None}, 16, "--hidden-size is not a number"),
        ({}, None, "does not say how many devices"),
        ({}, 12, "TP 4 x PP 2 does not divide 12"),
        ({"--num-layers": "27"}, 16, "does not divide num_layers=27"),
    ):
        assert message in memory_line({**flags, **changed}, devices)


def test_merge_keeps_the_converter_that_was_meant(tmp_path: Path) -> None:
    """--model-type says v1, so the merge goes into mg2hf/ here too."""
    text, notes = migrate(write(tmp_path / "convert.sh", CONVERT))
    assert not notes
    assert run_new(text, tmp_path) == words_of(
        "qwen2-ascend convert --load-model-type mg --save-model-type hf --dtype bf16 "
        "--load-dir ./mcore --save-dir ./hf --model-type GPT"
    )
    assert "#   --params-dtype bf16: --dtype bf16" in text


def test_preprocessing(tmp_path: Path) -> None:
    text, notes = migrate(write(tmp_path / "data.sh", PREPROCESS))
    assert not notes
    assert run_new(text, tmp_path) == [
        *("qwen2-ascend", "preprocess", "--input", "./my data/train.parquet"),
        *words_of("--handler-name AlpacaStyleInstructionHandler --output-prefix ./data/alpaca"),
        *("--tokenizer-name-or-path", "./hf"),
        *("--map-keys", '{"prompt":"instruction","query":"input"}'),
        *words_of("--prompt-type qwen --task sft"),
    ]
    assert "#   --task: added: there the handler's name says it" in text
    assert (tmp_path / "data").is_dir()


@pytest.mark.parametrize(
    ("start", "launcher"),
    [
        ("torchrun --nproc_per_node 2", "torchrun --nproc_per_node 2"),
        ("python -m torch.distributed.launch --nproc_per_node 2", "torchrun --nproc_per_node 2"),
        ("python3 -u", "torchrun --nproc-per-node 1"),
        ("nohup torchrun --nproc_per_node 2", "torchrun --nproc_per_node 2"),
        ("A=1 torchrun --nproc_per_node 2", "torchrun --nproc_per_node 2"),
    ],
)
def test_ways_to_start(start: str, launcher: str, tmp_path: Path) -> None:
    flags = "--seq-length 8 --lr 1e-4 --train-iters 1 --data-path ./x"
    text, _ = migrate(write(tmp_path / "a.sh", f"{start} ./pretrain_gpt.py {flags}\n"))
    words = run_new(text, tmp_path)
    assert words == words_of(f"{launcher} launch/pretrain_qwen2.py {flags}")
    assert text.count("A=1") == start.startswith("A=1")


def test_several_jobs_and_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one.sh", CONVERT + PREPROCESS)
    two = write(tmp_path / "two.sh", PREPROCESS)
    assert main(["migrate", str(one), str(two)]) == 0
    out = capsys.readouterr().out
    assert out.count("qwen2-ascend convert \\") == 1
    assert out.count("qwen2-ascend preprocess \\") == 2


def test_output_is_a_script_that_can_be_run(tmp_path: Path) -> None:
    script, new = write(tmp_path / "old.sh", CONVERT), tmp_path / "new.sh"
    assert main(["migrate", str(script), "--output", str(new)]) == 0
    assert os.access(new, os.X_OK) and new.read_text().startswith("#!/bin/bash\n")
    assert main(["migrate", str(script), "--output", str(new)]) == 2  # it is there already


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo hello\n", "starts no program; known are pretrain_gpt.py"),
        ("torchrun train_it.py --lr 1\n", "starts train_it.py; known are"),
        ("A='x\ntorchrun pretrain_gpt.py\n", "line 1: the quote ' is not closed"),
        ("torchrun pretrain_gpt.py --lr 1 \\\n  --num-experts 8 --moe-router-topk 2\n", "experts"),
        ("python convert_ckpt.py --model-type-hf qwen2-moe\n", "experts"),
        (None, "cannot be read"),
    ],
)
def test_script_that_cannot_be_used(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "a.sh"
    if text is not None:
        write(script, text)
    assert main(["migrate", str(script)]) == 2
    told = capsys.readouterr()
    assert message in told.err and str(script) in told.err and not told.out


def test_flags_that_are_lost_are_said(tmp_path: Path) -> None:
    """Unknown ones, refused ones, and those behind a comment that ended the command."""
    text = """torchrun --nproc_per_node 1 pretrain_gpt.py --lr 1 \\
        --no-such-flag 7 \\
        --use-mc2 \\
        # --bf16 \\
        --fp16
    """
    _, notes = migrate(write(tmp_path / "a.sh", text))
    assert [note.split(": ")[:2] for note in notes] == [
        ["line 3", "--use-mc2"],
        ["line 2", "--no-such-flag"],
        ["line 5", "--fp16 is no part of a command"],
    ]


LINES = [
    line
    for kind in THEIRS
    for line in command_lines(kind)
    if not line.is_moe and line.flags != ["\r"]  # its script has another system's line ends
]


@pytest.mark.parametrize("line", LINES, ids=[line.name for line in LINES])
def test_published_lines_become_flags_of_ours(line: CommandLine, tmp_path: Path) -> None:
    """Each word of the new command is a flag of ours or one that ours takes, with its values."""
    script = f"ARGS='\n{' '.join(line.flags)}\n'\ntorchrun $DIST {THEIRS[line.kind]} $ARGS\n"
    text, _ = migrate(write(tmp_path / "a.sh", script))
    program = find_program(THEIRS[line.kind], line.flags)
    assert program is not None
    words = run_new(text, tmp_path)
    ours = [word for word in words if word.startswith("--")]
    known = own_flags(program.kind)
    assert [flag for flag in ours if flag not in known and flag not in program.table] == []
    rest, pasted = program.split(words[words.index(ours[0]) :])
    assert not [flag for flag, _ in pasted if program.table[flag].refused]
    assert all(flag in known for flag in rest if flag.startswith("--"))
    for flag in line.flags:
        if flag in known and "GeneralPretrainHandler" not in line.values(flag):
            given = words[words.index(flag) + 1 :][: len(line.values(flag))]
            assert given == line.values(flag)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, capsys) -> None:
    script = write(tmp_path / "a.sh", "torchrun pretrain_gpt.py --lr 1\n")
    assert main(["migrate", str(script), "--output", str(tmp_path / "no" / "b.sh")]) == 2
    assert f"there is no folder {tmp_path / 'no'}; make it" in capsys.readouterr().err
