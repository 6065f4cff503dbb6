"""Every bad input ends with one clear message, status 2 (or 1 for a failure), and nothing behind.

`refused` checks all of that for each case: no traceback, the target as it was, nothing beside it,
and the source's bytes, times and modes unchanged.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoint.toys import (
    convert,
    fingerprint,
    load_folder,
    make_hugging_face_folder,
    pp,
    random_weights,
    save_safetensors,
    toy_config,
    tp,
    tree,
)
from qwen2_ascend.checkpoint import convert as convert_module
from qwen2_ascend.checkpoint import copying, staging, writing
from qwen2_ascend.checkpoint.manifest import MANIFEST_FILE
from qwen2_ascend.checkpoint.staging import StagedFolder
from qwen2_ascend.errors import VerificationError

TOOL = Path(__file__).parents[2] / "tools/convert_checkpoint.py"
RANK = "iter_0000001/mp_rank_00"
LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 988097824\n"
)


def refused(
    source: Path,
    *flags: object,
    to: str = "mg",
    target: Path | None = None,
    words: Sequence[str] = (),
) -> str:
    """Converts, expects status 2 and `words`, checks that nothing changed; gives what was said."""
    before = fingerprint(source.parent)
    said = convert(source, target or source.parent / "target", *flags, to=to).require(2).err
    assert fingerprint(source.parent) == before
    assert said.strip()
    assert not [word for word in words if word not in said], said
    return said


# -- Hugging Face sources


def edit_config(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    weights = random_weights(toy_config())
    edit(weights)
    save_safetensors(folder / "model.safetensors", weights)


def edit_header(folder: Path, edit: Callable[[bytes], bytes]) -> None:
    """Rewrites the header's JSON; the data stays."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = edit(raw[8 : 8 + length])
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def swap_offsets(text: bytes) -> bytes:
    """Two tensors of equal size get the same bytes, so that others are nobody's."""
    header = json.loads(text)
    k, v = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv")
    header[k]["data_offsets"] = header[v]["data_offsets"]
    return json.dumps(header).encode()


def lose_two(weights: dict) -> None:
    del weights["model.norm.weight"], weights["model.layers.1.self_attn.k_proj.bias"]


def rename(folder: Path, change: Callable[[str], str]) -> None:
    weights = {change(name): w for name, w in random_weights(toy_config()).items()}
    save_safetensors(folder / "model.safetensors", weights)


def truncate(path: Path, by: int = 1) -> None:
    os.truncate(path, path.stat().st_size - by)


def shorten(name: str) -> Callable[[dict], None]:
    def edit(weights: dict) -> None:
        weights[name] = weights[name][:-1]

    return edit


def test_a_name_on_a_hub_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = convert(Path("Qwen/Qwen2.5-7B"), tmp_path / "out", to="mg").require(2).err
    assert "Qwen/Qwen2.5-7B: no such folder. If that is a model's name on a hub, download" in said
    said = convert(tmp_path / "hf", tmp_path / "out", to="mg").require(2).err
    assert said.rstrip().endswith(f"{tmp_path}/hf: no such folder.")


