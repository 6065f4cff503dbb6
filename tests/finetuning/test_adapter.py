"""PEFT adapter folders: read strictly, merged exactly, and understood by peft."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoint.toys import toy_config
from distributed.harness import each_check
from finetuning.adapter_worker import CHECKS
from helpers import make_tiny_hugging_face_folder
from qwen2_ascend.checkpoint.adapter_rules import adapter_pieces, adapter_rules, peft_pieces
from qwen2_ascend.checkpoint.command import main as convert
from qwen2_ascend.checkpoint.formats.peft_adapter import (
    WEIGHTS_FILE,
    open_adapter,
    read_lora_config,
)
from qwen2_ascend.checkpoint.plan import overlap, volume
from qwen2_ascend.cli import run_command
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.lora_config import PROJECTIONS, LoraConfig
from qwen2_ascend.parallel import ParallelLayout

WORKER = Path(__file__).with_name("adapter_worker.py")
LORA = LoraConfig(rank=3, alpha=7, targets=("q_proj", "v_proj", "linear_fc1", "down_proj"))

needs = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
test_peft = needs(each_check(WORKER, CHECKS))


def shapes(config: Qwen2Config) -> dict[str, tuple[int, int]]:
    """(in, out) of every projection, written down from transformers' model."""
    h, f, hn = config.hidden_size, config.ffn_hidden_size, config.kv_channels
    heads, groups = config.num_attention_heads * hn, config.num_query_groups * hn
    return {
        "self_attn.q_proj": (h, heads),
        "self_attn.k_proj": (h, groups),
        "self_attn.v_proj": (h, groups),
        "self_attn.o_proj": (heads, h),
        "mlp.gate_proj": (h, f),
        "mlp.up_proj": (h, f),
        "mlp.down_proj": (f, h),
    }


def random_tensors(config: Qwen2Config, lora: LoraConfig) -> dict[str, np.ndarray]:
    """An adapter's tensors under the names that peft gives them."""
    rng = np.random.default_rng(8)
    tensors = {}
    for layer in range(config.num_layers):
        for name, (columns, rows) in shapes(config).items():
            if name.rpartition(".")[2] in lora.targets:
                stem = f"base_model.model.model.layers.{layer}.{name}"
                a, b = (lora.rank, columns), (rows, lora.rank)
                tensors[f"{stem}.lora_A.weight"] = rng.normal(size=a).astype(np.float32)
                tensors[f"{stem}.lora_B.weight"] = rng.normal(size=b).astype(np.float32)
    return tensors


def make_adapter(folder: Path, config: Qwen2Config, lora: LoraConfig, **changes: object) -> Path:
    folder.mkdir()
    save_file(random_tensors(config, lora), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**lora.to_peft(), **changes}))
    return folder


# --- the table -----------------------------------------------------------------------------------


def test_the_names_and_shapes_are_those_of_peft() -> None:
    config = toy_config()
    found = {name: piece.shape for name, piece in peft_pieces(config, LORA).items()}
    assert found == {name: t.shape for name, t in random_tensors(config, LORA).items()}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_rank_has_its_weights_rows_and_columns(tp: int, groups: int) -> None:
    """B is cut as the weight is by rows, A by columns; together the ranks have all of it once."""
    config = toy_config(num_query_groups=groups)
    layout = ParallelLayout(tensor_model_parallel_size=tp, pipeline_model_parallel_size=2)
    rules = {rule.megatron: rule for rule in adapter_rules(config, LORA)}
    pieces = adapter_pieces(config, LORA, layout)
    for name, rule in rules.items():
        for layer in range(config.num_layers):
            boxes = [
                piece.box
                for own in pieces.values()
                for piece in own.values()
                if piece.tensor == name.format(layer)
            ]
            whole = tuple((0, n) for n in rule.view)
            assert len(boxes) == tp
            if rule.shard_axis is None:
                assert set(boxes) == {whole}
            else:
                assert sum(map(volume, boxes)) == volume(whole)
                assert not any(
                    volume(overlap(a, b)) for i, a in enumerate(boxes) for b in boxes[:i]
                )


# --- reading -------------------------------------------------------------------------------------


