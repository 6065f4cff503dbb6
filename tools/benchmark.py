#!/usr/bin/env python3
"""Measure this machine as docs/benchmarks.md does; the same as `qwen2-ascend benchmark`."""

import sys

from qwen2_ascend.benchmark.command import main
from qwen2_ascend.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
