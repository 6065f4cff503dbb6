"""`python -m npusim.run_inside SCRIPT [ARGUMENTS...]`, in the environment of env.py."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from npusim.simulator import Simulator

if __name__ == "__main__":
    sys.argv.pop(0)
    sys.path[0] = str(Path(sys.argv[0]).parent)
    with Simulator():
        runpy.run_path(sys.argv[0], run_name="__main__")
