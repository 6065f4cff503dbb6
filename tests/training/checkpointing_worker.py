"""Training checkpoints: what a resumed run takes from them, and what it refuses."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from pathlib import Path

from distributed.harness import Checks, Run, main
from distributed.train_worker import FLAGS, save, start, steps

CHECKS = Checks()


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.mkdir, (self.mark,)


def in_the_generators(folder: Path, payload: Payload) -> None:
    """Saved as if it were the state of the random number generators."""


def in_the_metadata(folder: Path, payload: Payload) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(payload))


def in_the_common_part(folder: Path, payload: Payload) -> None:
    import torch

    torch.save({"args": payload}, folder / "common.pt")


def a_pickle_is_refused(poison: Callable[[Path, Payload], None], run: Run) -> str:
    """Nothing of a torch_dist folder is executed, whatever the installed megatron-core would do."""
    from qwen2_ascend.errors import UserError
    from qwen2_ascend.training import checkpointing

    folder, payload = run.folder / poison.__name__, Payload(run.folder / f"{poison.__name__}.ran")
    training = start(run, f"{FLAGS} --save {folder}")
    steps(training, 1)
    rng_state = checkpointing.rng_state
    if poison is in_the_generators:
        checkpointing.rng_state = lambda runtime: payload  # type: ignore[assignment]
    try:
        iteration = save(training)
    finally:
        checkpointing.rng_state = rng_state
    poison(iteration, payload)
    if poison is not in_the_generators:
        # else the file would be refused for its checksum already
        (iteration / "qwen2_ascend_manifest.json").unlink()
    try:
        start(run, FLAGS, load=folder)
    except UserError as error:
        message = str(error)
    else:
        raise AssertionError("accepted")
    assert not payload.mark.exists(), "executed"
    assert "pathlib.Path.mkdir" in message or "Path" in message, message
    # what is left out is not even looked at
    if poison is in_the_generators:
        assert start(run, f"{FLAGS} --no-load-rng", load=folder).progress.iteration == 1
    return message


for _poison in (in_the_generators, in_the_metadata, in_the_common_part):
    CHECKS.add(world_size=1, name=f"refuses-a-pickle-{_poison.__name__}")(
        functools.partial(a_pickle_is_refused, _poison)
    )


if __name__ == "__main__":
    main(CHECKS)
