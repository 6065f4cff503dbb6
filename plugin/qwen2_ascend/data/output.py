"""Where a preprocessing run leaves its result, and how nothing half ever lies there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen2_ascend.checkpoint.staging import FolderLock
from qwen2_ascend.data.settings import PreprocessSettings
from qwen2_ascend.data.state import STATE, State, remove_unfinished
from qwen2_ascend.errors import UserError
from qwen2_ascend.files import fsync_folder, read_bytes, write_file


class Output:
    """The files a run leaves, and the folder it works in until then."""

    def __init__(self, settings: PreprocessSettings, keys: Sequence[str]) -> None:
        self._settings = settings
        self.prefix = Path(os.path.abspath(settings.output_prefix))
        self.keys = tuple(keys)
        self.folder = self.prefix.parent / f".{self.prefix.name}.preprocessing"
        self.bad_rows = Path(f"{self.prefix}_bad_rows.tsv")

    def dataset(self, key: str) -> Path:
        """The prefix for --data-path, named as Megatron does."""
        return Path(f"{self.prefix}_{key.replace('/', '_')}_document")

    def is_complete(self, deciding: dict[str, Any]) -> bool:
        """True if --resume was given and a finished run has left just this result.

        What that run, killed at its end, may have left of its work folder goes.
        """
        if not self._settings.resume or (self.folder / STATE).exists():
            return False
        for key in self.keys:
            try:
                raw = json.loads(read_bytes(f"{self.dataset(key)}.json"))
            except (OSError, ValueError):
                return False
            if raw.get("settings") != deciding or not Path(f"{self.dataset(key)}.idx").exists():
                return False
        if self.folder.exists():  # the run was killed while it removed this
            with _locked(self.folder, self.prefix):
                shutil.rmtree(self.folder)
        return True

    @contextlib.contextmanager
    def work_folder(self, fresh: State) -> Iterator[tuple[Path, State]]:
        """The locked folder to work in, and the state to go on from.

        It stays when there is something to resume, and goes when there is not.

        Raises:
            UserError: a result or an unfinished run is there and neither --resume nor
                --overwrite says what to do with it, or another run is at work.
        """
        self._check()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.prefix}: cannot be written: {error.strerror}.") from None
        with _locked(self.folder, self.prefix):
            state = (self._resumed(fresh) if self._settings.resume else None) or fresh
            remove_unfinished(self.folder, state)
            try:
                yield self.folder, state
            except BaseException as error:
                if state.num_parts:
                    _add_way_out(error)
                else:
                    shutil.rmtree(self.folder, ignore_errors=True)
                raise

    def _check(self) -> None:
        if self._settings.overwrite:
            return
        if self.folder.exists():
            if not self._settings.resume:
                raise UserError(
                    f"{self.prefix}: an unfinished run lies in {self.folder.name}; finish it "
                    "with --resume or start again with --overwrite."
                )
            return
        files = [f"{self.dataset(key)}{end}" for key in self.keys for end in (".bin", ".idx")]
        if existing := [file for file in files if os.path.exists(file)]:
            raise UserError(f"{existing[0]} exists; replace it with --overwrite.")

    def _resumed(self, fresh: State) -> State | None:
        state = State.load(self.folder)
        if state is None:
            return None
        changed = [k for k, v in fresh.settings.items() if state.settings.get(k) != v]
        if changed:
            raise UserError(
                f"{self.prefix}: the unfinished run had other settings or input "
                f"({', '.join(changed)}); give the same, or start again with --overwrite."
            )
        return state

    def publish(self, folder: Path, state: State) -> None:
        """Renames the result into place, each index after its data, and removes the folder."""
        for key in self.keys:
            target = self.dataset(key)
            if (folder / f"{target.name}.bin").exists():
                # data and index of two runs must never stand side by side
                Path(f"{target}.idx").unlink(missing_ok=True)
                os.replace(folder / f"{target.name}.bin", f"{target}.bin")
                fsync_folder(target.parent)
            if (folder / f"{target.name}.idx").exists():
                os.replace(folder / f"{target.name}.idx", f"{target}.idx")
            about = {"settings": state.settings, **asdict(state.counts[key]), **state.tallies}
            write_file(Path(f"{target}.json"), json.dumps(about, indent=1).encode())
        if (folder / self.bad_rows.name).exists():
            os.replace(folder / self.bad_rows.name, self.bad_rows)
        fsync_folder(self.prefix.parent)
        shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(folder: Path, prefix: Path) -> Iterator[None]:
    # a file beside the folder: NFS locks nothing that is not open for writing, as a folder never is
    lock = FolderLock(folder)
    try:
        lock.acquire()
    except UserError:
        raise UserError(
            f"{prefix}: another run is writing it; wait for that one, or choose another "
            "--output-prefix."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _add_way_out(error: BaseException) -> None:
    """Says that the work so far is kept, in the message or, for Ctrl-C, before it."""
    way_out = "finished parts are kept; go on with --resume"
    if isinstance(error, OSError) and error.strerror:
        error.strerror = f"{error.strerror}; {way_out}"
    else:
        print(f"note: {way_out}.", file=sys.stderr)
