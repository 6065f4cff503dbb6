"""Runs MindSpeed-LLM's converter v2 on a CPU: `python mindspeed_llm_v2.py CHECKOUT JOBS.json`.

The converter itself needs torch and safetensors alone. The packages that it lies in import CANN,
torch_npu and MindSpeed, so empty ones stand in for them; of `mindspeed_llm.training.utils` it uses
a decorator that measures coverage. JOBS.json is a list of command lines; for each the converter is
imported anew.
"""

from __future__ import annotations

import json
import runpy
import sys
import types
from pathlib import Path

PACKAGE = "mindspeed_llm"


def main() -> None:
    checkout, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    sys.path.insert(0, str(checkout))
    for job in jobs:
        for name in [n for n in sys.modules if n.partition(".")[0] == PACKAGE]:
            del sys.modules[name]
        stand_in(PACKAGE, checkout / PACKAGE)
        stand_in(f"{PACKAGE}.training")
        stand_in(f"{PACKAGE}.training.utils").auto_coverage = lambda function: function
        sys.argv = ["convert_ckpt_v2.py", *job]
        runpy.run_path(str(checkout / "convert_ckpt_v2.py"), run_name="__main__")


def stand_in(name: str, folder: Path | None = None) -> types.ModuleType:
    """An empty module; with a folder, what lies in that can be imported from it."""
    module = types.ModuleType(name)
    module.__path__ = [] if folder is None else [str(folder)]
    sys.modules[name] = module
    return module


if __name__ == "__main__":
    main()
