"""Generation: the model with a KV cache, sampling, prompts in and text out, chat."""
