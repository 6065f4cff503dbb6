"""DeepSpeed on the device of a started Runtime."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

from qwen2_ascend.errors import UserError
from qwen2_ascend.runtime.device import Runtime
from qwen2_ascend.runtime.ledger import Patch, apply


def import_deepspeed(runtime: Runtime) -> Any:
    """The module `deepspeed`, which computes on the runtime's device and joins its process group.

    Raises:
        UserError: it is not installed, or cannot be imported.
    """
    # DeepSpeed would choose by what is installed; the runtime has chosen already
    os.environ["DS_ACCELERATOR"] = runtime.name
    # zero.Init asks for it, also where a process runs alone
    os.environ.setdefault("LOCAL_RANK", str(runtime.local_rank))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
    except ImportError as error:
        raise UserError(
            f"DeepSpeed cannot be imported ({error}); pip install 'qwen2-ascend[deepspeed]' "
            "installs it (DS_BUILD_OPS=0 compiles nothing), and launch/finetune_qwen2.py does "
            "without it."
        ) from None
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if runtime.name == "cpu":
        apply(
            Patch(
                target="deepspeed.ops:__compatible_ops__",
                why="on a CPU DeepSpeed compiles its own all_reduce over shared memory when it "
                "starts: a minute, and it needs a C++ compiler",
                how="says that this operator cannot be built, so that gloo does all",
                until="DeepSpeed has a switch for it",
            ),
            lambda original: {**original, "deepspeed_shm_comm": False},
        )
    return deepspeed
