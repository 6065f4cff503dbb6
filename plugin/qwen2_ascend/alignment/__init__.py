"""Where two implementations part: dumps compared; a run against transformers, layer by layer."""
