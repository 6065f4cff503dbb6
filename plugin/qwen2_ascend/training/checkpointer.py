"""The times a run's checkpoints are written and published, the same for every kind of them.

A save has three parts. Together all ranks lay out what each of them writes; then each writes its
own part, in a thread; and when all have, which they ask each other in short rounds, rank 0
publishes. So a long save waits under no collective's time-out, and a rank that stops answering is
found as fast as ever. With --async-save training goes on meanwhile: the thread first copies all to
the host, beside the next forward and backward, and only the update waits for the copy.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch

from qwen2_ascend.checkpoint import iteration as iterations
from qwen2_ascend.checkpoint.formats import megatron
from qwen2_ascend.checkpoint.manifest import encode_training_manifest
from qwen2_ascend.checkpoint.staging import FolderLock, partial_folder
from qwen2_ascend.errors import UserError
from qwen2_ascend.files import write_file
from qwen2_ascend.runtime import Runtime
from qwen2_ascend.training.saving import Checked, HostCopies, RankPart, Written

_FIRST_WAIT, _LONGEST_WAIT = 0.002, 0.25
"""Seconds between two rounds of asking whether all have written their parts."""
_WRITING, _WRITTEN, _FAILED = range(3)


class SaveError(RuntimeError):
    """A checkpoint could not be written; the folder holds the ones before."""


class Run(Protocol):
    """What is saved: a TrainingRun, or DeepSpeed's."""

    settings: Any
    runtime: Runtime
    progress: Any
    beside: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A checkpoint whose parts are laid out and not yet written."""

    part: RankPart
    """This rank's."""
    finish: Callable[[Path], None] = lambda folder: None
    """Called on rank 0 with the folder when every rank has written its part: writes what belongs
    to no rank."""


