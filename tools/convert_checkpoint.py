#!/usr/bin/env python3
"""Split, merge and reshard Qwen2 checkpoints; the same as `qwen2-ascend convert`."""

import sys

from qwen2_ascend.checkpoint.command import main
from qwen2_ascend.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