def test_an_adapter_is_what_it_was_saved_as(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", toy_config(), LORA)
    assert read_lora_config(folder) == LORA
    assert len(open_adapter(folder, toy_config()).held) == 2 * 2 * len(LORA.targets)


def test_a_pattern_of_targets_is_known_by_its_tensors(tmp_path: Path) -> None:
    pattern = r".*\.(q_proj|v_proj|gate_proj|up_proj|down_proj)"
    folder = make_adapter(tmp_path / "a", toy_config(), LORA, target_modules=pattern)
    assert read_lora_config(folder) == LORA


def test_what_is_not_implemented_is_refused_by_name(tmp_path: Path) -> None:
    changes = {"use_dora": True, "bias": "all", "trainable_token_indices": [1]}
    changes |= {"modules_to_save": ["lm_head"], "init_lora_weights": "pissa"}
    folder = make_adapter(tmp_path / "a", toy_config(), LORA, **changes)
    with pytest.raises(UserError) as error:
        read_lora_config(folder)
    assert len(error.value.faults) == len(changes)
    for key in changes:
        assert f"{key}=" in str(error.value)
    assert all("merge the adapter with peft" in fault for fault in error.value.faults)
    folder = make_adapter(tmp_path / "b", toy_config(), LORA, peft_type="IA3")
    with pytest.raises(UserError, match="peft_type='IA3' is not implemented"):
        read_lora_config(folder)


def test_what_can_only_be_merged_is_not_trained_further(tmp_path: Path) -> None:
    changes = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 9}}
    changes["layers_to_transform"] = [0, 1]  # type: ignore[assignment]
    folder = make_adapter(tmp_path / "a", toy_config(), LORA, **changes)
    with pytest.raises(UserError, match="merge the adapter with qwen2-ascend convert") as error:
        read_lora_config(folder)
    assert len(error.value.faults) == len(changes)
    open_adapter(folder, toy_config())
    bad = make_adapter(tmp_path / "b", toy_config(), LORA, alpha_pattern={"(a+)+b": 1})
    with pytest.raises(UserError, match="is implemented for names of modules and numbers"):
        open_adapter(bad, toy_config())
    lost = make_adapter(tmp_path / "c", toy_config(), LORA, layers_to_transform=[1])
    with pytest.raises(UserError, match=r"10 unexpected tensors: .*layers\.0\.self_attn\.q_proj"):
        open_adapter(lost, toy_config())


def test_tokens_that_were_added_are_told_of(tmp_path: Path) -> None:
    """peft puts the embedding into the adapter's file when it has been resized."""
    folder = make_adapter(tmp_path / "a", toy_config(), LORA)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = np.zeros((104, 64), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="tokens were added; merge the adapter with peft"):
        open_adapter(folder, toy_config())


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", toy_config(), LORA)
    with pytest.raises(UserError, match=r"q_proj.lora_A.weight: expected shape \(3, 32\)"):
        open_adapter(folder, toy_config(hidden_size=32))
    with pytest.raises(UserError, match=r"10 missing tensors: .*layers\.2\.self_attn\.q_proj"):
        open_adapter(folder, toy_config(num_layers=3))
    with pytest.raises(UserError, match=r"10 unexpected tensors: .*layers\.1\.self_attn\.q_proj"):
        open_adapter(folder, toy_config(num_layers=1))


def test_a_layer_without_its_adapter_is_named(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", toy_config(), LORA)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight")
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"1 missing tensors: .*layers\.1\.mlp\.up_proj\.lora_B"):
        open_adapter(folder, toy_config())


def test_no_adapter_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json: no such file"):
        read_lora_config(tmp_path)
    folder = make_adapter(tmp_path / "a", toy_config(), LORA)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="a pickle; save it as safetensors"):
        read_lora_config(folder)
    (folder / "adapter_model.bin").unlink()
    for read in (read_lora_config, partial(open_adapter, config=toy_config())):
        with pytest.raises(UserError) as error:
            read(folder)
        assert error.value.faults == (f"{folder}: there is no adapter_model.safetensors in it.",)


# --- merging -------------------------------------------------------------------------------------


