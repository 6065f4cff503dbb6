"""The one fine-tuning run that a board has at a time: from a form to a command, a log and an end.

The command is the one that a person would type; it is a list of words, and no shell reads it. It
runs in a session of its own, so it goes on when the board ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from qwen2_ascend.board.forms import choice, flag, real, text, whole
from qwen2_ascend.board.jail import Jail
from qwen2_ascend.board.listing import DATA
from qwen2_ascend.errors import UserError, raise_if

LOG_FILE = "run.log"
REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPT = "launch/finetune_qwen2.py"
MAX_PROCESSES = 1024
METHODS = ("sft", "lora")
DTYPES = ("bf16", "fp16", "fp32")
DEVICES = ("auto", "npu", "cuda", "cpu")
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be run."""

    words: tuple[str, ...]
    """The command, which begins with torchrun."""
    save: Path
    """Where the run saves, with its log: "run" in the folder that the form names, beside "data"
    and, at its end, "hf"."""

    @property
    def shown(self) -> str:
        """The command as a person would type it."""
        lines, line = [], ""
        for word in map(shlex.quote, self.words):
            if line and word.startswith("--") and len(line) > 60:
                lines.append(line)
                line = f"    {word}"
            else:
                line = f"{line} {word}" if line else word
        return " \\\n".join([*lines, line])

    @property
    def argv(self) -> list[str]:
        """The same for this interpreter, whether or not its torchrun is in PATH."""
        return [sys.executable, "-m", "torch.distributed.run", *self.words[1:]]


def order(form: Mapping[str, Any], jail: Jail) -> Order:
    """The run that a form asks for.

    Raises:
        UserError: every value that cannot be; paths outside of the board's folders; a folder to
            save into that is not empty.
    """
    model, data = jail.existing(text(form, "model")), jail.existing(text(form, "data"))
    save = jail.path(text(form, "save"))
    raise_if(_path_faults(model, data, save, jail))
    words = ["torchrun", "--standalone"]
    words += ["--nproc-per-node", str(whole(form, "processes", 1, MAX_PROCESSES)), SCRIPT]
    words += ["--load", str(model), "--data-path", str(data)]
    words += ["--data-cache-path", str(save / "data"), "--save", str(save / "run")]
    words += _method(form, save) + _layout(form) + _length(form)
    return Order(words=tuple(words), save=save / "run")


def _path_faults(model: Path, data: Path, save: Path, jail: Jail) -> list[str]:
    faults = []
    if not model.is_dir():
        faults.append(f"model {jail.name(model)}: is no folder of a model.")
    if not data.is_file() or not data.name.endswith(DATA):
        faults.append(f"data {jail.name(data)}: is no .jsonl, .json or .parquet file.")
    if save in jail.roots.values():
        faults.append("save: name a new folder below the board's, not the board's own.")
    elif save.exists() and (not save.is_dir() or any(save.iterdir())):
        faults.append(f"save {jail.name(save)}: is there already; name a new folder.")
    # a line of the log or a word of the command with control characters would lie
    faults += [
        f"{name}: its path has characters that cannot be shown; rename it."
        for name, path in (("model", model), ("data", data), ("save", save))
        if not str(path).isprintable()
    ]
    return faults


def _method(form: Mapping[str, Any], save: Path) -> list[str]:
    words = []
    if choice(form, "method", METHODS) == "lora":
        words += ["--lora-r", str(whole(form, "lora_r", 1, 4096))]
        words += ["--lora-alpha", _digits(real(form, "lora_alpha", 0, 1e6))]
    dtype = choice(form, "dtype", DTYPES)
    words += [f"--{dtype}"] if dtype != "fp32" else []
    words += ["--device", choice(form, "device", DEVICES)]
    words += ["--pack"] if flag(form, "pack") else []
    words += ["--save-hf", str(save / "hf")] if flag(form, "save_hf") else []
    return words


