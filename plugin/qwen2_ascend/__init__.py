"""Train and fine-tune Qwen2 / Qwen2.5 on Ascend NPU clusters with megatron-core."""

__version__ = "0.1.0"