HUGGING_FACE = {
    "missing tensors, all named": (
        lambda f: edit_weights(f, lose_two),
        ["2 missing tensors", "model.norm.weight", "model.layers.1.self_attn.k_proj.bias"],
    ),
    "extra tensors, all named": (
        lambda f: edit_weights(
            f, lambda w: w.update(a=w["model.norm.weight"], b=w["lm_head.weight"])
        ),
        ["2 unexpected tensors", "a, b"],
    ),
    "a name that leads out": (
        lambda f: edit_weights(f, lambda w: w.update({"../../evil": w["model.norm.weight"]})),
        ["1 unexpected tensors: ../../evil"],
    ),
    "short rows": (
        lambda f: edit_weights(f, shorten("model.layers.0.mlp.up_proj.weight")),
        ["up_proj.weight: expected shape (96, 64), found (95, 64)", "model.safetensors"],
    ),
    "a short vocabulary": (
        lambda f: edit_weights(f, shorten("model.embed_tokens.weight")),
        ["model.embed_tokens.weight: expected shape (96, 64), found (95, 64)"],
    ),
    "tokens added to the model, not to the config": (
        lambda f: edit_config(f, vocab_size=90),
        ['"vocab_size": 90, the embedding has 96 rows', "set it to 96"],
    ),
    **{
        f"names that begin with {prefix}": (
            lambda f, prefix=prefix: rename(f, lambda name: f"{prefix}{name}"),
            [f"names begin with {prefix}model. where model. is", "Save the inner one"],
        )
        for prefix in ("_orig_mod.", "module.", "base_model.model.")
    },
    "a vision model's language model": (
        lambda f: rename(f, lambda name: name.replace("model.", "model.language_model.")),
        ["its tensors' names begin with model.language_model. where"],
    ),
    "a reward model": (
        lambda f: rename(f, lambda name: name.replace("lm_head", "score")),
        ["score.weight is the head of a reward model"],
    ),
    "an adapter": (
        lambda f: (
            (f / "model.safetensors").rename(f / "adapter_model.safetensors")
            and (f / "config.json").rename(f / "adapter_config.json")
        ),
        ["is a PEFT adapter, which holds no model", "--adapter"],
    ),
    "a Git LFS pointer": (
        lambda f: (f / "model.safetensors").write_bytes(LFS_POINTER),
        ["model.safetensors: is a Git LFS pointer", "git lfs pull"],
    ),
    "a config that is a Git LFS pointer": (
        lambda f: (f / "config.json").write_bytes(LFS_POINTER),
        ["config.json: is a Git LFS pointer"],
    ),
    "int32 weights": (
        lambda f: edit_weights(
            f, lambda w: w.update({"model.norm.weight": np.zeros(64, np.int32)})
        ),
        ["model.norm.weight: dtype int32 is none of bf16, fp16, fp32"],
    ),
    "fewer layers in the config": (
        lambda f: edit_config(f, num_hidden_layers=1),
        ["files hold layers up to 1", "config.json says 1 layers"],
    ),
    "more layers in the config": (
        lambda f: edit_config(f, num_hidden_layers=3),
        ["12 missing tensors", "model.layers.2.mlp.down_proj.weight"],
    ),
    "another width in the config": (
        lambda f: edit_config(f, hidden_size=128, num_attention_heads=16, num_key_value_heads=8),
        ["expected shape", "more faults of this kind"],
    ),
    "tied by the config, not by the tensors": (
        lambda f: edit_config(f, tie_word_embeddings=True),
        ["lm_head.weight differs from model.embed_tokens.weight"],
    ),
    "untied by the config, tied by the tensors": (
        lambda f: edit_weights(f, lambda w: w.pop("lm_head.weight")),
        ["1 missing tensors: lm_head.weight", '"tie_word_embeddings": false'],
    ),
    "truncated": (
        lambda f: truncate(f / "model.safetensors"),
        ["model.safetensors: tensor", "truncated", "download it again"],
    ),
    "truncated in the header": (
        lambda f: os.truncate(f / "model.safetensors", 100),
        ["truncated inside its header"],
    ),
    "empty": (
        lambda f: os.truncate(f / "model.safetensors", 0),
        ["0 bytes long, too short for a safetensors file"],
    ),
    "overlapping": (
        lambda f: edit_header(f, swap_offsets),
        ["overlap", "are nobody's"],
    ),
    "a duplicate key": (
        lambda f: edit_header(f, lambda t: t.replace(b"layers.1.", b"layers.0.")),
        ["'model.layers.0.input_layernorm.weight' more than once"],
    ),
    "a header that is not JSON": (
        lambda f: edit_header(f, lambda t: t.replace(b":", b";")),
        ["model.safetensors", "not valid JSON"],
    ),
    "a number of 5000 digits": (
        lambda f: (f / "config.json").write_text('{"vocab_size": ' + "9" * 5000 + "}"),
        ["config.json: cannot be read as JSON: ", "4300 digits"],
    ),
    "a config that is deep": (
        lambda f: (f / "config.json").write_text("[" * 500_000),
        ["config.json: cannot be read as JSON: "],
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json", "--hf-cfg-dir"]),
    "a config that is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        ["config.json: cannot be read as JSON"],
    ),
    "another model": (
        lambda f: edit_config(f, model_type="llama"),
        ["model_type='llama' is not \"qwen2\""],
    ),
    "10^9 layers": (
        lambda f: edit_config(f, num_hidden_layers=10**9),
        ["config.json says 1000000000 layers, but there are only 27 tensors"],
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        ["holds neither model.safetensors nor model.safetensors.index.json"],
    ),
    "weights of before safetensors": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        ["pytorch_model*.bin only", "save_pretrained"],
    ),
    "weights twice": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        ["has both", "one is stale"],
    ),
    "two kinds of checkpoint": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("1"),
        ["Hugging Face weights and Megatron shards", "--load-model-type"],
    ),
}


@pytest.mark.parametrize("case", HUGGING_FACE)
def test_a_bad_hugging_face_folder(case, tmp_path):
    damage, words = HUGGING_FACE[case]
    source = make_hugging_face_folder(tmp_path / "hf")
    damage(source)
    refused(source, *tp(2), words=words)


def edit_index(folder: Path, edit: Callable[[dict], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def name_outside(name: str) -> Callable[[Path], None]:
    """The index names a file that is there, but outside the folder."""

    def edit(folder: Path) -> None:
        shutil.copy(folder / "model-00001-of-00002.safetensors", folder.parent / "x.safetensors")
        where = name.format(folder.parent)
        edit_index(
            folder,
            lambda m: m.update({k: where for k, v in m.items() if v.startswith("model-00001")}),
        )

    return edit


INDEXED = {
    "a missing file": (
        lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
        ["names model-00002-of-00002.safetensors, which is missing"],
    ),
    "a file above the folder": (name_outside("../x.safetensors"), ["outside the folder; refused"]),
    "an absolute path": (name_outside("{}/x.safetensors"), ["outside the folder; refused"]),
    "a tensor in the wrong file": (
        lambda f: edit_index(
            f, lambda m: m.update({"model.norm.weight": "model-00002-of-00002.safetensors"})
        ),
        ["lacks model.norm.weight", "holds model.norm.weight, which the index does not place"],
    ),
    "a duplicate key": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "x", "a": "y"}}'
        ),
        ["key 'a' stands in it 2 times"],
    ),
    "not an index": (
        lambda f: (f / "model.safetensors.index.json").write_text("[]"),
        ["not a safetensors index"],
    ),
    "no index": (
        lambda f: (f / "model.safetensors.index.json").unlink(),
        ["but no model.safetensors.index.json; it is incomplete"],
    ),
}


