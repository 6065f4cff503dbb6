#!/usr/bin/env python3
"""The main job on a small model: split, train on four processes, merge, compare, align.

Makes a small Qwen2 with random weights and a small tokenizer, takes the Python standard library's
sources as text, and runs the commands that a user would run, printing each. Everything goes into
the folder given (default: quickstart/).

    python examples/quickstart.py [FOLDER]
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
VOCAB_SIZE = 2048
TRAIN_ITERS = 60
SEQ_LENGTH = 128

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    if len(sys.argv) > 2 or (len(sys.argv) == 2 and sys.argv[1].startswith("-")):
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    started = time.monotonic()
    folder = make_folder(sys.argv[1] if len(sys.argv) > 1 else "quickstart")

    show("A small Qwen2 and its text")
    training_text, held_out = make_text(folder)
    make_tokenizer(folder / "hf", training_text)
    make_model(folder / "hf")

    preprocess_and_split(folder)
    train(folder)
    merge_and_compare(folder, held_out)
    align(folder)
    shutil.copyfile(REPOSITORY / "examples" / "sft_0.5b" / "chats.jsonl", folder / "chats.jsonl")

    show(f"Done in {time.monotonic() - started:.0f} s")
    show_places(folder)
    print(f"look at all of it: qwen2-ascend board {folder}")


def make_folder(name: str) -> Path:
    """The folder, empty: what an earlier quickstart left in it is deleted."""
    folder = Path(name)
    if folder.exists() and any(folder.iterdir()) and not (folder / ".quickstart").exists():
        sys.exit(f"{folder}: is not empty and not of an earlier quickstart; name another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / ".quickstart").touch()
    return folder


def preprocess_and_split(folder: Path) -> None:
    show("1. Preprocess: text to Megatron's .bin/.idx")
    run(
        "qwen2-ascend", "preprocess", "--input", folder / "text.jsonl",
        "--output-prefix", folder / "data" / "python", "--tokenizer-name-or-path", folder / "hf",
        "--append-eod", "--workers", "2",
    )  # fmt: skip

    show("2. Split: Hugging Face to TP2 PP2 shards")
    run(
        "qwen2-ascend", "convert", "--save-model-type", "mg",
        "--load-dir", folder / "hf", "--save-dir", folder / "shards",
        "--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2", "--verify",
    )  # fmt: skip


def train(folder: Path) -> None:
    show("3. Train: four processes, TP2 PP2")
    run(
        "torchrun", "--standalone", "--nproc-per-node", "4",
        REPOSITORY / "launch" / "pretrain_qwen2.py",
        "--load", folder / "shards", "--finetune", "--save", folder / "trained",
        "--data-path", folder / "data" / "python_text_document", "--split", "98,2,0",
        "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2",
        "--micro-batch-size", "4", "--global-batch-size", "8", "--seq-length", SEQ_LENGTH,
        "--train-iters", TRAIN_ITERS, "--lr", "2e-3", "--lr-decay-style", "cosine",
        "--lr-warmup-iters", "5", "--log-interval", "10",
        "--eval-interval", TRAIN_ITERS, "--eval-iters", "2", "--seed", "1",
        log=folder / "trained" / "run.log",
    )  # fmt: skip


def merge_and_compare(folder: Path, held_out: str) -> None:
    show("4. Merge: the training checkpoint to Hugging Face")
    run(
        "qwen2-ascend", "convert", "--save-model-type", "hf",
        "--load-dir", folder / "trained", "--save-dir", folder / "hf-trained", "--verify",
    )  # fmt: skip

    show("5. Compare: both Hugging Face folders in transformers, on text not trained on")
    before = transformers_loss(folder / "hf", held_out)
    after = transformers_loss(folder / "hf-trained", held_out)
    print(f"loss before {before:.3f}, after {after:.3f} nats per token")
    if not after < before - 0.5:
        sys.exit("the loss did not fall as it should")


def align(folder: Path) -> None:
    show("6. Align: every sublayer with transformers', by itself")
    run(
        "python", REPOSITORY / "launch" / "align_qwen2.py", "--load", folder / "hf-trained",
        "--seq-length", "64", "--report", folder / "aligned",
    )  # fmt: skip


def show_places(folder: Path) -> None:
    places = {
        "the model before": folder / "hf",
        "its TP2 PP2 shards": folder / "shards",
        "training checkpoint": folder / "trained",
        "loss curve": folder / "trained" / "loss.png",
        "metrics by step": folder / "trained" / "metrics.jsonl",
        "the trained model": folder / "hf-trained",
        "alignment report": folder / "aligned" / "report.html",
        "chats to tune it on": folder / "chats.jsonl",
    }
    for what, place in places.items():
        print(f"  {what:<20} {place}{'' if place.exists() else '  (missing)'}")


def make_text(folder: Path) -> tuple[list[str], str]:
    """Sources of the standard library: what is trained on, and one text that is not."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in sources]
    texts = [text for text in texts if 4_000 < len(text) < 60_000]
    random.Random(0).shuffle(texts)
    held_out, training = texts[0], texts[1:]
    lines = (json.dumps({"text": text}) for text in training)
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return training, held_out


def make_tokenizer(folder: Path, texts: list[str]) -> None:
    """A byte-level BPE of 2,048 words with Qwen2's special tokens and chat format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[:40], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def make_model(folder: Path) -> None:
    """A seeded Qwen2 of about two million weights, as transformers initializes it."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def transformers_loss(folder: Path, text: str) -> float:
    """Mean loss in nats per token of `text`, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    safely = {"local_files_only": True, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(folder, **safely).eval()
    tokens = AutoTokenizer.from_pretrained(folder, **safely)(text, return_tensors="pt").input_ids[0]
    windows = tokens[: len(tokens) // SEQ_LENGTH * SEQ_LENGTH].view(-1, SEQ_LENGTH)[:32]
    with torch.no_grad():
        return model(windows, labels=windows).loss.item()


def show(title: str) -> None:
    print(f"\n== {title}", flush=True)


def run(command: str, *arguments: object, log: Path | None = None) -> None:
    """Prints and runs one of the installed commands; ends here if it fails.

    With `log` its output goes there too, as `| tee` would do it.
    """
    words = [str(word) for word in arguments]
    print("$", shlex.join([command, *words]), flush=True)
    program, environment = str(BIN / command), os.environ | {"OMP_NUM_THREADS": "1"}
    if log is None:
        status = subprocess.run([program, *words], env=environment, timeout=600).returncode
    else:
        status = run_logged([program, *words], environment, log)
    if status:
        sys.exit(f"{command} ended with status {status}")


def run_logged(words: list[str], environment: dict[str, str], log: Path) -> int:
    """Runs a command, shows its output and keeps it in a file; gives the exit status."""
    log.parent.mkdir(parents=True, exist_ok=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
    with log.open("w") as kept, subprocess.Popen(words, env=environment, **pipes) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            kept.write(line)
    return process.returncode


if __name__ == "__main__":
    main()
