"""Fine-tunes Qwen2 / Qwen2.5 by DeepSpeed ZeRO.

`torchrun --nproc-per-node N launch/finetune_qwen2_deepspeed.py --help`
"""

import sys

# reading ahead starts processes that import this file again: nothing else happens at import
if __name__ == "__main__":
    from qwen2_ascend.finetuning.deepspeed.command import main

    sys.exit(main())