def expected_weights(base: Path, adapter: Path, lora: LoraConfig) -> dict[str, np.ndarray]:
    """W + scaling * B A in fp32, rounded once."""
    weights = load_file(base / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    for name in weights:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in factors:
            product = factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"]
            merged = weights[name].astype(np.float32) + product * np.float32(lora.scaling)
            weights[name] = merged.astype(weights[name].dtype)
    return weights


@pytest.mark.parametrize("targets", [("all-linear",), ("k_proj", "up_proj"), ("o_proj",)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_merging_adds_the_product(tmp_path: Path, dtype: str, targets: tuple[str, ...]) -> None:
    """Folders merge, shards that cut query groups, and a folder from shards as well."""
    config, lora = toy_config(num_query_groups=2, dtype=dtype), LoraConfig(rank=3, targets=targets)
    base = make_tiny_hugging_face_folder(tmp_path / "base", config)
    adapter = make_adapter(tmp_path / "adapter", config, lora)
    expected = expected_weights(base, adapter, lora)
    merge = f"--adapter {adapter} --verify"
    shards = "--save-model-type mg --target-tensor-parallel-size 4 --save-format safetensors"
    commands = {
        "straight": f"--load-dir {base} --save-model-type hf {merge}",
        "merged-shards": f"--load-dir {base} {shards} {merge}",
        "and-back": f"--load-dir {tmp_path}/merged-shards --save-model-type hf",
        "plain-shards": f"--load-dir {base} {shards}",
        "from-shards": f"--load-dir {tmp_path}/plain-shards --save-model-type hf {merge}",
    }
    for name, command in commands.items():
        convert(f"{command} --save-dir {tmp_path / name}".split())
    for name in ("straight", "and-back", "from-shards"):
        found = load_file(tmp_path / name / "model.safetensors")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype == value.dtype
            ulp = 2.0**-7 if value.dtype == ml_dtypes.bfloat16 else 2.0**-22
            off = np.abs(found[key].astype(np.float64) - value.astype(np.float64))
            assert (off <= ulp * np.abs(value.astype(np.float64)) + 1e-5).all(), (name, key)
            if "proj" not in key:
                assert np.array_equal(found[key].view(np.uint8), value.view(np.uint8))
        if name == "straight" and dtype == "bf16":
            same = [np.mean(found[key] == value) for key, value in expected.items()]
            assert min(same) > 0.99, "rounded more than once"


PATTERNS = {
    "ranks": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 5}},
    "alphas": {"alpha_pattern": {"layers.0.self_attn.q_proj": 32, "q_proj": 3}},
    "both, rank-stabilized": {
        "rank_pattern": {"down_proj": 1},
        "alpha_pattern": {"^model.layers.1.mlp.down_proj": 7},
        "use_rslora": True,
    },
    "layers": {"layers_to_transform": [1]},
    "an expression": {"target_modules": r".*layers\.1\..*(q_proj|up_proj)"},
    "names with dots": {"target_modules": ["layers.0.self_attn.v_proj", "o_proj"]},
    "all but one": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
}


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("name", PATTERNS)
def test_an_adapter_that_differs_from_layer_to_layer_is_merged_as_peft_merges_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = make_tiny_hugging_face_folder(tmp_path / "base", toy_config(dtype="fp32"))
    settings: dict = {"target_modules": ["q_proj", "down_proj"], **PATTERNS[name]}
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **settings)
    torch.manual_seed(5)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base).float(), config)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    command = f"--load-dir {base} --adapter {tmp_path}/adapter --save-model-type hf --verify"
    convert(f"{command} --save-dir {tmp_path}/out".split())
    found, before = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "base"))
    changed = 0
    for key, weight in found.items():
        off = np.abs(weight - merged[key].numpy()).max()
        assert off <= 1e-6 * np.abs(weight).max(), (key, off)
        changed += not np.array_equal(weight, before[key])
    assert changed == sum("lora_A" in n for n in load_file(tmp_path / "adapter" / WEIGHTS_FILE))


def test_the_dry_run_says_what_is_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_tiny_hugging_face_folder(tmp_path / "base", toy_config())
    adapter = make_adapter(tmp_path / "adapter", toy_config(), LORA)
    arguments = f"--load-dir {base} --adapter {adapter} --save-model-type hf --dry-run"
    convert(f"{arguments} --save-dir {tmp_path / 'out'}".split())
    out, err = capsys.readouterr()
    merged = [line for line in out.splitlines() if "+merge" in line]
    assert len(merged) == 2 * len(LORA.targets)
    assert all(any(f".{name}.weight" in line for name in PROJECTIONS) for line in merged)
    assert "LoRA of rank 3 on q_proj, v_proj, gate_proj, up_proj, down_proj" in err


def test_an_adapter_that_does_not_fit_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_tiny_hugging_face_folder(tmp_path / "base", toy_config())
    adapter = make_adapter(tmp_path / "adapter", toy_config(ffn_hidden_size=64), LORA)
    arguments = f"--load-dir {base} --adapter {adapter} --save-model-type hf"
    status = run_command(lambda: convert(f"{arguments} --save-dir {tmp_path / 'out'}".split()))
    assert status == 2 and "mlp.gate_proj.lora_B.weight: expected shape" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
