"""Fine-tuning by DeepSpeed ZeRO on transformers' Qwen2: for those who need no TP and no PP.

settings.py     the flags: fine-tuning's without tensor and pipeline parallelism, and ZeRO's
config.py       ZeRO's own flags, and DeepSpeed's JSON from all flags and --deepspeed-config
attention.py    this project's attention, fused on an npu, in transformers' attention interface
engine.py       the model in DeepSpeed's engine, and what a step and a validation are
lora.py         the Megatron path's adapters on transformers' model
checkpoint.py   checkpoints: a Hugging Face folder with DeepSpeed's own beside it
optimizer_state.py, lora_checkpoint.py
                a LoRA run's checkpoints, which are those of the Megatron path
command.py, launch.py, finetune.py
                the stages of a launcher, as `training.launch` says
"""
