#!/usr/bin/env python3
"""Compare dumped arrays of two runs; the same as `qwen2-ascend compare`."""

import sys

from qwen2_ascend.cli import run_command
from qwen2_ascend.comparison.command import main

if __name__ == "__main__":
    sys.exit(run_command(main))
