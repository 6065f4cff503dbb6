"""Evaluates Qwen2 / Qwen2.5: `python launch/evaluate_qwen2.py --help`."""

import sys

if __name__ == "__main__":
    from qwen2_ascend.evaluation.command import main

    sys.exit(main())
