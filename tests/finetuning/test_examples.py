"""The commands of the examples and of the documents are ones that the launchers take.

The scripts run with a torchrun and a python that only write down what they were called with; the
launchers' own `parse` and `validate` judge that, at the world size and the model of the script.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from distributed.jobs import read_metrics
from inference.worlds import model_with_tokenizer
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.planning.parameters import num_parameters

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"
LAYOUT = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
SCRIPTS = {
    "sft_0.5b": ("MODEL OUT", "0.5B"),
    "lora_7b": ("MODEL CHATS OUT", "7B"),
    "full_7b": ("MODEL CHATS OUT", "7B"),
    "full_72b": ("MODEL CHATS OUT", "72B"),
    "cluster": ("MODEL CHATS OUT", "7B"),
}
DOCUMENTS = [
    path.relative_to(REPOSITORY)
    for path in (
        *REPOSITORY.glob("README*.md"),
        *(REPOSITORY / "docs").glob("*.md"),
        *EXAMPLES.rglob("README.md"),
    )
]
RECORDER = """#!/bin/sh
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n\\0'; } >> "$RECORD"
"""
READERS_OWN = re.compile(r"no such (file|folder)|holds no (config|description)\.json")
"""Faults of documented commands that are none where the reader's files are."""
TORCHRUN = f"""#!/bin/sh
exec {sys.executable} -m torch.distributed.run --standalone "$@"
"""


class Command(NamedTuple):
    """One call of a launcher."""

    program: Path
    arguments: list[str]
    world_size: int


def run(
    folder: Path, script: Path, arguments: str, torchrun: str = RECORDER, **environment: str
) -> None:
    """Runs a script in `folder`, where its calls are recorded; it fails as the script does."""
    programs = {"torchrun": torchrun, "python": RECORDER}
    subprocess.run(
        [script, *arguments.split()],
        env=with_programs(folder, programs, **environment),
        cwd=folder,
        timeout=500,
        check=True,
    )


def with_programs(folder: Path, programs: dict[str, str], **environment: str) -> dict[str, str]:
    """An environment in which `programs` are found first; they write to `folder`/record."""
    for name, program in programs.items():
        (folder / "bin" / name).parent.mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(program)
        (folder / "bin" / name).chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "RECORD": str(folder / "record"), **environment}


def recorded(folder: Path, script: Path, arguments: str, **environment: str) -> list[Command]:
    """What the script calls."""
    run(folder, script, arguments, **environment)
    record = folder / "record"
    calls = record.read_text(encoding="utf-8").split("\n\0")[:-1]
    return [command(call.split("\0")[:-1], folder) for call in calls]


def command(words: list[str], folder: Path) -> Command:
    """A call of torchrun or python as a launcher, its flags and the number of processes."""
    if words[0] == "python":
        return Command(folder / words[1], words[2:], 1)
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words[1:])
    num_nodes = int(given.nnodes.partition(":")[0])
    if num_nodes > 1:
        check_meeting(given)
    program, arguments = folder / given.training_script, given.training_script_args
    return Command(program, arguments, num_nodes * int(given.nproc_per_node))


def check_meeting(given: Any) -> None:
    """Several nodes meet in one way in all pages: by --node-rank, --master-addr and --master-port.

    torchrun ignores --node-rank, with a warning, where --rdzv-backend is c10d.
    """
    assert given.rdzv_backend == "static" and not given.rdzv_endpoint, given
    assert given.master_addr == "node-0" and given.node_rank >= 0, given


def check(call: Command, config: Qwen2Config) -> None:
    """Raises what the launcher would say of this command line.

    Raises:
        SystemExit: a flag that it does not have, or a value of the wrong kind.
        UserError: values that do not go together, or not with the model or the world size.
    """
    assert call.program.resolve().parent == REPOSITORY / "launch", call.program
    text = call.program.read_text(encoding="utf-8")
    found = re.search(r"from ([\w.]+)\.\w+ import main", text)
    assert found, call.program
    launcher = importlib.import_module(f"{found[1]}.settings")
    launcher.validate(launcher.parse(call.arguments), config, call.world_size)


# --- examples ------------------------------------------------------------------------------------


def test_every_example_is_checked() -> None:
    assert {script.parent.name for script in EXAMPLES.glob("*/run.sh")} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_is_accepted(name: str, tmp_path: Path) -> None:
    arguments, size = SCRIPTS[name]
    calls = recorded(
        tmp_path, EXAMPLES / name / "run.sh", arguments, NODE_RANK="3", MASTER_ADDR="node-0"
    )
    assert calls
    for call in calls:
        check(call, Qwen2Config.named(size))
    assert calls[0].world_size == {"sft_0.5b": 1, "full_72b": 128, "cluster": 16}.get(name, 8)


SCHEDULER = {
    "srun": """#!/bin/sh
shift
for node in 0 1; do SLURM_NODEID=$node "$@"; done
""",
    "scontrol": "#!/bin/sh\nprintf 'node-0\\nnode-1\\n'\n",
    "torchrun": RECORDER,
}
"""Programs of a cluster, as far as the launch files of examples/cluster need them."""


