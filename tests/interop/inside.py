"""`python -m interop.inside SCRIPT [ARGUMENTS...]` runs a genuine tool on simulated cards.

As `npusim.stand_ins`, with stand-ins for more packages that these tools import and do not use here.
"""

from __future__ import annotations

import runpy

from npusim import stand_ins

PACKAGES = ("acl", "bitsandbytes")
"""CANN's Python interface, and quantization."""

if __name__ == "__main__":
    stand_ins.PACKAGES = (*stand_ins.PACKAGES, *PACKAGES)
    stand_ins.install()
    runpy.run_module("npusim.run_inside", run_name="__main__", alter_sys=True)
