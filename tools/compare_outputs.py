#!/usr/bin/env python3
"""Compare dumped arrays of two runs; the same as `qwen2-ascend compare`."""

import sys

from qwen2_ascend.alignment.compare_command import main
from qwen2_ascend.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
