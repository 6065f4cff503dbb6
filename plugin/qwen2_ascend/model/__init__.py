"""Qwen2 on megatron-core: the layer spec, the modules it names, and building the chunks."""
