"""Arrays of two runs, compared; nothing here knows of Qwen2 or of any model."""
