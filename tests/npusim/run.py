"""Runs a script on simulated cards: `python -m npusim.run [--soc NAME] SCRIPT [ARGUMENTS...]`.

For several cards through torchrun, each rank in the simulation:

    python -m npusim.run --torchrun "--nproc-per-node 2" launch/pretrain_qwen2.py --device npu ...
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from npusim.env import SOC_910B, SOC_910C, environment


def main() -> None:
    """Starts the script, or torchrun, anew in the simulation's environment."""
    parser = argparse.ArgumentParser(prog="npusim.run", description=__doc__.splitlines()[0])
    parser.add_argument("--soc", choices=(SOC_910B, SOC_910C), default=SOC_910B)
    parser.add_argument("--torchrun", metavar="OPTIONS", help="start several ranks, in one string")
    parser.add_argument("script", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    os.execve(
        sys.executable,
        command(options.script, torchrun=options.torchrun),
        environment(soc=options.soc),
    )


def command(script: list[str], torchrun: str | None = None) -> list[str]:
    """The command line that runs a script and its arguments inside the environment."""
    start = [sys.executable, "-m"]
    if torchrun is not None:
        start += ["torch.distributed.run", *shlex.split(torchrun), "-m"]
    return [*start, "npusim.run_inside", *script]


def on_cards(script: str, num_cards: int) -> Any:
    """What a script that is given `--inside FOLDER` on so many cards writes to found.json there."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            command(
                [script, "--inside", folder],
                torchrun=f"--standalone --nproc-per-node {num_cards}",
            ),
            env={**environment(num_devices=num_cards), "HCCL_SIM_LOG": f"{folder}/hccl"},
            check=True,
            timeout=900,
        )
        return json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