@pytest.mark.parametrize("case", INDEXED)
def test_a_bad_index(case, tmp_path):
    damage, words = INDEXED[case]
    source = make_hugging_face_folder(tmp_path / "hf", num_files=2)
    damage(source)
    refused(source, *tp(2), words=words)


def hub_cache(repository: Path, source: Path) -> Path:
    """`source` as huggingface_hub stores it; returns the snapshot's folder."""
    snapshot = repository / "snapshots/0123abc"
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(path for path in source.rglob("*") if path.is_file()):
        blob = repository / "blobs" / f"{number:040}"
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_links_as_in_a_hub_cache_are_followed(tmp_path):
    """Hub caches keep blobs elsewhere and link to them; that is no lead out of the folder."""
    source = make_hugging_face_folder(tmp_path / "hf", num_files=2)
    snapshot = hub_cache(tmp_path / "hub/models--a--b", source)
    convert(snapshot, tmp_path / "out", to="hf").require()
    assert load_folder(tmp_path / "out") == load_folder(source)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def leads_to(where: str, name: str) -> Callable[[Path], object]:
    def link(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(where)

    return link


def outside(name: str) -> Callable[[Path], object]:
    """Moves a file out of the folder and leaves a link."""

    def move(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / "outside")
        (folder / name).symlink_to(folder.parent / "outside")

    return move


LINKS = {
    "templates": leads_to("/etc", "additional_chat_templates"),
    "a template": leads_to("/etc/passwd", "additional_chat_templates/x.jinja"),
    "a tokenizer": leads_to("../../../../../../../etc/passwd", "vocab.json"),
    "config": outside("config.json"),
    "a folder of templates": leads_to("/etc", "additional_chat_templates/more"),
    "weights": outside("model.safetensors"),
}


@pytest.mark.parametrize("case", LINKS)
def test_links_that_lead_out_of_the_folder_are_refused(case, tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf")
    LINKS[case](source)
    assert "a link that leads out of" in refused(source)


@pytest.mark.parametrize("save_format", ["megatron", "safetensors", "torch_dist"])
def test_links_out_of_shards_are_refused(save_format, tmp_path):
    convert(
        make_hugging_face_folder(tmp_path / "hf"), tmp_path / "mg", "--save-format", save_format
    )
    for path in sorted(
        path for path in (tmp_path / "mg/iter_0000001").rglob("*") if path.is_file()
    ):
        name = str(path.relative_to(tmp_path / "mg"))
        outside(name)(tmp_path / "mg")
        assert "a link that leads out of" in refused(tmp_path / "mg", to="hf")
        path.unlink()
        shutil.move(tmp_path / "outside", path)
    convert(tmp_path / "mg", tmp_path / "out", to="hf").require()
    outside("latest_checkpointed_iteration.txt")(tmp_path / "mg")
    assert "a link that leads out of" in refused(tmp_path / "mg", to="hf")
    (tmp_path / "outside").unlink()
    (tmp_path / "mg/latest_checkpointed_iteration.txt").unlink()
    (tmp_path / "mg/latest_checkpointed_iteration.txt").write_text("1")
    outside("iter_0000001")(tmp_path / "mg")
    assert "a link that leads out of" in refused(tmp_path / "mg", to="hf")


def test_an_adapter_of_links_is_refused_too(tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").symlink_to("/etc/hostname")
    said = refused(source, "--adapter", tmp_path / "adapter", to="hf")
    assert "a link that leads out of" in said


def test_links_inside_the_folder_are_followed(tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf")
    (source / "real").mkdir()
    for name in ("model.safetensors", "config.json", "additional_chat_templates"):
        shutil.move(source / name, source / "real" / name)
        (source / name).symlink_to(f"real/{name}")
    convert(source, tmp_path / "out", to="hf").require()
    assert (
        tmp_path / "out/additional_chat_templates/tool_use.jinja"
    ).read_bytes() == b"{{ tools }}"


FIFOS = {
    "hf": ("config.json", "model.safetensors", "generation_config.json", "tokenizer.json"),
    "pt": (f"{RANK}/model_optim_rng.pt", "latest_checkpointed_iteration.txt", MANIFEST_FILE),
    "torch_dist": tuple(
        f"iter_0000001/{name}"
        for name in ("common.pt", "metadata.json", "__0_0.distcp", ".metadata")
    ),
}


@pytest.mark.parametrize("kind", FIFOS)
def test_fifos_and_devices_are_refused_at_once(kind, tmp_path):
    """Opening a FIFO waits until somebody writes into it; a device never ends."""
    hf = make_hugging_face_folder(tmp_path / "hf")
    form = ["--save-format", "torch_dist"] if kind == "torch_dist" else tp(2)
    source = hf if kind == "hf" else tmp_path / "mg"
    if kind != "hf":
        convert(hf, source, *form).require()
    for name in FIFOS[kind]:
        path = source / name
        path.rename(tmp_path / "kept")
        for make in (os.mkfifo, lambda path: os.mknod(path, 0o020666, os.makedev(1, 5))):
            make(path)
            started = time.monotonic()
            convert(source, tmp_path / "target", to="hf").require(2)
            assert time.monotonic() - started < 3
            path.unlink()
        (tmp_path / "kept").rename(path)
    convert(source, tmp_path / "target", to="hf").require()


HUGE = ("config.json", "tokenizer.json", "additional_chat_templates/tool_use.jinja", MANIFEST_FILE)


@pytest.mark.parametrize("name", HUGE)
def test_files_that_are_read_whole_have_a_bound(name, tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf")
    (source / name).touch()
    os.truncate(source / name, 1 << 40)  # a hole: it takes no space
    started = time.monotonic()
    assert f"{source / name}: " in convert(source, tmp_path / "target").require(2).err
    assert time.monotonic() - started < 5


def test_names_of_a_file_cannot_write_on_the_terminal(tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf\x1b[2J")
    evil = "a\x1b[2J\nerror: all fine\u202e"
    edit_weights(source, lambda w: w.update({evil: w["model.norm.weight"]}))
    said = refused(source)
    assert r"unexpected tensors: a\x1b[2J\nerror: all fine\u202e." in said
    assert all(line.isprintable() for line in said.splitlines())
    (source / "model.safetensors").unlink()
    make_hugging_face_folder(source, num_files=2)
    file = source / "model-00001-of-00002.safetensors"
    file.rename(source / "a\x1b[2J.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(file.name, r"a\u001b[2J.safetensors"))
    for flags in (["--dry-run"], ["--verify"]):
        ended = convert(source, tmp_path / "out", *flags).require()
        assert all(line.isprintable() for line in (ended.err + ended.out).splitlines())


def test_nan_payloads_are_kept(tmp_path):
    weights = random_weights(toy_config())
    weights["model.norm.weight"].view(np.uint16)[:] = np.arange(0x7F81, 0x7F81 + 64)
    source = make_hugging_face_folder(tmp_path / "hf", weights=weights)
    convert(source, tmp_path / "mg", *tp(2)).require()
    convert(tmp_path / "mg", tmp_path / "back", to="hf").require()
    found = load_folder(tmp_path / "back")["model.norm.weight"].data
    assert found == weights["model.norm.weight"].tobytes()


# -- Megatron sources


class Payload:
    """Pickles as a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def hostile(folder: Path) -> None:
    """A file that is whole but for a payload in place of its iteration number."""
    path = folder / RANK / "model_optim_rng.pt"
    data = pickle.dumps({"model": {}, "x": Payload(f"touch {folder.parent}/executed")}, protocol=2)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model_optim_rng/data.pkl", data)
        archive.writestr("model_optim_rng/version", "3\n")


def flip_norm(weights: dict) -> None:
    weights["decoder.layers.1.input_layernorm.weight"].view(np.uint16)[5] ^= 1


MEGATRON = {
    "a missing rank": (
        lambda f: shutil.rmtree(f / RANK),
        ["mp_rank_00 is missing (tensor-parallel size 2"],
    ),
    "an odd rank": (
        lambda f: (f / RANK).rename(f / "iter_0000001/mp_rank_0x"),
        ["mp_rank_0x", "not a tensor/pipeline-parallel rank"],
    ),
    "two layouts in one folder": (
        lambda f: shutil.copytree(f / RANK, f / "iter_0000001/mp_rank_00_001"),
        ["mixes mp_rank_TT and mp_rank_TT_PPP"],
    ),
    "no tracker": (
        lambda f: (f / "latest_checkpointed_iteration.txt").unlink(),
        ["no latest_checkpointed_iteration.txt", "It holds iter_0000001; give one of them."],
    ),
    "a tracker that names nothing": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("7"),
        ["names iter_0000007, which is missing"],
    ),
    "a tracker that leads out": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("../../x"),
        ["says '../../x', neither a number nor"],
    ),
    "a tracker that leads out below iter_": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("iter_0000001/../../mg"),
        ["says 'iter_0000001/../../mg', neither a number nor"],
    ),
    "an empty rank": (
        lambda f: (f / RANK / "model_optim_rng.pt").unlink(),
        ["mp_rank_00: holds neither model_optim_rng.pt nor model.safetensors"],
    ),
    "a truncated .pt": (
        lambda f: truncate(f / RANK / "model_optim_rng.pt", 1000),
        ["model_optim_rng.pt"],
    ),
    "a hostile pickle": (hostile, ["model_optim_rng.pt", "system"]),
    "fewer layers in the config": (
        lambda f: edit_config(f, num_hidden_layers=1),
        ["the shards hold 2 layers, config.json says 1"],
    ),
    "10^9 layers": (
        lambda f: edit_config(f, num_hidden_layers=10**9),
        ["config.json says 1000000000 layers"],
    ),
    "a tie flag that the shards contradict": (
        lambda f: edit_config(f, tie_word_embeddings=True),
        ["unexpected tensors: output_layer.weight", '"tie_word_embeddings": true; is that right?'],
    ),
    "a larger vocabulary in the config": (
        lambda f: edit_config(f, vocab_size=97),
        ["2 x 48 vocabulary rows, fewer than config.json's vocab_size=97"],
    ),
    "both formats": (
        lambda f: save_safetensors(f / RANK / "model.safetensors", {"x": np.zeros(1, np.float32)}),
        ["has both model_optim_rng.pt and model.safetensors; one is stale"],
    ),
}


@pytest.mark.parametrize("case", MEGATRON)
def test_bad_shards(case, tmp_path):
    damage, words = MEGATRON[case]
    convert(make_hugging_face_folder(tmp_path / "hf"), tmp_path / "mg", *tp(2)).require()
    damage(tmp_path / "mg")
    refused(tmp_path / "mg", to="hf", words=words)
    assert not (tmp_path / "executed").exists()


BIAS = "decoder.layers.0.self_attention.linear_qkv.bias"
SAFETENSORS = {
    "missing and extra tensors": (
        lambda w: w.update(x=w.pop(BIAS)),
        [f"mp_rank_00: 1 missing tensors: {BIAS}", "x."],
    ),
    "a short shard": (
        shorten("decoder.layers.0.mlp.linear_fc1.weight"),
        ["expected shape (96, 64), found (95, 64)"],
    ),
    "an int32 shard": (
        lambda w: w.update({"decoder.final_layernorm.weight": np.zeros(64, np.int32)}),
        ["decoder.final_layernorm.weight: dtype int32"],
    ),
    "ranks that disagree": (
        flip_norm,
        ["decoder.layers.1.input_layernorm.weight differs", "--ignore-replica-mismatch"],
    ),
    "an embedding without an axis": (
        lambda w: w.update({"embedding.word_embeddings.weight": np.zeros((), np.float32)}),
        ["no embedding.word_embeddings.weight of two axes"],
    ),
}


@pytest.mark.parametrize("case", SAFETENSORS)
@pytest.mark.parametrize("has_manifest", [True, False], ids=["manifest", "no manifest"])
def test_bad_tensors_of_a_rank(case, has_manifest, tmp_path):
    """The readers find them, whether or not there is a manifest to compare with."""
    edit, words = SAFETENSORS[case]
    hf = make_hugging_face_folder(tmp_path / "hf")
    convert(hf, tmp_path / "mg", *tp(2), "--save-format", "safetensors").require()
    path = tmp_path / "mg" / RANK / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_safetensors(path, weights)
    if not has_manifest:
        (tmp_path / "mg" / MANIFEST_FILE).unlink()
    refused(tmp_path / "mg", to="hf", words=words)


TORCH_DIST = {
    "fewer layers in the config": (
        lambda f: edit_config(f, num_hidden_layers=1),
        ["linear_qkv.weight: expected shape (1, 128, 64), found (2, 128, 64)"],
    ),
    "10^9 layers": (
        lambda f: edit_config(f, num_hidden_layers=10**9),
        ["expected shape (1000000000, "],
    ),
    "another width in the config": (
        lambda f: edit_config(f, intermediate_size=128),
        ["linear_fc1.weight: expected shape"],
    ),
    "a larger vocabulary in the config": (
        lambda f: edit_config(f, vocab_size=97),
        ["96 vocabulary rows, fewer than vocab_size=97"],
    ),
    "tied by the config, not by the tensors": (
        lambda f: edit_config(f, tie_word_embeddings=True),
        ["unexpected tensors: output_layer.weight"],
    ),
    "a missing file": (
        lambda f: next((f / "iter_0000001").glob("*.distcp")).unlink(),
        [".distcp"],
    ),
    "a short file": (
        lambda f: os.truncate(next((f / "iter_0000001").glob("*.distcp")), 5000),
        [".distcp"],
    ),
    "no metadata": (
        lambda f: (f / "iter_0000001/.metadata").unlink(),
        ["iter_0000001"],
    ),
    "damaged metadata": (
        lambda f: (f / "iter_0000001/.metadata").write_bytes(b"\x80\x02}q"),
        [".metadata"],
    ),
}


@pytest.mark.parametrize("case", TORCH_DIST)
def test_a_bad_torch_dist_folder(case, tmp_path):
    damage, words = TORCH_DIST[case]
    hf = make_hugging_face_folder(tmp_path / "hf")
    convert(hf, tmp_path / "mg", *tp(2), "--save-format", "torch_dist").require()
    damage(tmp_path / "mg")
    started = time.thread_time()
    refused(tmp_path / "mg", to="hf", words=words)
    assert time.thread_time() - started < 1


def test_a_missing_first_chunk_of_a_virtual_pipeline(tmp_path):
    hf = make_hugging_face_folder(tmp_path / "hf", toy_config(num_layers=4))
    flags = [*pp(2), "--num-layers-per-virtual-pipeline-stage", 1, "--save-format", "safetensors"]
    convert(hf, tmp_path / "mg", *flags).require()
    (tmp_path / "mg/iter_0000001/mp_rank_00_000/model0.safetensors").unlink()
    assert "the shards hold 3 layers, config.json says 4" in refused(tmp_path / "mg", to="hf")


def test_a_giant_config_costs_neither_time_nor_memory(tmp_path):
    hf = make_hugging_face_folder(tmp_path / "hf")
    convert(hf, tmp_path / "mg", *tp(2)).require()
    for folder in ("hf", "mg"):
        edit_config(tmp_path / folder, num_hidden_layers=10**9)
        tracemalloc.start()
        started = time.thread_time()
        convert(tmp_path / folder, tmp_path / "target").require(2)
        seconds, (_, peak) = time.thread_time() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert seconds < 1 and peak < 20e6


# -- wrong wishes


WISHES = {
    "TP 3": (
        tp(3),
        ["tensor_model_parallel_size=3 does not divide num_attention_heads=8; use 1, 2"],
    ),
    "TP 5, which padding does not help": (
        tp(5),
        ["does not divide num_attention_heads=8; use 1, 2", "does not divide the vocabulary of"],
    ),
    "TP 0": (tp(0), ["--target-tensor-parallel-size 0 must be at least 1"]),
    "PP 3": (pp(3), ["pipeline_model_parallel_size=3 does not divide num_layers=2"]),
    "PP 10^9": (pp(10**9), ["pipeline_model_parallel_size=1000000000 does not divide"]),
    "an odd vocabulary": (
        [*tp(4), "--padded-vocab-size", 97],
        ["does not divide the vocabulary of 97 rows", "--padded-vocab-size 100"],
    ),
    "too small a vocabulary": (
        ["--padded-vocab-size", 95],
        ["padded_vocab_size=95 is below vocab_size=96"],
    ),
    "both ways to pad": (
        ["--padded-vocab-size", 96, "--make-vocab-size-divisible-by", 5],
        ["give one of them"],
    ),
    "a layer list that does not sum up": (
        [*pp(2), "--num-layer-list", "1,2"],
        ["num_layer_list=1,2 sums to 3, not num_layers=2"],
    ),
    "a layer list of words": (["--num-layer-list", "1,x"], ["1,x is not a list of whole numbers"]),
    "VPP without PP": (
        ["--num-layers-per-virtual-pipeline-stage", 1],
        ["needs pipeline_model_parallel_size of at least 2"],
    ),
    "a shard size of words": (["--max-shard-size", "big"], ["--max-shard-size big: not a size"]),
    "no shard size": (["--max-shard-size", "0GB"], ["--max-shard-size 0GB: not a size"]),
    "negative workers": (["--workers", -1], ["--workers -1 must not be below zero"]),
    "no such config": (["--hf-cfg-dir", "/nonexistent"], ["/nonexistent", "no such file"]),
}


@pytest.mark.parametrize("case", WISHES)
def test_a_wrong_wish(case, tmp_path):
    flags, words = WISHES[case]
    refused(make_hugging_face_folder(tmp_path / "hf"), *flags, words=words)


def test_a_tp_that_would_cut_a_group_unevenly(tmp_path):
    """TP14 of Qwen2.5-0.5B would put the 9 heads of a group on 7 ranks."""
    config = toy_config(
        num_attention_heads=6, num_query_groups=2, hidden_size=48, ffn_hidden_size=96, kv_channels=2
    )
    source = make_hugging_face_folder(tmp_path / "hf", config)
    said = refused(source, *tp(6))
    assert "tensor_model_parallel_size=6 does not divide the 20 rows of linear_qkv" in said


def test_an_odd_vocabulary_names_the_flags(tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf", toy_config(vocab_size=93))
    said = refused(source, *tp(2))
    assert "--padded-vocab-size 94" in said and "--make-vocab-size-divisible-by 128" in said


def test_no_source(tmp_path):
    (tmp_path / "here").mkdir()
    assert "no such folder" in refused(tmp_path / "here/nowhere")
    (tmp_path / "here/file").write_text("")
    assert "no such folder" in refused(tmp_path / "here/file")


# -- the target


def test_a_target_that_exists(tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf")
    convert(source, tmp_path / "target", *tp(4)).require()
    said = refused(source, *tp(2))
    assert "exists and is not empty" in said and "--overwrite" in said
    convert(source, tmp_path / "target", *tp(2), "--overwrite").require()
    ranks = sorted(path.name for path in (tmp_path / "target/iter_0000001").iterdir())
    assert ranks == ["mp_rank_00", "mp_rank_01"]  # nothing stale
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "target"]


def test_an_empty_target_is_taken(tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf")
    (tmp_path / "target").mkdir()
    convert(source, tmp_path / "target", *tp(2)).require()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "target"]


def test_parents_are_made_and_removed_again_when_it_fails(tmp_path, monkeypatch):
    source = make_hugging_face_folder(tmp_path / "hf")
    convert(source, tmp_path / "a/b/c").require()
    monkeypatch.setattr(convert_module, "write_target", failing(VerificationError("wrong")))
    convert(source, tmp_path / "d/e/f").require(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "hf"]


def finished(source: Path, target: Path, *flags: object) -> None:
    """Finishes what a failure left: with --resume it becomes what it would have been."""
    assert [path.name for path in target.parent.iterdir()].count(f".{target.name}.partial") == 1
    convert(source, target, *flags, "--resume").require()
    convert(source, target.parent / "again", *(f for f in flags if f != "--overwrite")).require()
    assert tree(target) == tree(target.parent / "again")


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=["plain", "overwrite"])
def test_a_target_that_is_no_folder(kind, flags, tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf")
    if kind == "file":
        (tmp_path / "target").write_text("mine")
    else:
        if kind == "link":
            (tmp_path / "elsewhere").mkdir()
        (tmp_path / "target").symlink_to(tmp_path / "elsewhere")
    ended = convert(source, tmp_path / "target", *flags).require(2)
    assert "exists and is not a folder" in ended.err
    assert (tmp_path / "target").is_symlink() or (tmp_path / "target").read_text() == "mine"


def test_overwrite_spares_what_is_no_checkpoint(tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf")
    (tmp_path / "target").mkdir()
    (tmp_path / "target/thesis.tex").write_text("mine")
    assert "does not look like a checkpoint" in refused(source, "--overwrite")


def test_a_partial_folder_that_is_a_link(tmp_path):
    """Whoever could write beside the target must not make us empty another folder."""
    source = make_hugging_face_folder(tmp_path / "hf")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/thesis.tex").write_text("mine")
    (tmp_path / ".target.partial").symlink_to(tmp_path / "elsewhere")
    for flag in ("--overwrite", "--resume"):
        assert "in the way and not a folder" in refused(source, flag)


@pytest.mark.parametrize("where", ["in it", "around it", "itself", "its partial folder"])
def test_source_and_target_in_each_other(where, tmp_path):
    top = tmp_path / "top"
    name = "hf" if where != "its partial folder" else ".hf.partial"
    source = make_hugging_face_folder(top / name)
    target = {"in it": source / "new", "around it": top}.get(where, top / "hf")
    assert "choose" in refused(source, "--overwrite", target=target)


def test_a_config_folder_that_would_be_replaced(tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf")
    convert(source, tmp_path / "target").require()
    said = refused(source, "--overwrite", "--hf-cfg-dir", tmp_path / "target")
    assert "--hf-cfg-dir" in said and "choose another --save-dir" in said


@contextlib.contextmanager
def as_nobody() -> Iterator[Path]:
    """A folder whose owner is not root, and that owner's rights; permissions count again."""
    folder = Path(tempfile.mkdtemp())
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(folder, 65534, 65534)
        os.setegid(65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
            os.setegid(0)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o700)
        shutil.rmtree(folder)


def test_a_parent_that_may_not_be_written():
    with as_nobody() as folder:
        source = make_hugging_face_folder(folder / "hf")
        (folder / "readonly").mkdir()
        (folder / "readonly").chmod(0o555)
        for target in ("readonly/target", "readonly/new/target"):
            said = refused(source, target=folder / target)
            assert f"{folder / target}: cannot be written: Permission denied" in said


def test_a_parent_that_is_a_file(tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf")
    (tmp_path / "file").write_text("")
    said = refused(source, target=tmp_path / "file/target")
    assert "cannot be written" in said


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "."])
def test_a_source_that_may_not_be_read(name):
    with as_nobody() as folder:
        source = make_hugging_face_folder(folder / "hf")
        (source / name).chmod(0)
        ended = convert(source, folder / "target")
        (source / name).chmod(0o700)
        assert ended.status in (1, 2) and "Permission denied" in ended.err
        assert str(source) in ended.err and "Traceback" not in ended.err
        assert sorted(path.name for path in folder.iterdir()) == ["hf"]


# -- failures on the way


def failing(error: Exception) -> Callable:
    def fail(*_: object, **__: object):
        raise error

    return fail


def test_a_disk_that_is_too_small_is_seen_before_the_first_byte(tmp_path, monkeypatch):
    source = make_hugging_face_folder(tmp_path / "hf")
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(convert_module, "write_target", failing(AssertionError("wrote")))
    said = refused(source)
    assert "needs 0.07 GB, but the disk has 0.00 GB free; make room" in said


@contextlib.contextmanager
def tiny_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of its own."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, timeout=20).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=20)


@pytest.mark.parametrize("kilobytes", range(40, 201, 20))
def test_a_disk_that_fills_up_midway(kilobytes, tmp_path, monkeypatch):
    """Somebody else took the space that was there at the start, at any point of the work."""
    source = make_hugging_face_folder(tmp_path / "hf")
    monkeypatch.setattr(convert_module, "_check_space", lambda *_: None)
    with tiny_disk(tmp_path / "disk", kilobytes) as disk:
        said = convert(source, disk / "target", *tp(2)).require(1).err
        assert "cannot be written: No space left on device; make room" in said
        assert "finish it by repeating the command with --resume" in said
        assert [path.name for path in disk.iterdir()] == [".target.partial"]
        subprocess.run(["mount", "-o", "remount,size=9m", str(disk)], check=True, timeout=20)
        finished(source, disk / "target", *tp(2))


def test_a_disk_that_fails_keeps_the_old_state(tmp_path, monkeypatch):
    source = make_hugging_face_folder(tmp_path / "hf")
    convert(source, tmp_path / "target").require()
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "fsync", failing(OSError(5, "Input/output error")))
        said = convert(source, tmp_path / "target", *tp(2), "--overwrite").require(1).err
    assert "model_optim_rng.pt: cannot be written: Input/output error" in said
    assert "finish it by repeating the command with --resume --overwrite" in said
    kept = {name for name in tree(tmp_path) if name.startswith(".target.partial")}
    assert {name: of for name, of in tree(tmp_path).items() if name not in kept} == before
    finished(source, tmp_path / "target", *tp(2), "--overwrite")


def test_publishing_that_fails_can_be_repeated(tmp_path, monkeypatch):
    """All tensors were written, and none has to be written again."""
    source = make_hugging_face_folder(tmp_path / "hf")
    with monkeypatch.context() as patch:
        patch.setattr(staging, "fsync_tree", failing(OSError(5, "Input/output error")))
        convert(source, tmp_path / "target", to="hf").require(1)
    said = convert(source, tmp_path / "target", "--resume", to="hf").require().err
    assert "resuming: 27 of 27 tensors are there" in said
    assert load_folder(tmp_path / "target") == load_folder(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "target"]


def test_a_source_that_cannot_be_read_at_one_place(tmp_path, monkeypatch):
    source = make_hugging_face_folder(tmp_path / "hf")
    with monkeypatch.context() as patch:
        patch.setattr(copying.os, "preadv", failing(OSError(5, "Input/output error")))
        said = convert(source, tmp_path / "target", *tp(2)).require(1).err
    assert "model.safetensors: cannot be read" in said and "Input/output error" in said
    finished(source, tmp_path / "target", *tp(2))
    with monkeypatch.context() as patch:
        patch.setattr(copying.os, "preadv", failing(OSError(5, "Input/output error")))
        said = convert(tmp_path / "target", tmp_path / "back", "--ignore-replica-mismatch", to="hf")
    assert "model_optim_rng.pt: cannot be read: Input/output error" in said.require(1).err


def during_the_copy(monkeypatch, act: Callable[[], object]) -> None:
    """Does something behind the conversion's back, after the source was opened."""
    genuine = convert_module.write_target

    def write_target(*args, **kwargs):
        act()
        return genuine(*args, **kwargs)

    monkeypatch.setattr(convert_module, "write_target", write_target)


@pytest.mark.parametrize("to", ["hf", "mg"])
def test_a_source_that_becomes_shorter(to, tmp_path, monkeypatch):
    """Reading lost pages of a mapped file would kill the process with SIGBUS."""
    source = make_hugging_face_folder(tmp_path / "hf")
    flags = tp(2) if to == "mg" else []
    during_the_copy(monkeypatch, lambda: os.truncate(source / "model.safetensors", 10_000))
    said = convert(source, tmp_path / "target", *flags, to=to).require(1).err
    assert "model.safetensors became shorter while it was read" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_source_that_changes(tmp_path, monkeypatch):
    source = make_hugging_face_folder(tmp_path / "hf")
    during_the_copy(monkeypatch, lambda: os.utime(source / "model.safetensors"))
    said = convert(source, tmp_path / "target").require(1).err
    assert "changed while it was read" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


# -- two at once


def test_a_lock_keeps_a_second_conversion_out(tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf")
    with StagedFolder(tmp_path / "target") as staged:
        (staged.folder / "work").write_text("in progress")
        for flags in ([], ["--overwrite"], ["--resume"]):
            ended = convert(source, tmp_path / "target", *flags).require(2)
            assert "another process is writing it" in ended.err or not flags
        assert (staged.folder / "work").read_text() == "in progress"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_target_that_appears_meanwhile_is_left_alone(tmp_path, monkeypatch):
    source = make_hugging_face_folder(tmp_path / "hf")
    theirs = make_hugging_face_folder(tmp_path / "theirs", seed=5)
    during_the_copy(monkeypatch, lambda: shutil.copytree(theirs, tmp_path / "target"))
    said = convert(source, tmp_path / "target", to="hf").require(2).err
    assert "something else was written there meanwhile" in said
    assert tree(tmp_path / "target") == tree(theirs)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "target")  # the work was complete, and is not lost
    said = convert(source, tmp_path / "target", "--resume", to="hf").require().err
    assert "resuming: 27 of 27 tensors are there" in said
    assert load_folder(tmp_path / "target") == load_folder(source)


def test_processes_that_race_for_one_target(tmp_path):
    """One wins, the others are refused, and the result is whole; through the real command."""
    hf = make_hugging_face_folder(tmp_path / "hf", toy_config(num_layers=8))
    command = [sys.executable, TOOL, "--load-dir", hf, "--save-dir", tmp_path / "target"]
    command += ["--save-model-type", "mg", "--target-tensor-parallel-size", 2]
    racers = [
        subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [racer.communicate(timeout=120)[1] for racer in racers]
    assert sorted(racer.returncode for racer in racers) == [0, 2, 2], said
    assert not any("Traceback" in text for text in said)
    convert(tmp_path / "target", tmp_path / "back", "--verify", to="hf").require()
    assert load_folder(tmp_path / "back") == load_folder(hf)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "target"]