def recorded_on_nodes(folder: Path, words: list[str], **environment: str) -> list[Command]:
    """What a launch file calls, run in the folder of the repository."""
    environment = with_programs(folder, SCHEDULER, **environment)
    subprocess.run(words, env=environment, cwd=REPOSITORY, timeout=60, check=True)
    calls = (folder / "record").read_text(encoding="utf-8").split("\n\0")[:-1]
    return [command(call.split("\0")[:-1], REPOSITORY) for call in calls]


def test_slurm_starts_the_example_on_each_node(tmp_path: Path) -> None:
    words = ["bash", "examples/cluster/finetune.slurm", "MODEL", "CHATS", "OUT"]
    calls = recorded_on_nodes(tmp_path, words, SLURM_JOB_NODELIST="node-[0-1]", SLURM_JOB_ID="1")
    assert [call.world_size for call in calls] == [16, 16]
    for call in calls:
        check(call, Qwen2Config.named("7B"))
    record = (tmp_path / "record").read_text(encoding="utf-8").replace("\0", " ")
    assert re.findall(r"--node-rank (\d)", record) == ["0", "1"]


RANKS = """#!/bin/bash
for rank in 0 1; do
    bash -c 'trap "echo rank $0 >> $RECORD; exit" TERM
        echo up >> $RECORD; while true; do sleep 0.1; done' $rank &
done
trap 'echo torchrun >> $RECORD' TERM
wait
"""
"""A torchrun whose ranks wait for SIGTERM; it and they write down that they got it."""


@pytest.mark.skipif(shutil.which("pkill") is None, reason="the launch file needs pkill")
def test_slurm_signals_the_ranks_alone_and_queues_up_again(tmp_path: Path) -> None:
    """A rank that gets SIGTERM from torchrun too ends without a save."""
    srun = '#!/bin/bash\nshift\nSLURM_NODEID=0 exec "$@"\n'
    scontrol = '#!/bin/sh\n[ "$1" = show ] && echo node-0 || echo $* >> $RECORD\n'
    programs = {"srun": srun, "scontrol": scontrol, "torchrun": RANKS}
    environment = with_programs(tmp_path, programs, SLURM_JOB_NODELIST="node-0", SLURM_JOB_ID="42")
    words = ["bash", "examples/cluster/finetune.slurm", "MODEL", "CHATS", "OUT"]
    record = tmp_path / "record"
    with subprocess.Popen(words, env=environment, cwd=REPOSITORY) as batch:
        deadline = time.monotonic() + 60
        while not record.exists() or record.read_text().count("up") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        batch.terminate()
        batch.wait(60)
    said = record.read_text().split("\n")[2:-1]
    assert sorted(said[:2]) == ["rank 0", "rank 1"] and said[2:] == ["requeue 42"]


def test_volcano_starts_the_example_in_each_pod(tmp_path: Path) -> None:
    import yaml

    file = EXAMPLES / "cluster" / "finetune.volcano.yaml"
    job = yaml.safe_load(file.read_text(encoding="utf-8"))["spec"]
    (task,) = job["tasks"]
    (container,) = task["template"]["spec"]["containers"]
    assert job["minAvailable"] == task["replicas"] == 2
    hosts = {f"VC_{task['name'].upper()}_HOSTS": "node-0,node-1"}
    words = [*container["command"], *container["args"]]
    (call,) = recorded_on_nodes(tmp_path, words, VC_TASK_INDEX="1", **hosts)
    assert call.world_size == 16
    check(call, Qwen2Config.named("7B"))
    limits = container["resources"]["limits"]
    assert limits == container["resources"]["requests"] == {"huawei.com/Ascend910": 8}


def test_the_laptop_example_takes_another_layout(tmp_path: Path) -> None:
    script = EXAMPLES / "sft_0.5b" / "run.sh"
    tuning, *asking = recorded(tmp_path, script, f"MODEL OUT {LAYOUT}", PROCESSES="4")
    assert tuning.world_size == 4
    assert " ".join(tuning.arguments).endswith(LAYOUT)
    check(tuning, Qwen2Config.named("0.5B"))
    models = [call.arguments[call.arguments.index("--load") + 1] for call in asking]
    assert models == ["MODEL", "OUT/tuned"]


