"""DeepSpeed on the device of a started Runtime."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

from qwen2_ascend.errors import UserError
from qwen2_ascend.runtime.device import Runtime
from qwen2_ascend.runtime.ledger import apply


def import_deepspeed(runtime: Runtime) -> Any:
    """The module `deepspeed`, which computes on the runtime's device and joins its process group.

    Raises:
        UserError: it is not installed, or cannot be imported, or CANN's variables are not set.
    """
    if runtime.name == "npu" and "ASCEND_HOME_PATH" not in os.environ:
        raise UserError(
            "DeepSpeed looks for CANN in ASCEND_HOME_PATH, which is not set; source CANN's "
            "set_env.sh."
        )
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
    _redirect(runtime.name)
    # joins the group that is there; zero.Init counts ranks before it would do so itself
    accelerator: Any = deepspeed.accelerator.get_accelerator()
    deepspeed.init_distributed(accelerator.communication_backend_name(), auto_mpi_discovery=False)
    return deepspeed


def _redirect(device: str) -> None:
    """What DeepSpeed takes for granted on this device and does not have."""
    if device == "cpu":
        apply(
            "deepspeed.ops:__compatible_ops__",
            lambda original: {**original, "deepspeed_shm_comm": False},
            why="on a CPU DeepSpeed compiles its own all_reduce over shared memory when it "
            "starts: a minute, and it needs a C++ compiler",
            how="says that this operator cannot be built, so that gloo does all",
            until="DeepSpeed has a switch for it",
        )
    elif device == "npu":
        apply(
            "deepspeed.accelerator.npu_accelerator:NPU_Accelerator.is_fp64_supported",
            lambda original: lambda self: False,
            why="ZeRO-3 adds gradient norms up over the ranks in fp64 where a device has it, "
            "which HCCL's all_reduce refuses on 910B and 910C",
            how="says no, so that they are added up in fp32",
            until="DeepSpeed asks what the backend can reduce",
        )
