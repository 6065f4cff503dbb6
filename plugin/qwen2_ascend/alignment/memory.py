"""The memory of models that are done with: a run and its references follow one another."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_memory_back() -> None:
    """What Python's cycles and the C library's allocator still hold of what is done with.

    A wrapped model's parts hold each other, and glibc keeps freed blocks below 32 MB, which most of
    a small model's weights are.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc's
        trim(0)
