"""Pretrains Qwen2 / Qwen2.5: `torchrun --nproc-per-node N launch/pretrain_qwen2.py --help`."""

import sys

# saving a checkpoint starts processes that import this file again: nothing else happens at import
if __name__ == "__main__":
    from qwen2_ascend.training.command import main

    sys.exit(main())