@pytest.mark.parametrize(
    ("name", "right", "wrong", "error"),
    [
        ("full_7b", "--sequence-parallel", "--sequence-parallelism", SystemExit),
        ("full_7b", "parallel-size 4", "parallel-size 3", UserError),
        ("full_72b", "--nnodes 16", "--nnodes 15", UserError),
        ("full_72b", "virtual-pipeline-stage 5", "virtual-pipeline-stage 6", UserError),
        ("lora_7b", "--lora-r 16", "", UserError),
    ],
)
def test_a_wrong_flag_in_an_example_is_found(
    name: str, right: str, wrong: str, error: type[BaseException], tmp_path: Path
) -> None:
    text = (EXAMPLES / name / "run.sh").read_text(encoding="utf-8")
    assert right in text
    there = '$(dirname "${BASH_SOURCE[0]}")/../..'
    script = tmp_path / "run.sh"
    script.write_text(text.replace(right, wrong).replace(there, str(REPOSITORY)), encoding="utf-8")
    script.chmod(0o755)
    arguments, size = SCRIPTS[name]
    (call,) = recorded(tmp_path, script, arguments, NODE_RANK="3", MASTER_ADDR="node-0")
    with pytest.raises(error):
        check(call, Qwen2Config.named(size))


@pytest.mark.distributed
def test_the_laptop_example_gives_the_same_model_at_both_layouts(tmp_path: Path) -> None:
    """The script itself, on a tiny model: losses of every step, and the Hugging Face folder."""
    from safetensors.torch import load_file

    model_with_tokenizer(tmp_path / "hf")
    losses, models = [], [load_file(tmp_path / "hf" / "model.safetensors")]
    for processes, flags in (("1", ""), ("4", LAYOUT)):
        script = EXAMPLES / "sft_0.5b" / "run.sh"
        environment = {"PROCESSES": processes, "OMP_NUM_THREADS": "1"}
        run(tmp_path, script, f"hf {processes} {flags} --lr 1e-3", TORCHRUN, **environment)
        losses.append([row["loss"] for row in read_metrics(tmp_path / processes / "run")])
        models.append(load_file(tmp_path / processes / "tuned" / "model.safetensors"))
    start, alone, cut = models
    assert start.keys() == alone.keys() == cut.keys()
    moved = sum((alone[name] - start[name]).square().sum().item() for name in start)
    apart = sum((alone[name] - cut[name]).square().sum().item() for name in start)
    print(losses, f"weights differ by {(apart / moved) ** 0.5:.1e} of the update")
    assert losses[0][-1] < losses[0][0] - 0.3
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert (apart / moved) ** 0.5 < 1e-3


def test_the_table_of_memory_is_computed(tmp_path: Path) -> None:
    """Parameters of the fullest rank, and their bytes, as examples/README.md has them."""
    whole = Qwen2Config.named("7B")
    assert parameters_of_a_rank(whole, 1, 1) == num_parameters(whole)
    rows = (EXAMPLES / "README.md").read_text(encoding="utf-8").splitlines()
    for name in ("full_7b", "full_72b"):
        (row,) = [row for row in rows if row.startswith(f"| {name}:")]
        script = EXAMPLES / name / "run.sh"
        (call,) = recorded(tmp_path, script, "MODEL CHATS OUT", NODE_RANK="0", MASTER_ADDR="node-0")
        (tmp_path / "record").unlink()
        flags = call.arguments
        tp, pp = (
            int(flags[flags.index(flag) + 1]) if flag in flags else 1
            for flag in LAYOUT.split()[::2]
        )
        dp = call.world_size // (tp * pp)
        parameters = parameters_of_a_rank(Qwen2Config.named(SCRIPTS[name][1]), tp, pp)
        held, optimizer = 6 * parameters / 1e9, 12 * parameters / dp / 1e9
        assert f"| {parameters / 1e9:.2f}e9 | {dp} |" in row
        assert f"{held:.1f} GB + {optimizer:.1f} GB = {held + optimizer:.1f} GB |" in row


def parameters_of_a_rank(config: Qwen2Config, tp: int, pp: int) -> int:
    """Weights of the first stage, which holds the embedding; an only stage has all else too."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    qkv = (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels
    layer = qkv * (hidden + 1) + config.num_attention_heads * config.kv_channels * hidden
    layer += 3 * hidden * ffn
    norms = 2 * hidden
    rest = config.vocab_size * hidden * (2 if pp == 1 else 1) // tp
    return config.num_layers // pp * (layer // tp + norms) + rest + (hidden if pp == 1 else 0)


# --- documents -----------------------------------------------------------------------------------


def documented(document: Path) -> list[Command]:
    """Calls of launchers in the document's blocks of commands, those with "..." left out."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    calls = [
        shlex.split(
            line.replace("$NODE_RANK", "1").replace("$MASTER_ADDR", "node-0"), comments=True
        )
        for line in lines
        if re.match(r"(torchrun|python) .*launch/\w+\.py", line) and "..." not in line
    ]
    return [command(words, REPOSITORY) for words in calls]


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_documented_commands_are_accepted(
    document: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for call in documented(document):
        sizes = re.findall(r"\b(\d+(?:\.\d)?B)\b", " ".join(call.arguments))
        try:
            check(call, Qwen2Config.named(sizes[0] if sizes else "7B"))
        except UserError as error:
            assert all(READERS_OWN.search(fault) for fault in error.faults), error.faults


def test_documented_commands_are_found() -> None:
    assert len(documented(Path("README.md"))) >= 5
    assert len(documented(Path("README.zh-CN.md"))) == len(documented(Path("README.md")))
