"""Memory stays flat however large the model, and planning a large one takes moments."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from checkpoint.toys import hugging_face_shapes
from qwen2_ascend.checkpoint.formats import hugging_face
from qwen2_ascend.checkpoint.formats.stored import TensorSpec
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.planning.parameters import num_parameters

TOOL = Path(__file__).parents[2] / "tools/convert_checkpoint.py"
LIMIT_BYTES = 150e6

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="anonymous memory is read from Linux's /proc"
)


def make_large_folder(folder: Path, config: Qwen2Config, *, with_data: bool) -> Path:
    """A Hugging Face folder in files of 1 GB; without data the files are holes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_hugging_face()))
    specs = {name: TensorSpec(s, "bf16") for name, s in hugging_face_shapes(config).items()}
    files = hugging_face.plan_files(specs, 10**9)
    noise = np.random.default_rng(0).bytes(1 << 20)
    for file in files:
        with open(folder / file.name, "wb") as opened:
            opened.write(file.header)
            left = file.total_bytes - len(file.header)
            while with_data and left:
                left -= opened.write(noise[: min(left, len(noise))])
            opened.truncate(file.total_bytes)
    if index := hugging_face.index_json(files):
        (folder / hugging_face.INDEX_FILE).write_bytes(index)
    return folder


def peak_anonymous_bytes(*argv: object) -> int:
    """Runs the converter and samples its anonymous memory every other millisecond.

    Not VmHWM: that counts mapped files, which are the kernel's to drop.
    """
    command = [sys.executable, str(TOOL), *map(str, argv)]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None:
            assert time.monotonic() < deadline, process.kill()
            status = Path(f"/proc/{process.pid}/status").read_text()
            if found := re.search(r"RssAnon:\s+(\d+) kB", status):
                peak = max(peak, int(found[1]) * 1024)
            time.sleep(0.002)
        assert process.stderr is not None
        assert process.returncode == 0, process.stderr.read()
    return peak


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder that does not stay: pytest keeps those of the last three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_anonymous_memory_stays_flat(scratch):
    """A 460 MB model goes there and back: rows, columns and casts, with verification."""
    config = Qwen2Config(
        num_layers=12,
        hidden_size=1024,
        ffn_hidden_size=4096,
        num_attention_heads=16,
        num_query_groups=4,
        kv_channels=64,
        vocab_size=20_000,
    )
    assert 4e8 < 2 * num_parameters(config) < 5e8
    hf, shards = scratch / "hf", scratch / "mg"
    make_large_folder(hf, config, with_data=True)
    shard = ["--load-dir", hf, "--save-model-type", "mg", "--target-tensor-parallel-size", 4]
    shard += ["--target-pipeline-parallel-size", 2, "--workers", 4]
    peaks = {
        "split": peak_anonymous_bytes(*shard, "--save-dir", shards),
        "cast": peak_anonymous_bytes(*shard, "--save-dir", scratch / "fp32", "--dtype", "fp32"),
    }
    hf_flags = ["--save-dir", scratch / "back", "--save-model-type", "hf", "--verify"]
    peaks["merge"] = peak_anonymous_bytes("--load-dir", shards, *hf_flags, "--workers", 4)
    assert 0 < max(peaks.values()) < LIMIT_BYTES, peaks
    print({what: f"{peak / 1e6:.0f} MB" for what, peak in peaks.items()})


def test_the_plan_of_72b_takes_little_time_and_memory(tmp_path):
    """Its headers with holes for weights, to TP8 PP8: 4,504 tensors in 64 files."""
    hf = make_large_folder(tmp_path / "hf", Qwen2Config.named("72B"), with_data=False)
    flags = ["--load-dir", hf, "--save-dir", tmp_path / "mg", "--save-model-type", "mg"]
    flags += ["--target-tensor-parallel-size", 8, "--target-pipeline-parallel-size", 8]
    before = os.times()
    peak = peak_anonymous_bytes(*flags, "--dry-run")
    after = os.times()
    assert peak < LIMIT_BYTES
    assert after.children_user - before.children_user < 5  # seconds of processor time
