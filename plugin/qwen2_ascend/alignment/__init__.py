"""Where two implementations part: dumps compared, and a run compared with transformers layer by layer."""
