"""Runs MindSpeed-LLM's converter v1 inside the simulation: `mindspeed_llm_v1.py [ARGUMENTS...]`.

It is imported from the checkout on the path. Its check that transformers is at least 4.31 looks at
the minor version alone and refuses 5.0 to 5.30, so it is left out.
"""

from __future__ import annotations

import importlib
import os
import sys

if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    command = importlib.import_module("convert_ckpt")
    loader = importlib.import_module("mindspeed_llm.tasks.checkpoint.loader_hf")
    loader.verify_transformers_version = lambda: None
    command.main()