def _layout(form: Mapping[str, Any]) -> list[str]:
    tp, pp = whole(form, "tp", 1, 64), whole(form, "pp", 1, 128)
    words = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    words += ["--sequence-parallel"] if flag(form, "sequence_parallel") and tp > 1 else []
    words += ["--use-distributed-optimizer"] if flag(form, "distributed_optimizer") else []
    recompute = choice(form, "recompute", RECOMPUTE)
    if recompute == "full":
        words += ["--recompute-granularity", "full", "--recompute-method", "uniform"]
        words += ["--recompute-num-layers", "1"]
    elif recompute == "selective":
        words += ["--recompute-granularity", "selective"]
    words += ["--micro-batch-size", str(whole(form, "micro_batch_size", 1, 1 << 16))]
    words += ["--global-batch-size", str(whole(form, "global_batch_size", 1, 1 << 24))]
    return words


def _length(form: Mapping[str, Any]) -> list[str]:
    words = ["--seq-length", str(whole(form, "seq_length", 2, 1 << 24))]
    words += ["--num-train-epochs", _digits(real(form, "epochs", 0, 10_000))]
    words += ["--lr", _digits(real(form, "lr", 0, 100)), "--lr-decay-style", "cosine"]
    if interval := whole(form, "save_interval", 0, 1 << 30):
        words += ["--save-interval", str(interval)]
    return words


def _digits(value: float) -> str:
    """All digits of a number, as short as Python writes them."""
    return repr(value).removesuffix(".0")


class Jobs:
    """Starts, watches and stops the board's run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._order: Order | None = None
        self._started = 0.0
        self._stop_asked = False
        self._can_save = False
        """Whether all ranks were told to stop when they could save before they end."""

    def start(self, wanted: Order) -> None:
        """Starts a run.

        Raises:
            UserError: one is running, the folder is in use, or the launcher is not there.
        """
        if not (REPOSITORY / SCRIPT).is_file():
            raise UserError(
                f"{SCRIPT} is not beside this installation; start the board from a checkout of "
                "qwen2-ascend's repository (pip install -e .)."
            )
        with self._lock:
            if self._is_running():
                raise UserError("a run of this board is under way; stop it, or wait for its end.")
            try:
                wanted.save.mkdir(parents=True, exist_ok=True)
                log = (wanted.save / LOG_FILE).open("xb")
            except OSError as error:
                raise UserError(f"{wanted.save}: cannot be used: {error.strerror}.") from None
            with log:
                log.write(f"$ {wanted.shown}\n".encode())
                log.flush()
                self._process = subprocess.Popen(
                    wanted.argv,
                    cwd=REPOSITORY,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._order, self._started = wanted, time.time()
            self._stop_asked = self._can_save = False

    def stop(self) -> None:
        """Asks the ranks to save and end; torchrun itself only where it has no ranks yet.

        Raises:
            UserError: nothing is running.
        """
        with self._lock:
            if not self._is_running():
                raise UserError("no run of this board is under way.")
            assert self._process is not None
            self._stop_asked = True
            try:
                ranks = psutil.Process(self._process.pid).children()
            except psutil.NoSuchProcess:
                return
            self._can_save |= bool(ranks) and all(_catches_stop(rank.pid) for rank in ranks)
            for pid in [rank.pid for rank in ranks] or [self._process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)

    def state(self) -> dict[str, Any]:
        """What the page shows; a run that was stopped before it could save is stopped_early."""
        with self._lock:
            if self._process is None or self._order is None:
                return {"state": "none"}
            status = self._process.poll()
            return {
                "state": self._word(status),
                "status": status,
                "pid": self._process.pid,
                "started": self._started,
                "command": self._order.shown,
                "folder": self._order.save,
            }

    def _word(self, status: int | None) -> str:
        if status is None:
            return "stopping" if self._stop_asked else "running"
        if self._stop_asked and (status == 0 or not self._can_save):
            return "stopped" if status == 0 else "stopped_early"
        return "failed" if status else "done"

    def _is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None


def _catches_stop(pid: int) -> bool:
    """Whether a process handles SIGTERM: a rank does once it has imported what it needs."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return caught is not None and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1 == 1
