"""LoRA on a model of any layout.

    apply_lora(chunks, lora, seed=...)      after the weights are loaded, before DDP: freezes the
                                            weights, adds adapters (B = 0); build_optimizer then
                                            sees adapter weights only
    lora_state(chunks)                      one dict per chunk: {parameter name: parameter}
    adapters_disabled(chunks)               context manager: the base model (the reference of DPO)
    merge_adapters(chunks)                  W += scaling * B A in fp32, adapters removed, weights
                                            trainable again; for saving or generating
    merged_weights(chunks)                  the same as an iterator of (chunk, name, tensor), the
                                            model stays as it is

    save_adapter(chunks, lora, config, layout, folder)     finetuning/adapter.py: a PEFT folder;
    load_adapter(chunks, folder, config, layout)           every rank calls them. load_adapter
                                            fills what apply_lora made; read_adapter_config(folder)
                                            says which LoraConfig that has to be
    save_adapter_tensors / load_adapter_tensors            the same for Adam's moments

Merging files without a model: `qwen2-ascend convert --load-dir BASE --adapter FOLDER ...`.

The representation. PEFT gives q_proj, k_proj and v_proj a pair A `[r, h]`, B `[rows, r]` each;
Megatron holds them as one linear_qkv whose rows are mixed by query group. Here a Megatron module
has one pair that holds all of them: lora_A stacks the targets' A (`[targets * r, h]`), lora_B has a
row for every row of the module (`[rows, r]`), in the module's own order, and the row's projection
says which A it belongs to. So a B is cut exactly as the weight is, at more tensor-parallel ranks
than query groups too. Rows of projections that are not targets are zero and stay zero.
"""

from __future__ import annotations

from qwen2_ascend.lora_config import LoraConfig

__all__ = ["LoraConfig"]
