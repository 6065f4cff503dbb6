"""Chats for fine-tuning: from files of conversations to samples with loss masks and packing.

`formats.py` reads rows of any known format as chats, `rendering.py` turns a chat into token ids and
says which the loss is on, `preprocess.py` writes them as .bin/.idx in MindSpeed-LLM's layout,
`packing.py` and `dataset.py` make samples and batches of those, and `build.py` is what a launcher
calls.
"""