class Checkpointer:
    """Writes the checkpoints of one run. Every rank calls every method, in the same order."""

    def __init__(
        self,
        run: Run,
        *,
        lay_out: Callable[[Path], Pending],
        about: Mapping[str, Any],
        side_files: Mapping[Path, bytes],
        log: Callable[[str], None],
        is_small: bool = False,
    ) -> None:
        """Nothing is written yet.

        Args:
            run: what is saved, by its settings' `checkpoint`, whose `save` is set.
            lay_out: lays out the state of the run, which is to be written into a folder that is
                there and empty; every rank calls it together.
            about: what the manifest says of the run, in plain values.
            side_files: what lies beside the iterations.
            log: prints a line, on rank 0.
            is_small: whether checksums are of whole files, not of each tensor.
        """
        settings, runtime = run.settings.checkpoint, run.runtime
        assert settings.save is not None
        self._run, self._lay_out = run, lay_out
        self._runtime, self._settings, self._save = runtime, settings, settings.save
        self._about, self._side_files, self._log = about, side_files, log
        self._is_small, self._must_succeed = is_small, True
        self._copies = HostCopies()
        self._flight: _Flight | None = None
        self._lock = FolderLock(settings.save)
        self._group = host_group(runtime)

    def claim(self) -> None:
        """Takes the folder, so that no other run saves into it, and puts right what a kill left.

        What the run keeps beside its checkpoints is written now.

        Raises:
            UserError: another run has it, or it cannot be written.
        """

        def take() -> None:
            try:
                self._save.parent.mkdir(parents=True, exist_ok=True)
                self._lock.acquire()
                iterations.recover(self._save)
                self._remove_older(self._run.progress.iteration)
                for name, data in self._run.beside.items():
                    self._save.mkdir(exist_ok=True)
                    write_file(self._save / name, data)
            except OSError as error:
                raise UserError(
                    f"--save {self._save}: cannot be written: {error.strerror}."
                ) from None

        self._on_first(take, UserError)

    def move_to(self, save: Path) -> None:
        """Takes another folder for what is saved from now on.

        Raises:
            UserError: as `claim`.
        """
        self.finish()
        self._lock.release()
        self._save, self._lock = save, FolderLock(save)
        self.claim()

    def save(self, *, is_last: bool = False) -> None:
        """Writes the run's state; with --async-save it only begins to.

        What is saved must not change before `wait_until_copied` has returned.

        Args:
            is_last: of the run: without it the run has failed, whatever `on_save_failure` says.

        Raises:
            SaveError: it cannot be written, and `on_save_failure` is "stop".
        """
        self.finish()
        self._must_succeed = is_last or self._settings.on_save_failure == "stop"
        begun = time.perf_counter()
        number = self._run.progress.iteration
        folder = partial_folder(iterations.iteration_path(self._save, number))
        try:
            self._on_first(lambda: iterations.begin_iteration(self._save, number), SaveError)
        except SaveError as error:
            return self._give_up(number, str(error))
        copies = self._copies if self._settings.async_save else None
        self._flight = _Flight(number, folder, self._lay_out(folder), copies)
        self._flight.stalled = time.perf_counter() - begun
        if not self._settings.async_save:
            self.finish()

    def wait_until_copied(self) -> None:
        """Waits until what is saved may change; to be called before each update."""
        if self._flight is not None and not self._flight.copied.is_set():
            begun = time.perf_counter()
            self._flight.copied.wait()
            self._flight.stalled += time.perf_counter() - begun

    def poll(self) -> None:
        """Publishes what is written by now; to be called once a step.

        Raises:
            SaveError: as `save`.
        """
        if self._flight is not None and (state := self._round()) != _WRITING:
            self._land(self._flight, state)

    def finish(self) -> None:
        """Waits until nothing is left to be written.

        Raises:
            SaveError: as `save`.
        """
        wait = _FIRST_WAIT
        while self._flight is not None:
            begun = time.perf_counter()
            self.poll()
            if self._flight is not None:
                self._flight.writer.join(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
                self._flight.stalled += time.perf_counter() - begun

    def close(self) -> None:
        """Gives the folder back. What is still being written is abandoned."""
        self._flight = None
        self._lock.release()

    def _round(self) -> int:
        """How far all ranks are: one failed, one is writing, or all have written."""
        assert self._flight is not None
        own = self._flight.state()
        states = torch.tensor([own == _FAILED, own == _WRITING], dtype=torch.int32)
        torch.distributed.all_reduce(states, group=self._group)
        failed, writing = states.tolist()
        # all parts end before the folder is taken away
        return _WRITING if writing else _FAILED if failed else _WRITTEN

    def _land(self, flight: _Flight, state: int) -> None:
        """Publishes a checkpoint that all ranks have written, or gives it up."""
        self._flight = None
        begun = time.perf_counter()
        if flight.error is not None:
            rank = self._runtime.rank
            said = f"error: rank {rank}: {flight.error}\n"
            print(said, end="", file=sys.stderr, flush=True)
        if state == _FAILED:
            return self._give_up(flight.number, "a rank could not write its part")
        parts = gathered(flight.written, self._runtime, self._group)
        try:
            self._on_first(lambda: self._publish(flight, parts), SaveError)
        except SaveError as error:
            return self._give_up(flight.number, str(error))
        flight.stalled += time.perf_counter() - begun
        took = time.perf_counter() - flight.begun
        target = iterations.iteration_path(self._save, flight.number)
        stall = f", of which training waited {flight.stalled:.3f} s"
        self._log(f"saved {target} in {took:.2f} s{stall if self._settings.async_save else ''}")

    def _publish(self, flight: _Flight, parts: list[Written]) -> None:
        flight.pending.finish(flight.folder)
        tensors: Checked = {}
        files: dict[str, str] = {}
        for part in parts:
            files |= part.files
            for name, of in part.tensors.items() if not self._is_small else ():
                tensors.setdefault(name, {}).update(of)  # ranks may have shared a file
        data = encode_training_manifest(
            flight.folder,
            about={**self._about, "iteration": flight.number},
            tensors=tensors,
            checksums=files,
            beside=self._side_files,
        )
        write_file(flight.folder / megatron.MANIFEST_FILE, data)
        iterations.publish_iteration(self._save, flight.number, self._side_files)
        self._remove_older(flight.number)

    def _remove_older(self, last: int) -> None:
        if self._settings.keep_last is not None:
            iterations.remove_older(self._save, self._settings.keep_last, last)

    def _give_up(self, number: int, why: str) -> None:
        """Takes an unfinished iteration away, and ends the run if that is wanted."""
        if self._runtime.rank == 0:
            path = iterations.iteration_path(self._save, number)
            shutil.rmtree(partial_folder(path), ignore_errors=True)
        message = f"the checkpoint of iteration {number} was not written: {why}"
        if self._must_succeed:
            raise SaveError(message)
        self._log(f"{message}; training goes on (--on-save-failure continue)")

    def _on_first(self, work: Callable[[], Any], kind: type[Exception]) -> None:
        """Does `work` on rank 0; what goes wrong there is raised on every rank, as `kind`."""
        told: list[str | None] = [None]
        if self._runtime.rank == 0:
            try:
                work()
            except (OSError, UserError) as error:
                told = [str(error)]
        torch.distributed.broadcast_object_list(told, src=0, group=self._group)
        if told[0] is not None:
            raise kind(told[0])


def host_group(runtime: Runtime) -> Any:
    """The group through which all ranks' hosts talk; None is torch's default one.

    Every rank calls it. The device's own backend would wait for the device, and HCCL gathers no
    objects.
    """
    if runtime.backend == "gloo":
        return None
    timeout = timedelta(seconds=runtime.timeout_seconds)
    return torch.distributed.new_group(backend="gloo", timeout=timeout)


def gathered(value: Any, runtime: Runtime, group: Any) -> list[Any]:
    """Every rank's `value`, on rank 0; elsewhere an empty list."""
    values = [None] * runtime.world_size if runtime.rank == 0 else None
    torch.distributed.gather_object(value, values, dst=0, group=group)
    return values or []


class _Flight:
    """A checkpoint that this rank is writing, or has written and not published."""

    def __init__(
        self, number: int, folder: Path, pending: Pending, copies: HostCopies | None
    ) -> None:
        self.number, self.folder, self.pending = number, folder, pending
        self._copies = copies
        self.copied = threading.Event()
        """Nothing is read any more that training changes."""
        self.begun = time.perf_counter()
        self.stalled = 0.0
        """Seconds that training has waited."""
        self.written = Written({}, {})
        self.error: str | None = None
        self.writer = threading.Thread(target=self._write, daemon=True, name="checkpoint")
        self.writer.start()

    def _write(self) -> None:
        part = self.pending.part
        try:
            if self._copies is not None:
                part = self._copies.take(part)
                self.copied.set()
            self.written = part.write(self.folder)
        except Exception as error:
            self.error = str(error) or repr(error)
        finally:
            self.copied.set()

    def state(self) -> int:
        if self.writer.is_alive():
            return _WRITING
        return _WRITTEN if self.error is None else _FAILED
