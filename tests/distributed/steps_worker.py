"""A rank that takes steps with the others until something happens.

`steps_worker.py SECONDS [WHAT]`: SECONDS is the time-out. It has a data loader's worker, as a
training run has. WHAT goes wrong: "absent" is a fault on rank 1 alone after the ranks have met,
"everywhere" the same on all ranks before; "device" is another device on rank 1.
"""

from __future__ import annotations

import os
import sys
import time


class Numbers:
    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> int:
        return index


def steps() -> None:
    import torch
    from torch.utils.data import DataLoader

    from qwen2_ascend import runtime
    from qwen2_ascend.errors import UserError
    from qwen2_ascend.runtime import startup

    what, fault = sys.argv[2:] or [""], UserError("the file is not here; copy it.")
    if what == ["everywhere"]:
        raise fault
    if what == ["device"] and os.environ["RANK"] == "1":
        startup.select_device = lambda requested: "cuda"
    running = runtime.start(None, timeout_seconds=float(sys.argv[1]))
    if what == ["absent"] and running.rank == 1:
        raise fault
    numbers = DataLoader(Numbers(), batch_size=1, num_workers=1)
    for step, number in enumerate(numbers, 1):
        torch.distributed.all_reduce(number)
        running.reached(step)
        if running.rank == 0:
            print(f"step {step}", flush=True)
        time.sleep(0.02)


if __name__ == "__main__":
    from qwen2_ascend.launching import launched

    sys.exit(launched(steps))
