"""Whatever the layout, the format and the files, the bits that went in come out."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from checkpoint.toys import (
    NUMPY,
    SIDE_FILES,
    convert,
    fingerprint,
    hugging_face_shapes,
    load_folder,
    make_hugging_face_folder,
    pp,
    random_weights,
    save_safetensors,
    toy_config,
    tp,
    tree,
)
from commands import run_python
from qwen2_ascend.checkpoint.command import main
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where nothing is flushed to a disk, so that many examples take little time."""
FORMATS = ("megatron", "safetensors", "torch_dist")


# -- round trips


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def configs(draw) -> Qwen2Config:
    groups = draw(st.sampled_from([1, 2, 4]))
    heads = groups * draw(st.sampled_from([1, 2, 3]))
    return Qwen2Config(
        num_layers=draw(st.integers(1, 6)),
        hidden_size=heads * 4,
        ffn_hidden_size=heads * draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=draw(st.sampled_from([2, 6])),
        vocab_size=draw(st.integers(5, 40)),
        tie_word_embeddings=draw(st.booleans()),
        dtype=draw(st.sampled_from(["bf16", "fp16", "fp32"])),
    )


@st.composite
def layouts(draw, config: Qwen2Config) -> list[object]:
    """Flags of a layout that fits `config`, padding included."""
    layers, groups = config.num_layers, config.num_query_groups
    qkv_rows = (config.num_attention_heads + 2 * groups) * config.kv_channels
    fits = [
        n
        for n in divisors(math.gcd(config.num_attention_heads, config.ffn_hidden_size, qkv_rows))
        if groups % n == 0 or n % groups == 0
    ]
    size = draw(st.sampled_from(fits))
    flags = tp(size)
    kind = draw(st.sampled_from(["even", "uneven", "virtual"]))
    if kind == "uneven":
        cuts = sorted(draw(st.sets(st.integers(1, max(1, layers - 1)), max_size=layers - 1)))
        ends = [*cuts, layers] if layers > 1 else [1]
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        flags += [*pp(len(counts)), "--num-layer-list", ",".join(map(str, counts))]
    else:
        stages = draw(st.sampled_from(divisors(layers)))
        flags += pp(stages)
        if kind == "virtual" and stages > 1:
            per_chunk = draw(st.sampled_from(divisors(layers // stages)))
            flags += ["--num-layers-per-virtual-pipeline-stage", per_chunk]
    if config.vocab_size % size or draw(st.booleans()):
        flags += draw(
            st.sampled_from(
                [
                    ["--make-vocab-size-divisible-by", 8],
                    ["--padded-vocab-size", -(-config.vocab_size // size) * size + 2 * size],
                ]
            )
        )
    return flags


@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.data())
def test_any_model_survives_any_two_layouts(data):
    """HF to shards, to other shards, and back: bit-equal, and resharding equals splitting anew."""
    config = data.draw(configs())
    first, second = data.draw(layouts(config)), data.draw(layouts(config))
    formats = [data.draw(st.sampled_from(FORMATS)) for _ in range(2)]
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        root = Path(folder)
        source = make_hugging_face_folder(
            root / "hf", config, num_files=data.draw(st.integers(1, 3))
        )
        untouched = fingerprint(source)
        convert(source, root / "a", *first, "--save-format", formats[0]).require()
        convert(root / "a", root / "b", *second, "--save-format", formats[1], "--verify").require()
        convert(source, root / "direct", *second, "--save-format", formats[1]).require()
        limit = data.draw(st.sampled_from(["1", "2KB", "5GB"]))
        convert(root / "b", root / "back", "--max-shard-size", limit, to="hf").require()

        assert load_folder(root / "back") == load_folder(source)
        assert tree(root / "b/iter_0000001") == tree(root / "direct/iter_0000001")
        assert fingerprint(source) == untouched
        assert sorted(p.name for p in root.iterdir()) == ["a", "b", "back", "direct", "hf"]


@pytest.mark.parametrize("save_format", FORMATS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_round_trip_of_each_format(save_format, tied, tmp_path):
    config = toy_config(num_layers=4, vocab_size=93, tie_word_embeddings=tied)
    source = make_hugging_face_folder(tmp_path / "hf", config)
    flags = [*tp(2), *pp(2), "--num-layers-per-virtual-pipeline-stage", 1]
    flags += ["--make-vocab-size-divisible-by", 4, "--save-format", save_format, "--verify"]
    convert(source, tmp_path / "mg", *flags).require()
    convert(tmp_path / "mg", tmp_path / "back", "--verify", to="hf").require()
    assert load_folder(tmp_path / "back") == load_folder(source)


def test_safetensors_shards_hold_no_pickle(tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf")
    convert(source, tmp_path / "mg", *tp(2), "--save-format", "safetensors").require()
    files = [p for p in (tmp_path / "mg/iter_0000001").rglob("*") if p.is_file()]
    assert sorted(str(f.relative_to(tmp_path / "mg/iter_0000001")) for f in files) == [
        "mp_rank_00/model.safetensors",
        "mp_rank_01/model.safetensors",
    ]


def test_padding_is_zero_and_trimmed_on_the_way_back(tmp_path):
    config = toy_config(vocab_size=93)
    source = make_hugging_face_folder(tmp_path / "hf", config)
    flags = [*tp(2), "--padded-vocab-size", 100, "--save-format", "safetensors"]
    convert(source, tmp_path / "mg", *flags).require()
    last = load_file(tmp_path / "mg/iter_0000001/mp_rank_01/model.safetensors")
    real = random_weights(config)["lm_head.weight"]
    assert last["output_layer.weight"][:43].tobytes() == real[50:].tobytes()
    assert last["output_layer.weight"][43:].tobytes() == bytes(7 * 64 * 2)
    convert(tmp_path / "mg", tmp_path / "back", to="hf").require()
    assert load_folder(tmp_path / "back") == load_folder(source)


def test_the_vocabulary_keeps_its_size_when_it_can(tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf", toy_config(vocab_size=94))
    convert(source, tmp_path / "mg", *tp(2), "--save-format", "safetensors").require()
    first = load_file(tmp_path / "mg/iter_0000001/mp_rank_00/model.safetensors")
    assert first["embedding.word_embeddings.weight"].shape == (47, 64)


@pytest.mark.parametrize("where", ["the folder", "the iteration", "a release"])
def test_shards_are_found(where, tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf")
    convert(source, tmp_path / "mg", *tp(2)).require()
    given = tmp_path / "mg"
    if where == "the iteration":
        given = given / "iter_0000001"
    elif where == "a release":
        (given / "iter_0000001").rename(given / "release")
        (given / "latest_checkpointed_iteration.txt").write_text("release\n")
    convert(given, tmp_path / "back", to="hf").require()
    assert load_folder(tmp_path / "back") == load_folder(source)


def test_the_latest_of_several_iterations_is_taken(tmp_path):
    old = make_hugging_face_folder(tmp_path / "old", seed=1)
    new = make_hugging_face_folder(tmp_path / "new", seed=2)
    convert(old, tmp_path / "mg", *tp(2)).require()
    convert(new, tmp_path / "other").require()
    shutil.move(tmp_path / "other/iter_0000001", tmp_path / "mg/iter_0000250")
    (tmp_path / "mg/latest_checkpointed_iteration.txt").write_text("250")
    convert(tmp_path / "mg", tmp_path / "back", to="hf").require()
    assert load_folder(tmp_path / "back") == load_folder(new)


# -- Hugging Face files


def test_many_files_in_and_one_out(tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf", num_files=7)
    convert(source, tmp_path / "out", to="hf").require()
    assert [p.name for p in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    assert load_folder(tmp_path / "out") == load_folder(source)


def test_transformers_loads_what_is_cut_into_files(tmp_path):
    from transformers import AutoModelForCausalLM

    config = toy_config(dtype="fp32", tie_word_embeddings=True)
    generator = np.random.default_rng(0)
    shapes = hugging_face_shapes(config).items()
    weights = {n: generator.standard_normal(s, np.float32) for n, s in shapes}
    source = make_hugging_face_folder(tmp_path / "hf", config, weights=weights)
    convert(source, tmp_path / "mg", *tp(2), *pp(2)).require()
    convert(tmp_path / "mg", tmp_path / "back", "--max-shard-size", "40KB", to="hf").require()

    files = sorted((tmp_path / "back").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert all(sum(w.nbytes for w in load_file(f).values()) <= 40_000 for f in files)
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights.values())
    assert {
        n: load_file(tmp_path / "back" / f)[n].tobytes() for n, f in index["weight_map"].items()
    }
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    state = model.state_dict()
    assert all((state[name].numpy() == weight).all() for name, weight in weights.items())


def test_a_tied_output_that_is_stored_too_is_dropped_if_equal(tmp_path):
    config = toy_config(tie_word_embeddings=True)
    weights = random_weights(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    source = make_hugging_face_folder(tmp_path / "hf", config, weights=weights)
    convert(source, tmp_path / "mg", *tp(2)).require()
    convert(tmp_path / "mg", tmp_path / "back", to="hf").require()
    assert "lm_head.weight" not in load_folder(tmp_path / "back")

    weights["lm_head.weight"] = weights["lm_head.weight"].copy()
    weights["lm_head.weight"].view(np.uint16)[-1, -1] ^= 1
    other = make_hugging_face_folder(tmp_path / "other", config, weights=weights)
    ended = convert(other, tmp_path / "not", *tp(2)).require(2)
    assert "lm_head.weight differs from model.embed_tokens.weight" in ended.err
    convert(other, tmp_path / "accepted", *tp(2), "--ignore-replica-mismatch").require()
    convert(tmp_path / "accepted", tmp_path / "merged", to="hf").require()
    embedding = load_folder(tmp_path / "merged")["model.embed_tokens.weight"]
    assert embedding.data == weights["model.embed_tokens.weight"].tobytes()


# -- side files


@pytest.mark.parametrize("umask", [0o002, 0o027])
@pytest.mark.parametrize("to", ["mg", "hf"])
def test_all_that_is_written_may_be_read_and_written_as_the_umask_says(umask, to, tmp_path):
    """A group that shares a disk also replaces what another of it has written."""
    source = make_hugging_face_folder(tmp_path / "hf")
    before = os.umask(umask)
    try:
        convert(source, tmp_path / "out", to=to).require(0)
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_mode & 0o777 == wanted, path


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_was_saved_without_its_head_is_read_as_transformers_reads_it(tied, tmp_path):
    """transformers' Qwen2Model has names without `model.`, and no lm_head."""
    config = toy_config(tie_word_embeddings=tied)
    weights = random_weights(config)
    source = make_hugging_face_folder(tmp_path / "whole", config, weights=weights)
    bare = {n.removeprefix("model."): w for n, w in weights.items() if n != "lm_head.weight"}
    make_hugging_face_folder(tmp_path / "bare", config, weights=bare)
    if not tied:
        said = convert(tmp_path / "bare", tmp_path / "mg", *tp(2)).require(2).err
        assert "1 missing tensors: lm_head.weight" in said
        return
    convert(tmp_path / "bare", tmp_path / "mg", *tp(2), "--verify").require(0)
    convert(tmp_path / "mg", tmp_path / "back", to="hf").require(0)
    assert load_folder(tmp_path / "back") == load_folder(source)


@pytest.mark.parametrize("save_format", FORMATS)
def test_side_files_go_along_byte_for_byte(save_format, tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf")
    (source / "README.md").write_text("not needed")
    convert(source, tmp_path / "mg", *tp(2), "--save-format", save_format).require()
    convert(tmp_path / "mg", tmp_path / "back", to="hf").require()
    for name in ("config.json", *SIDE_FILES):
        for folder in (tmp_path / "mg", tmp_path / "back"):
            assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == sorted(
        [
            *{Path(name).parts[0] for name in SIDE_FILES},
            *("config.json", "model.safetensors", "qwen2_ascend_manifest.json"),
        ]
    )


@pytest.mark.parametrize("spelling", ["torch_dtype", "dtype", "neither"])
def test_only_the_dtype_of_config_json_changes_and_only_when_cast(spelling, tmp_path):
    config = toy_config(dtype="fp32")
    source = make_hugging_face_folder(tmp_path / "hf", config, config_changes={"a": "\u4f60"})
    raw = json.loads((source / "config.json").read_text())
    name = raw.pop("torch_dtype")
    if spelling != "neither":
        raw[spelling] = name
    (source / "config.json").write_text(json.dumps(raw))
    convert(source, tmp_path / "same", to="hf").require()
    assert (tmp_path / "same/config.json").read_bytes() == (source / "config.json").read_bytes()
    flags = ["--dtype", "bf16", "--allow-overflow"]  # random bits
    convert(source, tmp_path / "cast", *flags, to="hf").require()
    key = "dtype" if spelling == "dtype" else "torch_dtype"
    assert json.loads((tmp_path / "cast/config.json").read_text()) == raw | {key: "bfloat16"}


@pytest.mark.parametrize("given", ["", "config.json"], ids=["the folder", "the file"])
def test_hf_cfg_dir_replaces_the_side_files(given, tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf")
    other = make_hugging_face_folder(tmp_path / "cfg", seed=1)
    (other / "tokenizer.json").write_text("{}")
    convert(source, tmp_path / "mg", *tp(2)).require()
    flags = ["--hf-cfg-dir", other / given, "--verify"]
    convert(tmp_path / "mg", tmp_path / "back", *flags, to="hf").require()
    assert (tmp_path / "back/tokenizer.json").read_text() == "{}"
    for path in (tmp_path / "mg").iterdir():
        if path.name in ("config.json", *SIDE_FILES):
            path.unlink()
    message = convert(tmp_path / "mg", tmp_path / "no", to="hf").require(2).err
    assert "--hf-cfg-dir" in message
    convert(tmp_path / "mg", tmp_path / "yes", *flags, to="hf").require()
    assert load_folder(tmp_path / "yes") == load_folder(source)


# -- casts


def every_pattern(dtype: str) -> np.ndarray:
    """All 65,536 values of a 16-bit dtype; of fp32, those and random ones and the edges of bf16,
    fp16 and subnormals."""
    if dtype != "fp32":
        return np.arange(1 << 16, dtype=np.uint16).view(NUMPY[dtype]).reshape(1024, 64)
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    near_halves = (np.arange(0x33000000, 0x47900000, 0x1000, dtype=np.uint32)[:, None]) + low[:3]
    noise = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, np.uint32)
    bits = np.concatenate([(upper[:, None] | low).ravel(), near_halves.ravel(), noise])
    return bits[: len(bits) // 64 * 64].view(np.float32).reshape(-1, 64)


@pytest.mark.parametrize("wanted", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_casts_are_torchs_bit_for_bit(dtype, wanted, tmp_path):
    """NaNs stay NaNs (torch's own payloads differ between its vector and its scalar loops)."""
    import torch

    patterns = every_pattern(dtype)
    config = toy_config(vocab_size=len(patterns), dtype=dtype, num_layers=1)
    weights = random_weights(config) | {"model.embed_tokens.weight": patterns}
    down = "model.layers.0.mlp.down_proj.weight"  # cut by columns: copied by another way
    weights[down] = patterns[:96].copy().reshape(64, 96)
    source = make_hugging_face_folder(tmp_path / "hf", config, weights=weights)
    flags = [*tp(2), "--save-format", "safetensors", "--make-vocab-size-divisible-by", 1]
    flags += ["--allow-overflow", "--dtype", wanted, "--verify"]
    convert(source, tmp_path / "mg", *flags).require()
    convert(tmp_path / "mg", tmp_path / "back", to="hf").require()

    found = load_file(tmp_path / "back/model.safetensors")
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name in ("model.embed_tokens.weight", down):
        raw = torch.from_numpy(weights[name].view(np.uint8)).view(kinds[dtype])
        expected = raw.to(kinds[wanted]).view(torch.uint8).numpy().view(NUMPY[wanted])
        unsigned = np.dtype(f"u{NUMPY[wanted].itemsize}")
        with np.errstate(invalid="ignore"):  # ml_dtypes warns about the NaNs it is asked for
            nan = np.isnan(expected)
            assert (np.isnan(found[name]) == nan).all()
        assert found[name].dtype == NUMPY[wanted]
        same = found[name].view(unsigned) == expected.view(unsigned)
        assert same[~nan].all() if dtype != wanted else same.all()


def test_mixed_dtypes_need_a_decision(tmp_path):
    weights = random_weights(toy_config())
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(np.float32)
    source = make_hugging_face_folder(tmp_path / "hf", weights=weights)
    message = convert(source, tmp_path / "mg").require(2).err
    assert "mixes dtypes" in message and "--dtype bf16" in message
    convert(source, tmp_path / "mg", "--dtype", "fp32", "--verify").require()


def test_a_dtype_other_than_the_configs_needs_a_decision(tmp_path):
    weights = random_weights(toy_config(dtype="fp16"))
    source = make_hugging_face_folder(tmp_path / "hf", weights=weights)  # config.json: bf16
    message = convert(source, tmp_path / "mg").require(2).err
    assert "config.json says bf16, the tensors are fp16" in message
    convert(source, tmp_path / "hf2", "--dtype", "fp16", to="hf").require()
    assert load_folder(tmp_path / "hf2") == load_folder(source)
    assert json.loads((tmp_path / "hf2/config.json").read_text())["torch_dtype"] == "float16"


# -- the command


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf", toy_config(vocab_size=93), num_files=2)
    flags = [*tp(2), "--padded-vocab-size", 94, "--dtype", "fp32", "--dry-run"]
    ended = convert(source, tmp_path / "mg", *flags).require()
    lines = ended.out.splitlines()
    qkv = [line for line in lines if "decoder.layers.1.self_attention.linear_qkv.weight" in line]
    assert len(qkv) == 2
    for word in ("64x64", "fp32", "rows+cast", "self_attn.q_proj", "k_proj", "v_proj"):
        assert all(word in line for line in qkv)
    assert sum("columns+cast" in line for line in lines) == 2 * 2 * 2
    assert sum("rows+cast+zeros" in line for line in lines) == 2
    assert "34 tensors in 2 files" in lines[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_megatron_lm_needs_no_flag_to_say_what_is_loaded(tmp_path):
    """--load-model-type is detected; saying it wrong is an error, not a guess."""
    source = make_hugging_face_folder(tmp_path / "hf")
    convert(source, tmp_path / "mg", "--load-model-type", "hf").require()
    convert(tmp_path / "mg", tmp_path / "a", "--load-model-type", "mg", to="hf").require()
    assert (
        "config.json"
        not in convert(source, tmp_path / "b", "--load-model-type", "mg").require(2).err
    )
    convert(tmp_path / "mg", tmp_path / "c", "--load-model-type", "hf", to="hf").require(2)


def test_flags_that_mean_nothing_for_the_target_are_refused(tmp_path):
    source = make_hugging_face_folder(tmp_path / "hf")
    convert(source, tmp_path / "mg").require()

    def refused(to: str, *flags: object) -> str:
        return convert(tmp_path / "mg", tmp_path / "back", *flags, to=to).require(2).err

    message = refused("hf", *tp(2))
    assert "--target-tensor-parallel-size: for shards only" in message
    message = refused("hf", "--save-format", "torch_dist")
    assert "--save-format torch_dist: for shards only" in message
    assert "--max-shard-size: for a Hugging Face" in refused("mg", "--max-shard-size", "2GB")
    convert(tmp_path / "mg", tmp_path / "back", *tp(1), *pp(1), to="hf").require()
    flags = ["--save-format", "safetensors", "--max-shard-size", "2GB"]
    convert(tmp_path / "mg", tmp_path / "said", *flags, to="hf").require()


@pytest.mark.parametrize("save_format", ["megatron", "safetensors", "torch_dist"])
def test_a_format_of_shards_does_not_become_a_hugging_face_folder(save_format, tmp_path):
    """Which shards become where no kind is said: a folder of safetensors, too."""
    convert(make_hugging_face_folder(tmp_path / "hf"), tmp_path / "mg").require()
    words = ["--load-dir", tmp_path / "mg", "--save-dir", tmp_path / "b"]
    with pytest.raises(UserError, match=f"--save-format {save_format} .* say --save-model-type mg"):
        main([*map(str, words), "--save-format", save_format])
    assert not (tmp_path / "b").exists()


IMPORTS = """
import sys
from qwen2_ascend.checkpoint.command import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print("imported:", *sorted({"torch", "transformers", "megatron"} & set(sys.modules)))
"""


@pytest.mark.parametrize("save_format", ["help", "safetensors", "megatron"])
def test_the_splitter_imports_no_torch(save_format, tmp_path):
    flags = ["--help"]
    if save_format != "help":
        source = make_hugging_face_folder(tmp_path / "hf")
        flags = ["--load-dir", source, "--save-dir", tmp_path / "mg", "--save-model-type", "mg"]
        flags += ["--save-format", save_format, *tp(2), "--verify"]
    assert run_python("-c", IMPORTS, *flags).out.splitlines()[-1] == "imported:"
    assert save_format == "help" or (tmp_path / "mg/latest_checkpointed_iteration.txt").exists()


def test_the_toys_are_honest(tmp_path):
    """The toy's own writer and reader agree, or every test here would prove nothing."""
    weights = random_weights(toy_config())
    save_safetensors(tmp_path / "x.safetensors", weights)
    found = load_folder(tmp_path)
    assert {n: (w.shape, w.tobytes()) for n, w in weights.items()} == {
        n: (s.shape, s.data) for n, s in found.items()
    }
