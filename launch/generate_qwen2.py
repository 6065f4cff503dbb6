"""Generates text with Qwen2 / Qwen2.5: `python launch/generate_qwen2.py --help`."""

import sys

if __name__ == "__main__":
    from qwen2_ascend.inference.command import main

    sys.exit(main())
