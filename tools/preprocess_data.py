"""Turns text, JSONL or Parquet into Megatron's .bin/.idx; the same as `qwen2-ascend preprocess`."""

import sys

from qwen2_ascend.cli import run_command
from qwen2_ascend.data.command import main

if __name__ == "__main__":
    sys.exit(run_command(main))
