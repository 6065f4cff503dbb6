"""Finds where a run differs from transformers: `python launch/align_qwen2.py --help`."""

import sys

if __name__ == "__main__":
    from qwen2_ascend.alignment.command import main

    sys.exit(main())
