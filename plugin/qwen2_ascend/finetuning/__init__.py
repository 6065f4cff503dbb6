"""Fine-tuning: LoRA adapters, and what trains them."""
