#!/usr/bin/env python3
"""Which layouts fit, and which may be fastest; the same as `qwen2-ascend plan`."""

import sys

from qwen2_ascend.cli import run_command
from qwen2_ascend.planning.command import main

if __name__ == "__main__":
    sys.exit(run_command(main))
